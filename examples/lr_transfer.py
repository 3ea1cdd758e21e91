"""Does the best learning rate stay where it is as the model grows? Loss against learning rate over an 8x range of widths.

The GPT of gpt.py on Python's own source, with Adam and with Muon, by torch's defaults and by the derived table (arms.py). Every finished
run is written to the JSON at once, a restart goes on with what is missing, and the figure is drawn from the JSON alone.

    python examples/lr_transfer.py              # prints how long it will take
    python examples/lr_transfer.py --plot-only  # redraws the figure
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import product
from pathlib import Path

import torch
from arms import BASE, Build, default, derived, gpt_table, warmup_then_decay
from gpt import GPT, batches

from scaling import plots
from scaling.measure import Environment, LearningRateSweep, Run, learning_rate_sweep
from scaling.records import Record

ARMS = ("Adam, default", "Adam, derived", "Muon, default", "Muon, derived")
WIDTHS = (32, 64, 128, 256)
LOG2_RATES = range(-9, -1)
SEEDS = (0,)
STEPS = 300
OUT = Path(__file__).parent / "results"


class Task(Record):
    """One training run yet to be done."""

    arm: str
    width: int
    log2_rate: int
    seed: int
    steps: int


class Results(Record):
    """What the JSON holds: the finished runs of every arm, and how they were made."""

    steps: int
    base: int
    environment: Environment
    runs: dict[str, tuple[Run, ...]]

    @classmethod
    def empty(cls, steps: int) -> Results:
        """No runs yet."""
        return cls(steps=steps, base=BASE, environment=environment(), runs=dict.fromkeys(ARMS, ()))

    def sweeps(self) -> dict[str, LearningRateSweep]:
        """Arm -> its sweep, for the arms that have runs."""
        of = {arm: runs for arm, runs in self.runs.items() if runs}
        return {arm: LearningRateSweep(steps=self.steps, runs=runs, environment=self.environment) for arm, runs in of.items()}

    def has(self, task: Task) -> bool:
        """Whether the run is finished."""
        key = (task.width, 2.0**task.log2_rate, task.seed)
        return any((run.width, run.learning_rate, run.seed) == key for run in self.runs.get(task.arm, ()))

    def also(self, arm: str, run: Run) -> Results:
        """These results and one more run."""
        return self.model_copy(update={"runs": {**self.runs, arm: (*self.runs.get(arm, ()), run)}})


def tasks_of(arms: Iterable[str], widths: Iterable[int], log2_rates: Iterable[int], seeds: Iterable[int], steps: int) -> list[Task]:
    """All runs of the grid, seed by seed, the longest first."""
    grid = product(seeds, sorted(widths, reverse=True), arms, log2_rates)
    return [Task(arm=arm, width=width, log2_rate=rate, seed=seed, steps=steps) for seed, width, arm, rate in grid]


@cache
def builder(arm: str) -> Build:
    """The arm's `build(width, lr)`."""
    optimizer, kind = arm.lower().split(", ")
    return default(optimizer) if kind == "default" else derived(optimizer, gpt_table())


@cache
def data(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of every run."""
    return batches(steps)


def train(task: Task) -> tuple[str, Run]:
    """Does one run, on one core."""
    torch.set_num_threads(1)
    schedule = warmup_then_decay(task.steps)
    rates = [2.0**task.log2_rate]
    grid = {"steps": task.steps, "seeds": (task.seed,), "schedule": schedule, "progress": None}
    return task.arm, learning_rate_sweep(builder(task.arm), data(task.steps), (task.width,), rates, **grid).runs[0]


def seconds_per_step(arm: str, width: int) -> float:
    """Measured on this machine, one core."""
    task = Task(arm=arm, width=width, log2_rate=-10, seed=0, steps=4)
    train(task.model_copy(update={"steps": 1}))
    return train(task)[1].seconds / 4


def finished(tasks: list[Task], workers: int) -> Iterator[tuple[str, Run]]:
    """The runs as they finish, in processes of their own."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, task) for task in tasks]):
            yield future.result()


def main(arguments: Iterable[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of lr_transfer.json and lr_transfer.png")
    parser.add_argument("--plot-only", action="store_true", help="redraw the figure from the JSON")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    options = parser.parse_args([*arguments])
    path: Path = options.out / "lr_transfer.json"
    results = loaded(path, None if options.plot_only else options.steps)
    if not options.plot_only:
        tasks = tasks_of(options.arms, options.widths, LOG2_RATES, options.seeds, options.steps)
        results = run([task for task in tasks if not results.has(task)], results, path, options.workers)
    sweeps = results.sweeps()
    plots.learning_rates(sweeps, path.with_suffix(".png"))
    for arm, sweep in sweeps.items():
        print(f"\n{arm}\n{sweep}")
    print(f"\nfigure: {path.with_suffix('.png')}")


def loaded(path: Path, steps: int | None) -> Results:
    """The results in the JSON, of so many steps; or, if there is none, empty ones."""
    if path.exists():
        results = Results.model_validate_json(path.read_text())
        if steps is None or (results.steps, results.base) == (steps, BASE):
            return results
        sys.exit(
            f"{path} has runs of {results.steps} steps, base {results.base}; these would be of {steps}, base {BASE}: choose another --out"
        )
    if steps is None:
        sys.exit(f"{path} is not there: run without --plot-only first")
    return Results.empty(steps)


def run(tasks: list[Task], results: Results, path: Path, workers: int) -> Results:
    """The results with all tasks done, written to `path` after each."""
    costs = {key: seconds_per_step(*key) for key in {(task.arm, task.width): None for task in tasks}}
    seconds = sum(costs[task.arm, task.width] * task.steps for task in tasks) / workers
    print(f"{len(tasks)} runs to do, about {seconds / 60:.0f} minutes with {workers} workers", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    for count, (arm, made) in enumerate(finished(tasks, workers), 1):
        results = results.also(arm, made)
        partial = path.with_suffix(".partial")
        partial.write_text(results.model_dump_json(indent=1))
        partial.replace(path)
        where = f"{arm}  width {made.width:>3}  lr 2^{math.log2(made.learning_rate):.0f}  seed {made.seed}"
        print(f"[{count:>3}/{len(tasks)}] {where}  loss {made.loss:.3f}  ({(time.perf_counter() - begun) / 60:.1f} min)", flush=True)
    return results


def environment() -> Environment:
    """This machine, and the commit that runs."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return Environment.of(GPT(BASE)).model_copy(update={"commit": commit})


if __name__ == "__main__":
    main(sys.argv[1:])
