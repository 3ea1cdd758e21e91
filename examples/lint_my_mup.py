"""Check a muP implementation that was written by hand, without training it, and find what was forgotten.

python examples/lint_my_mup.py    # seconds
"""

from __future__ import annotations

from functools import partial

import torch
from gpt import GPT
from torch import Tensor, nn

from scaling import lint

BASE = 64
"""The width at which the hyperparameters were tuned."""


class MuGPT(GPT):
    """The GPT with muP's readout multiplier; its heads have a fixed dimension, so attention stays as it is."""

    def __init__(self, width: int, readout: float) -> None:
        super().__init__(width)
        self.readout = readout

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time), int64 -> (batch, time, vocabulary)."""
        return super().forward(tokens) * self.readout


def build(width: int, *, forget: tuple[str, ...] = ()) -> tuple[nn.Module, torch.optim.Optimizer]:
    """MuP for AdamW as most code has it (Tensor Programs V, table 8), but for the factors in `forget`."""
    m = width / BASE
    model = MuGPT(width, readout=1.0 if "readout multiplier" in forget else 1 / m)
    hidden, others = [], []
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif weight.ndim == 2:
            nn.init.normal_(weight, std=0.02 * m**-0.5 if name.startswith("h.") else 0.02)
        (hidden if name.startswith("h.") and weight.ndim == 2 else others).append(weight)
    decay = 0.1 if "weight decay" in forget else 0.1 * m
    groups = [{"params": hidden, "lr": 1e-3 / m, "weight_decay": decay}, {"params": others, "lr": 1e-3, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, eps=1e-12)


def main() -> None:
    """Lints the right one and the forgetful one."""
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    print(lint(build, tokens, widths=(64, 128, 256)), end="\n\n")
    print(lint(partial(build, forget=("readout multiplier", "weight decay")), tokens, widths=(64, 128, 256)))


if __name__ == "__main__":
    main()
