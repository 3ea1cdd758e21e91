"""The exponents that `derive` states, measured on models that train: coordinate check, norms of weights and gradients.

Every function builds the user's own models at several widths, trains them for a few steps and fits log2 of what it measured against
log2 of the width. Numbers are means over seeds. The caller's random state is left alone.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice, product
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any, Literal, Self

import sympy
import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from scaling.errors import CannotMeasure
from scaling.limits import WIDTH, exponent
from scaling.records import Block, Record, ScalingTable
from scaling.sweep import LearningRateSweep, Run, learning_rate_sweep
from scaling.training import Environment, Loss, Optimizer, backward, built, cross_entropy, seeded, update

__all__ = [
    "Assumptions",
    "CoordinateCheck",
    "Environment",
    "LearningRateSweep",
    "Measurement",
    "Run",
    "Series",
    "assumptions",
    "coordinate_check",
    "cross_entropy",
    "learning_rate_sweep",
]

Build = Callable[[int], tuple[nn.Module, Any]]
Quantity = Literal["activation", "change", "weight", "update", "rank", "sign", "gradient", "progress"]
Key = tuple[Quantity, str, int]


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


class Measurement(Record):
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

    def to_json(self) -> str:
        """All of it as JSON; `from_json` is the inverse."""
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The measurement that `to_json` wrote.

        Raises:
            pydantic.ValidationError: if the text is not one.
        """
        return cls.model_validate_json(text)

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
        """The same for the exponents theory gives: 0 for every change; None at init, where 0 and -1/2 are both right (THEORY P61)."""
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
        rows = [["slope of log2 RMS", "at init", *(f"Δ, step {step}" for step in later)], ["predicted", "0 or -1/2", *("0" for _ in later)]]
        for name, slopes in self.slopes.items():
            rows.append([name, *(_signed(slopes.get(step)) for step in self.steps), "✗" if name in failed else ""])
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


def coordinate_check(
    build: Build,
    batches: Iterable[Any],
    widths: Sequence[int],
    *,
    steps: Collection[int] = (1, 5),
    seeds: Collection[int] = (0, 1, 2),
    loss: Loss = cross_entropy,
    tolerance: float = 0.15,
    table: ScalingTable | None = None,
) -> CoordinateCheck:
    """Trains a model of each width for a few steps; fits how its activations, their changes and its weights' norms grow with width.

    Before training and after each of `steps` updates the first batch is run without gradients, in the mode the model is in and with the
    same random numbers (so dropout masks do not change; buffers are put back). Every floating-point tensor with axes that a module
    returns is compared with what it was at init; several calls of one module are kept apart. With a learning rate so small that
    activations move by less than 3 % the check says little (THEORY 6.1).

    Args:
        build: width -> (model, optimizer), new ones each time. torch's generators are seeded before each call.
        batches: what `loss` takes, on the model's device: the first max(steps) are used, or fewer in turn.
        widths: at least two.
        steps: numbers of updates after which to measure.
        seeds: one model per width and seed.
        loss: (model, batch) -> scalar tensor.
        tolerance: the largest |slope| of a change that passes; 0.15 suits widths 64 to 1024 (THEORY 6.1).
        table: the model's. Norms are then those of each map (block, copy) of a weight, the largest copy's, beside the predicted
            exponent of √(fan_out/fan_in); without it they are of the weight as a matrix, its first axis × the others.

    Raises:
        CannotMeasure: if there is nothing to compare, or `build` or `batches` is not what it should be.
    """
    steps = tuple(sorted({0, *steps}))
    given = _taken(batches, widths, seeds, steps[-1])

    def measure(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[Key, float]]:
        weights = _Weights(model, table)
        probe, start = _outputs(model, given[0], loss), weights.values()
        yield from _tagged("activation", 0, ((name, _rms(tensor)) for name, tensor in probe.items()))
        yield from _tagged("weight", 0, weights.norms(start))
        for step in range(1, steps[-1] + 1):
            update(model, optimizer, given[(step - 1) % len(given)], loss)
            if step in steps:
                moved = {name: value - start[name] for name, value in weights.values().items()}
                yield from _tagged("change", step, _changes(probe, _outputs(model, given[0], loss)))
                yield from _tagged("update", step, weights.norms(moved))

    runs, environment = _over_widths(build, widths, seeds, measure)
    norms = _predicted_norms(table)
    series, skipped = _series(runs, lambda key: 0.0 if key[0] == "change" else norms.get(key[1]))
    return CoordinateCheck(
        widths=tuple(widths),
        steps=steps,
        seeds=tuple(seeds),
        series=series,
        skipped=skipped,
        environment=environment,
        tolerance=tolerance,
    )


