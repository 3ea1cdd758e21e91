"""Derive a small GPT's scaling table, train it at several widths by default and by the table, and see whether the optimum stays.

    python examples/quickstart.py           # a few minutes on 2 cores
    python examples/quickstart.py --smoke   # under a minute: everything runs, too short to show much

Writes loss_vs_lr.png (and the runs behind it, .json) and coordinate_check.png.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

import torch
from arms import default, derived, gpt_table
from gpt import batches
from lr_transfer import ARMS, Results, run, tasks_of

from scaling import plots
from scaling.measure import CoordinateCheck, LearningRateSweep, coordinate_check
from scaling.records import Record, ScalingTable


class Size(Record):
    """How much to train."""

    widths: tuple[int, ...]
    log2_rates: tuple[int, ...]
    steps: int
    check_widths: tuple[int, ...]
    check_seeds: tuple[int, ...]


SMOKE = Size(widths=(32, 64), log2_rates=(-8, -6, -4), steps=20, check_widths=(96, 192, 384), check_seeds=(0,))
FULL = Size(widths=(32, 64, 128), log2_rates=(-8, -7, -6, -5, -4, -3, -2), steps=150, check_widths=(64, 128, 256, 512), check_seeds=(0, 1))


def sweeps(size: Size, path: Path, workers: int) -> dict[str, LearningRateSweep]:
    """Loss against learning rate, for Adam and Muon, by default and by the table; the runs go to `path`."""
    tasks = tasks_of(ARMS, size.widths, size.log2_rates, (0,), size.steps)
    return run(tasks, Results.empty(size.steps), path, workers).sweeps()


def checks(table: ScalingTable, size: Size) -> dict[str, CoordinateCheck]:
    """How activations, and what a few steps change of them, grow with width."""
    arms = {
        "Adam, default": (default("adam"), 2.0**-8),
        "Adam, derived": (derived("adam", table), 2.0**-8),
        "Muon, derived": (derived("muon", table), 2.0**-6),
    }
    found = {}
    for arm, (build, lr) in arms.items():
        print(f"coordinate check of {arm}: widths {size.check_widths}")
        found[arm] = coordinate_check(partial(build, lr=lr), batches(5), size.check_widths, seeds=size.check_seeds, table=table)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="under a minute")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the figures")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    torch.set_num_threads(1)  # at this size threads wait for one another longer than they work

    table = gpt_table()
    print(table)
    checked = checks(table, size)
    swept = sweeps(size, options.out / "loss_vs_lr.json", options.workers)
    plots.coordinates(checked, options.out / "coordinate_check.png")
    plots.learning_rates(swept, options.out / "loss_vs_lr.png")

    print(f"\nCoordinate check of Adam, derived\n{checked['Adam, derived']}")
    print("\nWhat was measured")
    for arm, check in checked.items():
        passed = "passed" if check.passed else "failed"
        slopes = [by_step[5] for by_step in check.slopes.values() if by_step[5] is not None]
        print(f"  {arm}: 5 steps change activations like width^{min(slopes):+.2f} to width^{max(slopes):+.2f}, {passed}")
    for arm, sweep in swept.items():
        best = ", ".join(f"{lr:.2g} at width {width}" for width, lr in sweep.fitted_optima.items())
        print(f"  {arm}: best learning rate {best}")
    print(f"\nfigures: {options.out / 'loss_vs_lr.png'}, {options.out / 'coordinate_check.png'}")


if __name__ == "__main__":
    main()
