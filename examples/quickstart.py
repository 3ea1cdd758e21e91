"""Derive a small GPT's scaling table, train it at several widths by default and by the table, and see whether the optimum stays.

    python examples/quickstart.py           # a few minutes on 2 cores
    python examples/quickstart.py --smoke   # under a minute: everything runs, too short to show much

Writes loss_vs_lr.png and coordinate_check.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from arms import default, derived, gpt_table, warmup_then_decay
from gpt import batches

from scaling import plots
from scaling.measure import CoordinateCheck, LearningRateSweep, coordinate_check, learning_rate_sweep
from scaling.records import Record, ScalingTable


class Size(Record):
    """How much to train."""

    widths: tuple[int, ...]
    log2_rates: tuple[int, ...]
    steps: int
    check_widths: tuple[int, ...]
    check_seeds: tuple[int, ...]


SMOKE = Size(widths=(32, 64), log2_rates=(-8, -6, -4), steps=20, check_widths=(32, 64, 128), check_seeds=(0,))
FULL = Size(widths=(32, 64, 128), log2_rates=(-9, -8, -7, -6, -5, -4, -3), steps=150, check_widths=(32, 64, 128, 256), check_seeds=(0, 1))


def sweeps(table: ScalingTable, size: Size) -> dict[str, LearningRateSweep]:
    """Loss against learning rate, for Adam and Muon, by default and by the table."""
    arms = {
        "Adam, default": default("adam"),
        "Adam, derived": derived("adam", table),
        "Muon, default": default("muon"),
        "Muon, derived": derived("muon", table),
    }
    rates = [2.0**power for power in size.log2_rates]
    found = {}
    for arm, build in arms.items():
        print(f"\n{arm}: {len(size.widths)} widths × {len(rates)} learning rates × {size.steps} steps")
        found[arm] = learning_rate_sweep(
            build, batches(size.steps), size.widths, rates, steps=size.steps, schedule=warmup_then_decay(size.steps)
        )
    return found


def checks(table: ScalingTable, size: Size) -> dict[str, CoordinateCheck]:
    """How activations, and what a few steps change of them, grow with width."""
    arms = {"Adam, default": default("adam"), "Adam, derived": derived("adam", table), "Muon, derived": derived("muon", table)}
    found = {}
    for arm, build in arms.items():
        print(f"coordinate check: {arm}")
        found[arm] = coordinate_check(
            lambda width, build=build: build(width, 2.0**-6), batches(5), size.check_widths, seeds=size.check_seeds, table=table
        )
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="under a minute")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the figures")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL

    table = gpt_table()
    print(table)
    checked = checks(table, size)
    swept = sweeps(table, size)
    plots.coordinates(checked, options.out / "coordinate_check.png")
    plots.learning_rates(swept, options.out / "loss_vs_lr.png")
    for arm, sweep in swept.items():
        (options.out / f"{arm.replace(', ', '_').lower()}.json").write_text(sweep.to_json())

    print(f"\n{'Adam, derived'}: coordinate check\n{checked['Adam, derived']}")
    print("\nWhat was measured")
    for arm, check in checked.items():
        slopes = [by_step[5] for by_step in check.slopes.values() if by_step[5] is not None]
        print(f"  {arm}: changes after 5 steps grow like width^{min(slopes):+.2f} to width^{max(slopes):+.2f}")
    for arm, sweep in swept.items():
        best = ", ".join(f"{lr:.2g} at width {width}" for width, lr in sweep.fitted_optima.items())
        print(f"  {arm}: best learning rate {best}")
    print(f"\nfigures: {options.out / 'loss_vs_lr.png'}, {options.out / 'coordinate_check.png'}")


if __name__ == "__main__":
    main()
