"""Loss against learning rate at several widths: where the optimum lies, and how far it drifts."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice, product
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ConfigDict
from torch import nn

from scaling.errors import CannotMeasure
from scaling.records import Record
from scaling.training import Environment, Loss, Saved, built, cross_entropy, seeded, update

__all__ = ["LearningRateSweep", "Run", "learning_rate_sweep"]

Build = Callable[[int, float], tuple[nn.Module, Any]]
Progress = Callable[["Run", int, int], None]


class Run(Record):
    """One training run; `loss` is the mean of the last training losses, inf if the run diverged."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    width: int
    learning_rate: float
    seed: int
    loss: float
    seconds: float


class LearningRateSweep(Saved):
    """Training runs over widths × learning rates × seeds, all of `steps` steps on the same batches."""

    steps: int
    runs: tuple[Run, ...]
    environment: Environment

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths, ascending."""
        return tuple(sorted({run.width for run in self.runs}))

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The grid, ascending."""
        return tuple(sorted({run.learning_rate for run in self.runs}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, ascending."""
        return tuple(sorted({run.seed for run in self.runs}))

    def losses(self, width: int) -> dict[float, float]:
        """Learning rate -> final loss at this width, the mean over seeds; inf where a run diverged."""
        found = {lr: [run.loss for run in self.runs if (run.width, run.learning_rate) == (width, lr)] for lr in self.learning_rates}
        return {lr: fmean(losses) for lr, losses in found.items() if losses}

    @property
    def optima(self) -> dict[int, float]:
        """Width -> the learning rate of the grid with the least loss; widths at which every run diverged are left out."""
        best = {width: min(self.losses(width).items(), key=lambda item: item[1]) for width in self.widths}
        return {width: lr for width, (lr, loss) in best.items() if loss < math.inf}

    @property
    def fitted_optima(self) -> dict[int, float]:
        """Width -> the minimum of the parabola in log2(learning rate) through the optimum and its two neighbours on the grid.

        An optimum at the grid's edge, or beside a run that diverged, is left as it is.
        """
        return {width: _vertex(self.losses(width), lr) for width, lr in self.optima.items()}

    @property
    def drift(self) -> int:
        """How many steps of the grid the optimum moves over the widths: 0 where it is the same at all of them."""
        places = [self.learning_rates.index(lr) for lr in self.optima.values()]
        return max(places, default=0) - min(places, default=0)

    @property
    def at_edge(self) -> tuple[int, ...]:
        """The widths whose optimum is the grid's first or last learning rate: there the true one may lie outside."""
        return tuple(width for width, lr in self.optima.items() if lr in (self.learning_rates[0], self.learning_rates[-1]))

    def __str__(self) -> str:
        head = f"{'width':>8}  {'best lr':>10}  {'fitted':>10}  {'loss':>7}"
        lines = [
            f"{width:>8}  {lr:>10.3g}  {self.fitted_optima[width]:>10.3g}  {self.losses(width)[lr]:>7.3f}"
            for width, lr in self.optima.items()
        ]
        drift = f"the optimum moves by {self.drift} step{'s' * (self.drift != 1)} of the grid"
        if self.at_edge:
            drift += f"; it is at the grid's edge at width {', '.join(map(str, self.at_edge))}"
        lost = [str(width) for width in self.widths if width not in self.optima]
        if lost:
            drift += f"; every run diverged at width {', '.join(lost)}"
        conditions = (
            f"{self.steps} steps; seeds {', '.join(map(str, self.seeds))}; {self.environment.device}, torch {self.environment.torch}"
        )
        return "\n".join((head, *lines, drift, conditions))

    def plot(self, path: str | Path) -> None:
        """Writes a figure to `path`. `scaling.plots.learning_rates` puts several sweeps into one figure.

        Raises:
            MissingExtra: if matplotlib is not installed.
        """
        from scaling import plots

        plots.learning_rates({"": self}, path)


def show(run: Run, done: int, total: int) -> None:
    """One line on stderr per finished run."""
    rate = f"2^{math.log2(run.learning_rate):.3g}"
    sys.stderr.write(f"[{done:>3}/{total}] width {run.width:>5}  lr {rate:>7}  seed {run.seed}  loss {run.loss:.3f}  {run.seconds:.1f} s\n")


def learning_rate_sweep(
    build: Build,
    batches: Iterable[Any],
    widths: Sequence[int],
    learning_rates: Sequence[float],
    *,
    steps: int,
    seeds: Collection[int] = (0,),
    loss: Loss = cross_entropy,
    schedule: Callable[[int], float] | None = None,
    last: int | None = None,
    progress: Progress | None = show,
) -> LearningRateSweep:
    """Trains a model for every width, learning rate and seed, on the same batches in the same order.

    Args:
        build: (width, learning rate) -> (model, optimizer), new ones each time. torch's generators are seeded before each call.
        batches: what `loss` takes, on the model's device: the first `steps` are used, or fewer in turn.
        widths: the widths.
        learning_rates: the grid, usually in factors of two.
        steps: updates per run.
        seeds: one run per width, learning rate and seed.
        loss: (model, batch) -> scalar tensor.
        schedule: step (from 0) -> factor on every param group's initial learning rate; None keeps it constant.
        last: the final loss is the mean over this many last steps; None takes a tenth of them.
        progress: called with (run, number done, number in all) after each run; `show` writes a line to stderr, None is silent.

    Raises:
        CannotMeasure: if there is nothing to train, or `build` or `batches` is not what it should be.
    """
    given = list(islice(batches, steps))
    for name, values in {"batches": given, "widths": widths, "learning_rates": learning_rates, "seeds": seeds}.items():
        if not values:
            what = f"{name} is empty"
            raise CannotMeasure(what, "pass at least one")
    if not all(0 < lr < math.inf for lr in learning_rates):
        what = f"learning_rates={list(learning_rates)} are not all positive numbers"
        raise CannotMeasure(what, "pass for example [2.0**-k for k in range(4, 12)]")
    todo = list(product(widths, learning_rates, seeds))
    runs: list[Run] = []
    environments: list[Environment] = []
    for width, lr, seed in todo:
        begun = time.perf_counter()
        with seeded(seed):
            model, optimizer = built(build, width, lr)
            environments.append(Environment.of(model))
            final = _train(model, optimizer, given, steps, loss, schedule, last or max(1, steps // 10))
        runs.append(Run(width=width, learning_rate=lr, seed=seed, loss=final, seconds=time.perf_counter() - begun))
        if progress:
            progress(runs[-1], len(runs), len(todo))
    return LearningRateSweep(steps=steps, runs=tuple(runs), environment=environments[0])


def _train(model: nn.Module, optimizer: Any, batches: list, steps: int, loss: Loss, schedule: Callable | None, last: int) -> float:
    initial = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = lr * (schedule(step) if schedule else 1.0)
        losses.append(float(update(model, optimizer, batches[step % len(batches)], loss)))
        if not math.isfinite(losses[-1]):
            return math.inf
    return fmean(losses[-last:])


def _vertex(losses: dict[float, float], lr: float) -> float:
    rates = sorted(losses)
    place = rates.index(lr)
    if place in (0, len(rates) - 1):
        return lr
    x0, x1, x2 = (math.log2(rate) for rate in rates[place - 1 : place + 2])
    y0, y1, y2 = (losses[rate] for rate in rates[place - 1 : place + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if not right - left > 0 or not math.isfinite(right - left):
        return lr
    # the parabola's derivative is `left` and `right` at the two midpoints
    return 2.0 ** ((x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left))
