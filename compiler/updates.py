"""UPDATES: from a gradient to the base update Φ. Each function advances its own buffers; the gradient is read only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["BUFFERS", "UPDATES", "Direction", "buffers_of", "empty_buffer"]

Options = dict[str, Any]


class Direction(NamedTuple):
    """Φ = numerator / denominator / correction, kept apart so that a plain step rounds as torch's own optimizers do."""

    numerator: Tensor
    denominator: Tensor | None = None
    correction: float = 1.0

    def tensor(self) -> Tensor:
        """Φ itself. Read only: it may be a buffer."""
        return self.numerator if self.denominator is None else self.numerator / self.denominator / self.correction

    def subtract_from_(self, W: Tensor, lr: float) -> None:
        """W ← W - lr·Φ, in the operations of torch's single-tensor SGD and AdamW."""
        if self.denominator is None:
            W.add_(self.numerator, alpha=-lr)
        else:
            W.addcdiv_(self.numerator, self.denominator, value=-(lr / self.correction))


def sgd(G: Tensor, state: dict[str, Tensor], o: Options) -> Direction:
    """B ← μ·B + G, Φ = B: torch.optim.SGD with dampening 0; Φ = G without momentum."""
    if o["momentum"] == 0:
        return Direction(G)
    return Direction(state["momentum_buffer"].mul_(o["momentum"]).add_(G, alpha=1))


def momentum(G: Tensor, state: dict[str, Tensor], o: Options) -> Direction:
    """B ← μ·B + (1 - μ)·G, Φ = B: torch.optim.Muon with nesterov=False (2.9). No bias correction."""
    if o["momentum"] == 0:
        return Direction(G)
    return Direction(state["momentum_buffer"].lerp_(G, 1 - o["momentum"]))


def nesterov(G: Tensor, state: dict[str, Tensor], o: Options) -> Direction:
    """B ← μ·B + (1 - μ)·G, Φ = μ·B + (1 - μ)·G: torch.optim.Muon's default, Keller Jordan's form."""
    return Direction(G.lerp(momentum(G, state, o).numerator, o["momentum"]))


def sign(G: Tensor, state: dict[str, Tensor], o: Options) -> Direction:
    """The sign of `momentum`'s Φ: Signum (Bernstein et al. 2018, arXiv 1802.04434); signSGD without momentum."""
    return Direction(momentum(G, state, o).numerator.sign())


def adam(G: Tensor, state: dict[str, Tensor], o: Options) -> Direction:
    """Φ = m̂ / (√v̂ + ε), ε = eps·eps_scale: torch.optim.AdamW, operation for operation."""
    (beta1, beta2), step = o["betas"], o["step"]
    state["exp_avg"].lerp_(G, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
    root = (1 - beta2**step) ** 0.5
    return Direction(state["exp_avg"], (state["exp_avg_sq"].sqrt() / root).add_(o["eps"] * o["eps_scale"]), 1 - beta1**step)


UPDATES: dict[str, Callable[[Tensor, dict[str, Tensor], Options], Direction]] = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "sign": sign,
    "adam": adam,
}
"""Name -> the base update."""

BUFFERS = {"adam": ("exp_avg", "exp_avg_sq")}
"""The state of the updates that keep more than a momentum."""


def buffers_of(o: Options) -> tuple[str, ...]:
    """The buffers an update keeps, each of the weight's shape."""
    return BUFFERS.get(o["update"], ("momentum_buffer",) if o["momentum"] != 0 else ())


def empty_buffer(W: Tensor) -> Tensor:
    """A buffer of zeros with the weight's shape, dtype, device and strides."""
    return torch.zeros_like(W, memory_format=torch.preserve_format)
