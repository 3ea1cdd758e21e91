"""UPDATES: from gradients to base updates Φ, of many weights at once. Buffers are advanced in place; gradients are read only."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* are public operators by another name: torch.optim is made of them

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["BUFFERS", "UPDATES", "Direction", "buffers_of", "correction", "largest_gradient", "scale_"]

Options = dict[str, Any]
Buffers = dict[str, list[Tensor]]
Scalars = list[Any]
"""One number per weight: floats, or 0-d tensors on the weights' device."""


class Direction(NamedTuple):
    """Φ = numerator / denominator / correction of each weight, kept apart so that a plain step rounds as torch's own optimizers do."""

    numerators: list[Tensor]
    denominators: list[Tensor] | None = None
    corrections: Scalars | None = None

    def tensors(self) -> list[Tensor]:
        """Φ itself. Read only: it may be a buffer."""
        if self.denominators is None or self.corrections is None:
            return self.numerators
        return list(torch._foreach_div(torch._foreach_div(self.numerators, self.denominators), self.corrections))

    def subtract_from_(self, weights: list[Tensor], lr: float | Tensor) -> None:
        """W ← W - lr·Φ; for a number lr in the operations of torch's single-tensor SGD and AdamW."""
        if isinstance(lr, Tensor) or any(isinstance(c, Tensor) for c in self.corrections or ()):
            rates = [lr / c for c in self.corrections] if self.corrections else [lr] * len(weights)
            steps = self.numerators if self.denominators is None else torch._foreach_div(self.numerators, self.denominators)
            torch._foreach_sub_(weights, [step.to(W.dtype) * rate for W, step, rate in zip(weights, steps, rates, strict=True)])
        elif self.denominators is None or self.corrections is None:
            torch._foreach_add_(weights, self.numerators, alpha=-lr)
        else:
            torch._foreach_addcdiv_(weights, self.numerators, self.denominators, [-(lr / c) for c in self.corrections])


def scale_(tensors: list[Tensor], factor: float | Tensor) -> None:
    """Multiply each by a number, as Tensor.mul_ does: on a CPU torch._foreach_mul_ rounds the factor to bf16 for bf16 tensors."""
    if tensors[0].device.type == "cpu":
        for T in tensors:
            T.mul_(factor)
    else:
        torch._foreach_mul_(tensors, factor)


def sgd(G: list[Tensor], buffers: Buffers, o: Options, steps: Scalars) -> Direction:
    """B ← μ·B + G, Φ = B: torch.optim.SGD with dampening 0; Φ = G without momentum."""
    if o["momentum"] == 0:
        return Direction(G)
    scale_(buffers["momentum_buffer"], o["momentum"])
    torch._foreach_add_(buffers["momentum_buffer"], G, alpha=1)
    return Direction(buffers["momentum_buffer"])


def momentum(G: list[Tensor], buffers: Buffers, o: Options, steps: Scalars) -> Direction:
    """B ← μ·B + (1 - μ)·G, Φ = B: torch.optim.Muon with nesterov=False (2.9). No bias correction."""
    if o["momentum"] == 0:
        return Direction(G)
    torch._foreach_lerp_(buffers["momentum_buffer"], G, 1 - o["momentum"])
    return Direction(buffers["momentum_buffer"])


def nesterov(G: list[Tensor], buffers: Buffers, o: Options, steps: Scalars) -> Direction:
    """B ← μ·B + (1 - μ)·G, Φ = μ·B + (1 - μ)·G: torch.optim.Muon's default, Keller Jordan's form."""
    return Direction(list(torch._foreach_lerp(G, momentum(G, buffers, o, steps).numerators, o["momentum"])))


def sign(G: list[Tensor], buffers: Buffers, o: Options, steps: Scalars) -> Direction:
    """The sign of `momentum`'s Φ: Signum (Bernstein et al. 2018, arXiv 1802.04434); signSGD without momentum."""
    return Direction(list(torch._foreach_sign(momentum(G, buffers, o, steps).numerators)))


def adam(G: list[Tensor], buffers: Buffers, o: Options, steps: Scalars) -> Direction:
    """Φ = m̂ / (√v̂ + ε), ε = eps·eps_scale: torch.optim.AdamW, operation for operation."""
    beta1, beta2 = o["betas"]
    m, v = buffers["exp_avg"], buffers["exp_avg_sq"]
    torch._foreach_lerp_(m, G, 1 - beta1)
    scale_(v, beta2)
    torch._foreach_addcmul_(v, G, G, value=1 - beta2)
    denominators = list(torch._foreach_sqrt(v))
    torch._foreach_div_(denominators, [root**0.5 for root in _corrections(beta2, steps)])
    torch._foreach_add_(denominators, o["eps"] * o["eps_scale"])
    return Direction(m, denominators, _corrections(beta1, steps))


def _corrections(beta: float, steps: Scalars) -> Scalars:
    """1 - β^step of each weight."""
    if not isinstance(steps[0], Tensor):
        return [1 - beta**step for step in steps]
    return list(correction(beta, torch.stack(steps)).unbind())


def correction(beta: float, steps: Tensor) -> Tensor:
    """1 - β^step, exact in fp32, where 1 - 0.999 is off by 5e-5."""
    return -torch.expm1(steps * math.log(beta)) if beta > 0 else torch.ones_like(steps)


UPDATES: dict[str, Callable[[list[Tensor], Buffers, Options, Scalars], Direction]] = {
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


def largest_gradient(o: Options, dtype: torch.dtype) -> float:
    """The largest entry of a gradient for which no buffer of `dtype` overflows. An Inf in a buffer would stay there for good."""
    top = torch.finfo(dtype).max
    if o["update"] == "adam":
        return top**0.5
    if o["momentum"] == 0:
        return top
    return top * (1 - o["momentum"]) if o["update"] == "sgd" else top / 2  # Σ μᵗ·G; the G - B of an interpolation