def assumptions(
    build: Build,
    batches: Iterable[Any],
    widths: Sequence[int],
    *,
    steps: Collection[int] = (0, 4),
    seeds: Collection[int] = (0, 1, 2),
    loss: Loss = cross_entropy,
    table: ScalingTable | None = None,
) -> Assumptions:
    """The seed's assumptions on gradients, measured for every weight with two fans above 1: see `Assumptions` for the quantities.

    Args:
        build: width -> (model, optimizer), new ones each time. torch's generators are seeded before each call.
        batches: what `loss` takes, on the model's device: the first max(steps) + 1 are used, or fewer in turn.
        widths: at least two.
        steps: numbers of updates before the gradient is looked at; `steps=(0,)` is the gradient at init.
        seeds: one model per width and seed.
        loss: (model, batch) -> scalar tensor.
        table: the model's; says which axes of a weight are fan_in and fan_out. Without it a weight is (fan_out, fan_in, …) as in torch.

    Raises:
        CannotMeasure: if there is nothing to compare, or `build` or `batches` is not what it should be.
    """
    steps = tuple(sorted(set(steps)))
    given = _taken(batches, widths, seeds, 1 + max(steps, default=-1))

    def measure(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[Key, float]]:
        weights = _Weights(model, table)
        for step in range(steps[-1] + 1):
            batch = given[step % len(given)]
            before = _value(model, batch, loss)
            backward(model, optimizer, batch, loss)
            if step in steps:
                matrices = [(name, maps) for name, maps in weights.maps(weights.gradients()) if min(maps.shape[1:]) > 1]
                for quantity, of in _GRADIENT.items():
                    yield from _tagged(quantity, step, ((name, of(maps)) for name, maps in matrices))
            optimizer.step()
            if step in steps:
                yield from _tagged("progress", step, [("loss", abs(_value(model, batch, loss) - before))])

    runs, environment = _over_widths(build, widths, seeds, measure)
    series, skipped = _series(runs, lambda _: 0.0)
    return Assumptions(widths=tuple(widths), steps=steps, seeds=tuple(seeds), series=series, skipped=skipped, environment=environment)


