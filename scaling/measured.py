"""What was measured over widths: frozen, printable records with slopes beside the exponents theory gives."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ConfigDict

from scaling.records import Record
from scaling.training import Environment, Saved

__all__ = ["Assumptions", "CoordinateCheck", "Measurement", "Outcome", "Quantity", "Series", "module_of"]

Quantity = Literal["activation", "change", "own", "inherited", "weight", "update", "frobenius", "rank", "sign", "gradient", "progress"]
Outcome = Literal["passed", "undecided", "failed"]

SYMBOLS: dict[tuple[Quantity, bool], str] = {
    ("change", True): "change",
    ("own", True): "ΔW·x",
    ("weight", False): "‖W‖₂",
    ("frobenius", False): "‖W‖_F/√rank",
    ("update", True): "‖ΔW‖₂",
    ("frobenius", True): "‖ΔW‖_F",
}
"""Of what a verdict lists, at init or later."""
SHOWN = 8
"""Series that a verdict lists, of either kind."""


class Series(Record):
    """One quantity of one tensor after `step` updates: a value per width, the mean over the seeds' `samples` (width × seed).

    `slope` is the least-squares slope of log2(value) against log2(width); None where the value is 0 at every width (nothing moved yet),
    nan where it is 0 at some widths only or not finite. `predicted` is the exponent theory gives; None where it gives none.
    With a prediction, `exponent` is the measured one at the largest width and `interval` where it is with 95 % confidence, a transient
    told apart (`scaling.trend`); None where there is no slope.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    quantity: Quantity
    name: str
    step: int
    values: tuple[float, ...]
    slope: float | None
    predicted: float | None
    samples: tuple[tuple[float, ...], ...] = ()
    exponent: float | None = None
    interval: tuple[float, float] | None = None


