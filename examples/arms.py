"""The two arms of the experiments: a GPT and its optimizer by default, and by the table that `derive` made of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from gpt import GPT
from torch import nn

import compiler
from scaling.derive import derive
from scaling.records import ScalingTable

__all__ = ["BASE", "Build", "TwoOptimizers", "default", "derived", "gpt_table", "warmup_then_decay"]

BASE = 32
"""The width at which the derived arm keeps the initial weights of the user's model; with Adam both arms are the same run there."""


class Build(Protocol):
    """(width, learning rate) -> (model, optimizer)."""

    def __call__(self, width: int, lr: float) -> tuple[nn.Module, Any]:
        """A new model and its optimizer."""
        ...


@cache
def gpt_table() -> ScalingTable:
    """The GPT's scaling table, exact from its shapes at three widths."""
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    return derive(GPT, (tokens,), widths=(64, 96, 128))


def derived(optimizer: str, table: ScalingTable) -> Build:
    """Initial weights and learning rates by the table, for any optimizer name of `compiler.compile`."""

    def build(width: int, lr: float) -> tuple[nn.Module, Any]:
        return compiler.compile(GPT(width), table, optimizer, lr=lr, base=GPT(BASE))

    return build


def default(optimizer: str) -> Build:
    """Torch's own initial weights and optimizer, as most people train: one learning rate for all weights.

    "adam" is AdamW. "muon" is `torch.optim.Muon` in the scale that shares its learning rate with AdamW (0.2·√max(fan_out, fan_in), Liu et
    al. 2025, arXiv 2502.16982) for the matrices of the blocks, and AdamW for everything else.
    """

    def build(width: int, lr: float) -> tuple[nn.Module, Any]:
        model = GPT(width)
        if optimizer == "adam":
            return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        matrices = [weight for weight in model.h.parameters() if weight.ndim == 2]
        others = [weight for name, weight in model.named_parameters() if not name.startswith("h.") or weight.ndim != 2]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        return model, TwoOptimizers(muon, torch.optim.AdamW(others, lr=lr, weight_decay=0.0))

    return build


class TwoOptimizers:
    """Two optimizers that step together."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Clears the gradients of both."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """A step of both."""
        for optimizer in self.optimizers:
            optimizer.step()


def warmup_then_decay(steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step: up over the first tenth, then down to zero, both linearly."""
    warmup = max(1, steps // 10)
    return lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