class _Weights:
    """A model's trainable weights, each as the linear maps it is: (copies, fan_out, fan_in)."""

    def __init__(self, model: nn.Module, table: ScalingTable | None) -> None:
        self.trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.table = table
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
        self.size = table.size_of(shapes) if table else 0

    def values(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.trainable.items()}

    def gradients(self) -> dict[str, Tensor]:
        return {name: weight.grad for name, weight in self.trainable.items() if weight.grad is not None}

    def maps(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if self.table is None or name not in self.table:
                yield name, tensor.reshape(1, len(tensor) if tensor.ndim else 1, -1)
            else:
                yield from ((label, _map(tensor, block, self.size)) for label, block in _blocks(name, self.table))

    def norms(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
        """‖·‖₂ of every map, the largest copy's."""
        return ((name, float(_norms(maps).max())) for name, maps in self.maps(tensors))


def _blocks(name: str, table: ScalingTable) -> list[tuple[str, Block]]:
    blocks = table[name].blocks
    return [(f"{name} block {i}" if len(blocks) > 1 else name, block) for i, block in enumerate(blocks)]


def _predicted_norms(table: ScalingTable | None) -> dict[str, float]:
    if table is None:
        return {}
    return {label: float(exponent(block.spectral_norm)) for rule in table for name in rule.names for label, block in _blocks(name, table)}


def _map(weight: Tensor, block: Block, size: int) -> Tensor:
    """The block as (copies, fan_out, fan_in); each looked-up index is a map of its own, from one number to fan_out."""
    factors = [factor for axis in block.axes for factor in axis]
    extents = [slice(_at(factor.start, size), _at(factor.stop, size)) for factor in factors]
    part = weight.reshape([_at(factor.size, size) for factor in factors])[tuple(extents)]
    kinds = (("copy", "lookup"), ("out",), ("in",))
    order = [[i for i, factor in enumerate(factors) if factor.part in kind] for kind in kinds]
    return part.permute([*chain(*order)]).reshape([math.prod(part.shape[i] for i in axes) for axes in order])


def _at(expression: sympy.Expr, size: int) -> int:
    return int(expression.subs(WIDTH, size))


def _norms(maps: Tensor) -> Tensor:
    """Every copy's ‖·‖₂."""
    return torch.linalg.matrix_norm(_full(maps), 2)


def _rank(G: Tensor) -> float:
    """‖G‖_*/‖G‖₂, the largest copy's; 0 for G = 0."""
    return float(torch.nan_to_num(torch.linalg.matrix_norm(_full(G), "nuc") / _norms(G)).max())


def _sign(G: Tensor) -> float:
    """‖sign G‖₂/√(fan_in·fan_out), the largest copy's."""
    return float(_norms(G.sign()).max()) / math.sqrt(G.shape[1] * G.shape[2])


def _size(G: Tensor) -> float:
    """copies·‖G‖₂/√(fan_in/fan_out), the largest copy's: each of `copies` maps sees 1/copies of the gradient."""
    copies, fan_out, fan_in = G.shape
    return copies * float(_norms(G).max()) / math.sqrt(fan_in / fan_out)


_GRADIENT: dict[Quantity, Callable[[Tensor], float]] = {"rank": _rank, "sign": _sign, "gradient": _size}
"""The quantities of `Assumptions` that are functions of a gradient (copies, fan_out, fan_in)."""


def _tagged(quantity: Quantity, step: int, values: Iterable[tuple[str, float]]) -> Iterator[tuple[Key, float]]:
    return (((quantity, name, step), value) for name, value in values)


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _rms(tensor: Tensor) -> float:
    return float(_full(tensor).square().mean().sqrt())


def _changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """RMS of the difference of every tensor that is in both with the same shape; 0 where it is within rounding."""
    for name, old in before.items():
        if name in after and after[name].shape == old.shape:
            change, rounding = _rms(_full(after[name]) - _full(old)), 4 * torch.finfo(old.dtype).eps * _rms(old)
            yield name, 0.0 if change <= rounding else change


@contextmanager
def _neutral(model: nn.Module) -> Iterator[None]:
    """No gradients, the same random numbers each time, and buffers (BatchNorm's statistics) put back."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), seeded(0):
        yield
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def _value(model: nn.Module, batch: Any, loss: Loss) -> float:
    with _neutral(model):
        return float(loss(model, batch))


def _outputs(model: nn.Module, batch: Any, loss: Loss) -> dict[str, Tensor]:
    """Every floating-point tensor with axes that a module returns while the loss is computed."""
    outputs: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            calls[name] += 1
            label = f"{name} call {calls[name]}" if calls[name] > 1 else name
            outputs.update((label + path, tensor.detach().clone()) for path, tensor in _tensors(output))

        return hook

    handles = [module.register_forward_hook(record(name or "(model)")) for name, module in model.named_modules()]
    try:
        with _neutral(model):
            loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _tensors(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.ndim and output.numel():
            yield path, output
    elif isinstance(output, (Mapping, tuple, list)):
        for key, value in output.items() if isinstance(output, Mapping) else enumerate(output):
            yield from _tensors(value, f"{path}[{key}]")


def _taken(batches: Iterable[Any], widths: Sequence[int], seeds: Collection[int], steps: int) -> list[Any]:
    if len(set(widths)) < 2 or min(widths) < 1:
        what = f"widths={list(widths)} has no two widths to compare"
        raise CannotMeasure(what, "pass at least two, as widths=(64, 128, 256)")
    if not seeds:
        raise CannotMeasure("seeds is empty", "pass at least one, as seeds=(0,)")
    if steps < 1:
        raise CannotMeasure("steps asks for no update", "pass at least one, as steps=(1, 5)")
    taken = list(islice(batches, steps))
    if not taken:
        raise CannotMeasure("batches is empty", "pass at least one batch, of what the loss takes")
    return taken


def _over_widths(
    build: Build,
    widths: Sequence[int],
    seeds: Collection[int],
    measure: Callable[[nn.Module, Optimizer], Iterator[tuple[Key, float]]],
) -> tuple[dict[int, list[dict[Key, float]]], Environment]:
    """`measure` of a new model for every width and seed."""
    runs: dict[int, list[dict[Key, float]]] = {width: [] for width in widths}
    environment: list[Environment] = []
    for width, seed in product(widths, seeds):
        with seeded(seed):
            model, optimizer = built(build, width)
            runs[width].append(dict(measure(model, optimizer)))
            environment.append(Environment.of(model))
    return runs, environment[0]


def _series(
    runs: dict[int, list[dict[Key, float]]], predicted: Callable[[Key], float | None]
) -> tuple[tuple[Series, ...], tuple[str, ...]]:
    """The series of what every run has, and the names of what only some have."""
    every = [run for of_width in runs.values() for run in of_width]
    keys = [key for key in every[0] if all(key in run for run in every)]
    skipped = dict.fromkeys(key[1] for run in every for key in run if key not in set(keys))
    series = []
    for key in keys:
        values = tuple(fmean(run[key] for run in of_width) for of_width in runs.values())
        quantity, name, step = key
        slope = _fitted(tuple(runs), values)
        series.append(Series(quantity=quantity, name=name, step=step, values=values, slope=slope, predicted=predicted(key)))
    return tuple(series), tuple(skipped)


def _fitted(widths: Sequence[int], values: Sequence[float]) -> float | None:
    if not any(values):
        return None
    if not all(0 < value < math.inf for value in values):
        return math.nan
    return linear_regression([math.log2(width) for width in widths], [math.log2(value) for value in values]).slope


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
