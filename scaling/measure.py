"""The exponents that `derive` states, measured on models that train: coordinate check, norms of weights and gradients.

Every function builds the user's own models at several widths, trains them for a few steps and fits log2 of what it measured against
log2 of the width. Numbers are means over seeds. The caller's random state is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice, product
from statistics import fmean, linear_regression
from typing import Any

from torch import nn

from scaling.errors import CannotMeasure
from scaling.flow import Flow, predicted_slopes
from scaling.maps import GRADIENT, WeightMaps, predicted_norms
from scaling.measured import Assumptions, CoordinateCheck, Measurement, Quantity, Series, module_of
from scaling.probe import Probe, changes, neutral, rms
from scaling.records import ScalingTable
from scaling.sweep import LearningRateSweep, Run, learning_rate_sweep
from scaling.training import Environment, Loss, Optimizer, backward, built, cross_entropy, seeded, update
from scaling.trend import SPACING, trend

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
Key = tuple[Quantity, str, int]


def coordinate_check(
    build: Build,
    batches: Iterable[Any],
    widths: Sequence[int],
    *,
    steps: Collection[int] = (1, 5),
    seeds: Collection[int] = (0, 1, 2),
    loss: Loss = cross_entropy,
    tolerance: float = SPACING / 2,
    table: ScalingTable | None = None,
    flow: Flow | None = None,
) -> CoordinateCheck:
    """Trains a model of each width for a few steps; fits how its activations, their changes and its weights' norms grow with width.

    Before training and after each of `steps` updates the first batch is run without gradients, in the mode the model is in and with the
    same random numbers (so dropout masks do not change; buffers are put back). Every floating-point tensor with axes that a module
    returns is compared with what it was at init; several calls of one module are kept apart. A module with weights of its own is also
    run on the same inputs x with each of them put back to what it was at init: what that takes away is the weight's own part of the change,
    ΔW·x = (W - W₀)x; with all of them put back the rest is inherited, W₀(x - x₀). With a learning rate so small that activations move by
    less than 3 % the check says little.

    `CoordinateCheck` says what is judged and how. Without a table it is the changes: the classical check, to which a learning rate that is
    too small for one weight of many is no miss. With the table the norms of W and ΔW are judged too, and find it.

    Args:
        build: width -> (model, optimizer), new ones each time. torch's generators are seeded before each call.
        batches: what `loss` takes, on the model's device: the first max(steps) are used, or fewer in turn.
        widths: at least two.
        steps: numbers of updates after which to measure.
        seeds: one model per width and seed.
        loss: (model, batch) -> scalar tensor.
        tolerance: how far from the predicted exponent a measured one may be; 1/4 is half way to the nearest other one. With several seeds
            and large widths a smaller one can be asked for (0.15 with four seeds and widths up to 1024).
        table: the model's. Norms are then those of each map (block, copy) of a weight, the largest copy's, beside the predicted
            exponent of √(fan_out/fan_in), and judged; without it they are of the weight as a matrix, its first axis × the others, and not.
        flow: what `scaling.flow` predicts of the parametrization that `build` applies. Without it, and where it does not tell of the
            derived rules, the prediction is theirs, 0 for every change.

    Raises:
        CannotMeasure: if there is nothing to compare, or `build` or `batches` is not what it should be.
    """
    steps = tuple(sorted({0, *steps}))
    given = _taken(batches, widths, seeds, steps[-1])

    def measure(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[Key, float]]:
        weights = WeightMaps(model, table)
        start = weights.values()
        probe = Probe(model, lambda: loss(model, given[0]), {weights.trainable[name]: value for name, value in start.items()})
        begun = probe.outputs()
        yield from _tagged("activation", 0, ((name, rms(tensor)) for name, tensor in begun.items()))
        yield from _tagged("weight", 0, weights.norms(start))
        yield from _tagged("frobenius", 0, weights.frobenius(start))
        for step in range(1, steps[-1] + 1):
            update(model, optimizer, given[(step - 1) % len(given)], loss)
            if step in steps:
                moved = {name: value - start[name] for name, value in weights.values().items()}
                seen = probe.replayed()
                yield from _tagged("update", step, weights.norms(moved))  # first, as they name the rule at fault
                yield from _tagged("frobenius", step, weights.frobenius(moved, rank=1))
                yield from _tagged("change", step, changes(begun, seen.outputs))
                yield from _tagged("own", step, seen.own)
                yield from _tagged("inherited", step, changes(begun, seen.inherited))

    runs, environment = _over_widths(build, widths, seeds, measure)
    series, skipped = _series(runs, _predictions(table, flow))
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
    """What Su (2025, Higher-order MuP) assumes of gradients, measured for every weight with two fans above 1: see `Assumptions`.

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
        weights = WeightMaps(model, table)
        for step in range(steps[-1] + 1):
            batch = given[step % len(given)]
            before = _value(model, batch, loss)
            backward(model, optimizer, batch, loss)
            if step in steps:
                matrices = [(name, maps) for name, maps in weights.maps(weights.gradients()) if min(maps.shape[1:]) > 1]
                for quantity, of in GRADIENT.items():
                    yield from _tagged(quantity, step, ((name, of(maps)) for name, maps in matrices))
            optimizer.step()
            if step in steps:
                yield from _tagged("progress", step, [("loss", abs(_value(model, batch, loss) - before))])

    runs, environment = _over_widths(build, widths, seeds, measure)
    series, skipped = _series(runs, lambda _: 0.0)
    return Assumptions(widths=tuple(widths), steps=steps, seeds=tuple(seeds), series=series, skipped=skipped, environment=environment)