class Measurement(Saved):
    """Series over widths, and what they were measured on. `skipped` names tensors that cannot be compared over widths or steps."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    widths: tuple[int, ...]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    series: tuple[Series, ...]
    skipped: tuple[str, ...] = ()
    environment: Environment

    def select(self, *quantities: Quantity) -> dict[str, dict[int, Series]]:
        """The series of the given quantities: name -> step -> series."""
        selected: dict[str, dict[int, Series]] = defaultdict(dict)
        for series in self.series:
            if series.quantity in quantities:
                selected[series.name][series.step] = series
        return dict(selected)

    @property
    def conditions(self) -> str:
        """The widths, seeds and machine, in one line."""
        widths, seeds = (", ".join(map(str, values)) for values in (self.widths, self.seeds))
        skipped = f"\nleft out, not the same tensors at every width and step: {', '.join(self.skipped)}" if self.skipped else ""
        return f"widths {widths}; seeds {seeds}; {self.environment.device}, torch {self.environment.torch}{skipped}"


class CoordinateCheck(Measurement):
    """How every activation, its change, and the norms of W and ΔW grow with width, beside what theory predicts.

    Judged are, where theory predicts an exponent, every activation's change (the classical check) and, if the check has a table, every
    weight's W at init and its ΔW (the spectral condition, which is what inits' and learning rates' rules are about, and which finds a rule
    that is wrong where other weights' changes hide it). Not judged is what activations are at init (0 and -1/2 are both right).

    `passed` is whether every one of them is where it should be by its best estimate, the nearer one of its slope over all widths and its
    exponent at the largest (`scaling.trend`): at most `tolerance` from what is predicted, and no other is excluded by its interval. That
    can be told of two widths and one seed. `outcome` says how sure that is:

    - "passed": all of every interval is within `tolerance`; exponents that are wrong by 1/2 are excluded with 95 % confidence.
    - "failed": some interval is outside `tolerance`: that series' predicted exponent is excluded.
    - "undecided": neither. More seeds make intervals narrower, larger widths leave less of a transient.

    What a finite width does of its own is not held against a rule:

    - ΔW·x of a weight is a part of its module's change: where it is most of it at the largest width and flat, a change that still falls
      will not go on to (a router: what it inherits, W₀Δx, dies out like 1/√d).
    - ΔW·x by itself fails only if it grows for sure. That it falls shows which weight is at fault where others miss, but is a transient
      where inputs are alike (a key's gradient sees their differences only: softmax is blind to the rest).
    - W at init is judged by ‖W‖_F/√min(fan_in, fan_out), which of a Gaussian is √(fan_out/fan_in) exactly; ‖W‖₂ is 1 + √(min/max of its
      fans) times as large.
    - ΔW is judged by ‖ΔW‖₂ or ‖ΔW‖_F, whichever is nearer to what both have in the limit: msign's is exact by the first, Adam's by the
      second, and they differ while the rank of the gradient grows with the width. Where it does, a rate of msign that is too small by 1/√d
      passes for one of Adam's that is right.
    - Vectors (a bias, a gain) have the scatter of one number: they fail only if the predicted exponent is excluded.
    """

    tolerance: float

    @property
    def slopes(self) -> dict[str, dict[int, float | None]]:
        """Activation -> step -> slope: at step 0 of its RMS at init, later of the RMS of its change since init."""
        return _each(self.select("activation", "change"), "slope")

    @property
    def own_slopes(self) -> dict[str, dict[int, float | None]]:
        """Output of a module and weight, as in "head by bias" -> step -> slope of the RMS of ΔW·x = (W - W₀)x."""
        return _each(self.select("own"), "slope")

    @property
    def inherited_slopes(self) -> dict[str, dict[int, float | None]]:
        """Output of a module with weights -> step -> slope of the RMS of W₀(x - x₀)."""
        return _each(self.select("inherited"), "slope")

    @property
    def predicted(self) -> dict[str, dict[int, float | None]]:
        """The exponents theory gives for `slopes`: those of the check's `flow`, or without one 0 for every change and None at init."""
        return _each(self.select("activation", "change"), "predicted")

    @property
    def norm_slopes(self) -> dict[str, dict[int, float | None]]:
        """Weight -> step -> slope: at step 0 of ‖W‖₂, later of ‖ΔW‖₂ since init."""
        return _each(self.select("weight", "update"), "slope")

    @property
    def outcomes(self) -> tuple[tuple[Series, Outcome], ...]:
        """Every series that is judged, with what is found."""
        return tuple((series, self._outcome(found)) for series, found in self._judged())

    @property
    def failures(self) -> tuple[Series, ...]:
        """The series whose predicted exponent is excluded, or that are not finite."""
        return tuple(series for series, outcome in self.outcomes if outcome == "failed")

    @property
    def undecided(self) -> tuple[Series, ...]:
        """The series that are not measured well enough to tell whether the predicted exponent or another one is right."""
        return tuple(series for series, outcome in self.outcomes if outcome == "undecided")

    @property
    def missed(self) -> tuple[Series, ...]:
        """The series that are not where they should be: excluded, or farther than `tolerance` by their best estimate."""
        return tuple(series for series, found in self._judged() if self._outcome(found) == "failed" or abs(found.best) > self.tolerance)

    @property
    def outcome(self) -> Outcome:
        """That of the worst series; "failed" if nothing changed, so that nothing was checked."""
        if self.failures or not self._checked:
            return "failed"
        return "undecided" if self.undecided else "passed"

    @property
    def passed(self) -> bool:
        """Whether every series that is judged is where it should be, by its best estimate, and something changed."""
        return self._checked and not self.missed

    @property
    def _checked(self) -> bool:
        return any(series.quantity == "change" for series, _ in self.outcomes)

    def _judged(self) -> list[tuple[Series, _Deviation]]:
        """Every series that is judged, with where it is beside its prediction."""
        own: dict[tuple[str, int], list[Series]] = defaultdict(list)
        frobenius: dict[tuple[str, int], Series] = {}
        for series in self.series:
            if series.quantity == "own":
                own[module_of(series.name), series.step].append(series)
            if series.quantity == "frobenius":
                frobenius[series.name, series.step] = series
        judged: list[tuple[Series, _Deviation]] = []
        for series in self.series:
            found = _Deviation.of(series)
            beside = frobenius.get((series.name, series.step))
            if series.quantity == "change" and series.predicted is not None and series.slope is not None:
                judged.append((series, _with_own(series, own[series.name, series.step])))
            elif series.quantity == "own" and found is not None:
                judged.append((series, found.surely(low=False)))
            elif series.quantity in {"weight", "update"} and found is not None:
                other = _Deviation.of(beside) if beside is not None else None
                if beside is None or other is None:
                    judged.append((series, found.surely()))
                elif series.quantity == "weight" or abs(other.best) < abs(found.best):
                    judged.append((beside, other))
                else:
                    judged.append((series, found))
        return judged

    def _outcome(self, found: _Deviation) -> Outcome:
        if found.low > self.tolerance or found.high < -self.tolerance:
            return "failed"
        return "passed" if max(-found.low, found.high) <= self.tolerance else "undecided"

    def __str__(self) -> str:
        later = [step for step in self.steps if step]
        marks = {(series.name, series.quantity == "change"): "?" for series in self.undecided}
        marks |= {(series.name, series.quantity == "change"): "✗" for series in self.missed}
        each = any(series.predicted is not None for series in self.series if series.quantity == "activation")
        rows = [["slope of log2 RMS" + " (predicted)" * each, "at init", *(f"Δ, step {step}" for step in later)]]
        rows += [] if each else [["predicted", "0 or -1/2", *("0" for _ in later)]]
        for name, slopes in self.slopes.items():
            beside = [f" ({_exponent(self.predicted[name].get(step))})" if each else "" for step in self.steps]
            cells = [_signed(slopes.get(step)) + text for step, text in zip(self.steps, beside, strict=True)]
            rows.append([name, *cells, marks.get((name, True), "")])
        parts = [["of which ΔW·x, by weight", *(f"step {step}" for step in later)]]
        for name, slopes in self.own_slopes.items():
            parts.append([name, *(_signed(slopes.get(step)) for step in later)])
        rest = [["and inherited, W₀(x-x₀)", *(f"step {step}" for step in later)]]
        rest += [[name, *(_signed(slopes.get(step)) for step in later)] for name, slopes in self.inherited_slopes.items()]
        norms = [["slope of log2 ‖·‖₂", "W", *(f"ΔW, step {step}" for step in later), "predicted"]]
        for name, by_step in self.select("weight", "update").items():
            cells = [_signed(by_step[step].slope) for step in self.steps]
            norms.append([name, *cells, _exponent(by_step[0].predicted), marks.get((name, False), "")])
        blocks = [_columns(block) for block in (rows, parts, rest, norms) if len(block) > 1]
        return "\n\n".join((*blocks, f"{self.verdict}\n{self.conditions}"))

    @property
    def verdict(self) -> str:
        """What was found in words, with the series that decide it: norms by step in the order of the model, then changes."""
        judged = len(self.outcomes)
        if not self._checked:
            return "failed: no activation changed, so nothing was checked"
        if not self.missed:
            unsure = len(self.undecided)
            sure = (
                f"{unsure} of them not with 95 % confidence, for which take more seeds or larger widths"
                if unsure
                else "with 95 % confidence"
            )
            return f"passed: {judged} exponents are as predicted, within {self.tolerance:g}, {sure}"
        failed = self.failures
        falls = ((s, _Deviation.of(s)) for s in self.series if s.quantity == "own" and s not in failed)
        off = tuple(series for series, found in falls if found is not None and abs(found.best) > self.tolerance)
        groups = (
            (failed, f"failed: {len(failed)} of {judged} exponents, the predicted one is excluded"),
            (tuple(s for s in self.missed if s not in failed), "not passed, though not excluded: take more seeds or larger widths"),
            (off, "by their weights, in the order of the model"),
        )
        lines = [f"{what}\n" + "\n".join(map(_told, series[:SHOWN])) for series, what in groups if series]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Writes a figure to `path`, one panel per step. `scaling.plots.coordinates` puts several checks into one figure.

        Raises:
            MissingExtra: if matplotlib is not installed.
        """
        from scaling import plots

        plots.coordinates({"": self}, path)


class Assumptions(Measurement):
    """What the derivation assumes of gradients G, measured: each of these is Θ(1) over widths.

    "rank": ‖G‖_*/‖G‖₂ (a low rank makes ⟨G, ΔW⟩ as large as ‖G‖_*‖ΔW‖₂, and all norms of G alike; seed);
    "sign": ‖sign G‖₂/√(fan_in·fan_out) (Adam's row of LEARNING_RATES; seed);
    "gradient": ‖G‖₂/√(fan_in/fan_out) (SGD's row; under a muP parametrization without multipliers; seed);
    "progress": |ΔL| of a step on its own batch.
    """

    def __str__(self) -> str:
        symbols: dict[Quantity, str] = {
            "rank": "‖G‖_*/‖G‖₂",
            "sign": "‖sign G‖₂/√(fan_in·fan_out)",
            "gradient": "‖G‖₂/√(fan_in/fan_out)",
            "progress": "|ΔL| of a step",
        }
        rows = [["", "step", *(f"width {width}" for width in self.widths), "slope", "predicted"]]
        for quantity, symbol in symbols.items():
            rows.append([symbol])
            for series in (series for series in self.series if series.quantity == quantity):
                values = (f"{value:.3g}" for value in series.values)
                rows.append([f"  {series.name}", str(series.step), *values, _signed(series.slope), _exponent(series.predicted)])
        return f"{_columns(rows)}\n\n{self.conditions}"


def module_of(name: str) -> str:
    """The output of which a weight's own part is told: "head" of "head by weight", "" of what is no such name."""
    return name.rpartition(" by ")[0]


class _Deviation(NamedTuple):
    """What is measured less what is predicted: the best estimate and the interval."""

    best: float
    low: float
    high: float

    @classmethod
    def of(cls, series: Series) -> _Deviation | None:
        """Of a series with an exponent and a prediction; None for others."""
        if series.exponent is None or series.interval is None or series.predicted is None or series.slope is None:
            return None
        best = min((value - series.predicted for value in (series.slope, series.exponent) if not math.isnan(value)), key=abs)
        return cls(best, *(end - series.predicted for end in series.interval))

    def surely(self, *, low: bool = True) -> _Deviation:
        """What is off whatever the interval leaves open: its end that is nearer, or 0 if that is inside; with `low=False` only above 0."""
        least = max(self.low, 0.0) + (min(self.high, 0.0) if low else 0.0)
        return _Deviation(least, self.low if low else least, self.high if low else least)


def _with_own(change: Series, own: Sequence[Series]) -> _Deviation:
    """Where a change is; not below the own part of a weight that is most of it at the largest width."""
    found = _Deviation.of(change)
    if found is None:
        # within rounding at some widths: nothing is known; not finite: failed
        finite = all(map(math.isfinite, change.values))
        return _Deviation(math.inf, -math.inf, math.inf) if finite else _Deviation(math.inf, math.inf, math.inf)
    for series in own:
        part = _Deviation.of(series.model_copy(update={"predicted": change.predicted}))
        if part is not None and series.values[-1] >= change.values[-1] / 2:
            found = _Deviation(*(max(value, min(least, 0.0)) for value, least in zip(found, (part.best, part.low, part.low), strict=True)))
    return found


def _told(series: Series) -> str:
    """A series with its exponent beside the predicted one."""
    what = f"  {SYMBOLS[series.quantity, series.step > 0]} of {series.name}" + (f", step {series.step}" if series.step else "")
    if series.interval is None or series.exponent is None or series.slope is None:
        return f"{what}: within rounding at some widths (take a larger learning rate), or not finite"
    low, high = series.interval
    return (
        f"{what}: slope {series.slope:+.2f}, at the largest width {series.exponent:+.2f} ({low:+.2f} to {high:+.2f}), "
        f"predicted {_exponent(series.predicted)}"
    )


def _each(selected: dict[str, dict[int, Series]], field: str) -> dict[str, dict[int, float | None]]:
    return {name: {step: getattr(series, field) for step, series in by_step.items()} for name, by_step in selected.items()}


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _exponent(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _columns(rows: list[list[str]]) -> str:
    """Text in columns: the first one to the left, the others to the right."""
    count = max(map(len, rows))
    rows = [row + [""] * (count - len(row)) for row in rows]
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ("  ".join([row[0].ljust(first), *(cell.rjust(n) for cell, n in zip(row[1:], others, strict=True))]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
