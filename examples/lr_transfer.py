"""Does the best learning rate stay where it is as the model grows? Loss against learning rate over an 8x range of widths.

The GPT of gpt.py on Python's own source, Adam and Muon, torch's default parametrization and the derived one. Runs are written to
the JSON as they finish, and a restart goes on with what is missing; the figure is drawn from the JSON alone.

    python examples/lr_transfer.py              # about 40 minutes on 2 cores
    python examples/lr_transfer.py --plot-only  # redraws the figure
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import time
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

RESULTS = Path(__file__).parent / "results"
WIDTHS = (32, 64, 128, 256)
SEEDS = (0, 1)
STEPS = 300
LOG2_RATES = {
    ("default", "adam"): range(-11, -3),
    ("derived", "adam"): range(-9, -1),
    ("default", "muon"): range(-9, -1),
    ("derived", "muon"): range(-9, -1),
}
"""The grids, log2 of the learning rate in steps of 2, wide enough that no optimum lies at an edge."""


class Task(Record):
    """One run: which arm, and where on its grid."""

    arm: str
    optimizer: str
    width: int
    log2_rate: int
    seed: int
    steps: int


class Results(Record):
    """What the JSON holds: finished runs by arm, and where they were made."""

    steps: int
    base: int
    runs: dict[str, tuple[Run, ...]]
    environment: Environment

    def sweeps(self) -> dict[str, LearningRateSweep]:
        """Arm -> its sweep."""
        return {arm: LearningRateSweep(steps=self.steps, runs=runs, environment=self.environment) for arm, runs in self.runs.items()}