def _tagged(quantity: Quantity, step: int, values: Iterable[tuple[str, float]]) -> Iterator[tuple[Key, float]]:
    return (((quantity, name, step), value) for name, value in values)


def _value(model: nn.Module, batch: Any, loss: Loss) -> float:
    with neutral(model):
        return float(loss(model, batch))


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


def _predictions(table: ScalingTable | None, flow: Flow | None) -> Callable[[Key], float | None]:
    """(quantity, name, step) -> the exponent theory gives, or None."""
    slopes = predicted_slopes(flow) if flow is not None else {}
    derived = flow is None or not flow.parametrization
    norms = predicted_norms(table) if derived else {}

    def predicted(key: Key) -> float | None:
        quantity, name, step = key
        if quantity in {"weight", "update", "frobenius"}:
            return norms.get(name)
        if quantity == "own":
            return 0.0 if derived else None
        exponent = slopes.get(name, {}).get(min(step, 2)) if quantity != "inherited" else None
        if exponent is not None and exponent.is_finite:
            return float(exponent)
        return 0.0 if quantity == "change" and derived else None

    return predicted


def _series(
    runs: dict[int, list[dict[Key, float]]], predicted: Callable[[Key], float | None]
) -> tuple[tuple[Series, ...], tuple[str, ...]]:
    """The series of what every run has, and the names of what only some have."""
    every = [run for of_width in runs.values() for run in of_width]
    keys = [key for key in every[0] if all(key in run for run in every)]
    skipped = dict.fromkeys(module_of(key[1]) or key[1] for run in every for key in run if key not in set(keys))
    series = []
    for key in keys:
        samples = tuple(tuple(run[key] for run in of_width) for of_width in runs.values())
        values = tuple(map(fmean, samples))
        wanted = predicted(key)
        found = trend(tuple(runs), [[value for value in of_width if value] for of_width in samples], wanted) if wanted is not None else None
        quantity, name, step = key
        series.append(
            Series(
                quantity=quantity,
                name=name,
                step=step,
                values=values,
                samples=samples,
                slope=_fitted(tuple(runs), values),
                predicted=wanted,
                exponent=found.exponent if found else None,
                interval=(found.low, found.high) if found else None,
            )
        )
    return tuple(series), tuple(skipped)


def _fitted(widths: Sequence[int], values: Sequence[float]) -> float | None:
    if not any(values):
        return None
    if not all(0 < value < math.inf for value in values):
        return math.nan
    return linear_regression([math.log2(width) for width in widths], [math.log2(value) for value in values]).slope
