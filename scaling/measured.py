"""What was measured over widths: frozen, printable records with slopes beside the exponents theory gives."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from scaling.records import Record
from scaling.training import Environment, Saved

__all__ = ["Assumptions", "CoordinateCheck", "Measurement", "Quantity", "Series"]

Quantity = Literal["activation", "change", "weight", "update", "rank", "sign", "gradient", "progress"]


class Series(Record):
    """One quantity of one tensor after `step` updates: a value per width, the mean over seeds.

    `slope` is the least-squares slope of log2(value) against log2(width); None where the value is 0 at every width (nothing moved yet,
    THEORY P60), nan where it is 0 at some widths only or not finite. `predicted` is the exponent theory gives; None where it gives none.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    quantity: Quantity
    name: str
    step: int
    values: tuple[float, ...]
    slope: float | None
    predicted: float | None


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
    """How every activation, its change, and the spectral norms of W and ΔW grow with width, beside what theory predicts."""

    tolerance: float

    @property
    def slopes(self) -> dict[str, dict[int, float | None]]:
        """Activation -> step -> slope: at step 0 of its RMS at init, later of the RMS of its change since init."""
        return _each(self.select("activation", "change"), "slope")

    @property
    def predicted(self) -> dict[str, dict[int, float | None]]:
        """The same for the exponents theory gives: those of the check's `flow`, or without one 0 for every change and None at init.

        (At init 0 and -1/2 are both right under the derived rules: THEORY P61.)
        """
        return _each(self.select("activation", "change"), "predicted")

    @property
    def norm_slopes(self) -> dict[str, dict[int, float | None]]:
        """Weight -> step -> slope: at step 0 of ‖W‖₂, later of ‖ΔW‖₂ since init."""
        return _each(self.select("weight", "update"), "slope")

    @property
    def failures(self) -> tuple[Series, ...]:
        """The changes whose slope is farther from 0 than the tolerance."""
        moved = [series for series in self.series if series.quantity == "change" and series.slope is not None]
        return tuple(series for series in moved if not abs(series.slope or 0) <= self.tolerance)

    @property
    def passed(self) -> bool:
        """Whether every activation's change is flat in width. Only changes decide (THEORY P61), and something must have changed."""
        return not self.failures and any(series.quantity == "change" and series.slope is not None for series in self.series)

    def __str__(self) -> str:
        later = [step for step in self.steps if step]
        failed = {series.name for series in self.failures}
        each = any(series.predicted is not None for series in self.series if series.quantity == "activation")
        rows = [["slope of log2 RMS" + " (predicted)" * each, "at init", *(f"Δ, step {step}" for step in later)]]
        rows += [] if each else [["predicted", "0 or -1/2", *("0" for _ in later)]]
        for name, slopes in self.slopes.items():
            beside = [f" ({_exponent(self.predicted[name].get(step))})" if each else "" for step in self.steps]
            cells = [_signed(slopes.get(step)) + text for step, text in zip(self.steps, beside, strict=True)]
            rows.append([name, *cells, "✗" if name in failed else ""])
        norms = [["slope of log2 ‖·‖₂", "W", *(f"ΔW, step {step}" for step in later), "predicted"]]
        for name, by_step in self.select("weight", "update").items():
            norms.append([name, *(_signed(by_step[step].slope) for step in self.steps), _exponent(by_step[0].predicted)])
        if self.passed:
            verdict = f"passed: every change is flat, |slope| ≤ {self.tolerance}"
        elif failed:
            verdict = f"failed: the changes of {len(failed)} of {len(self.slopes)} activations are not flat, |slope| > {self.tolerance}"
        else:
            verdict = "failed: no activation changed, so nothing was checked"
        return "\n\n".join((_columns(rows), _columns(norms), f"{verdict}\n{self.conditions}"))

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
