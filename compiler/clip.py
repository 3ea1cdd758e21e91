"""Gradient clipping by a norm that depends neither on width nor on gauge."""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.blocks import block_view
from compiler.errors import BadOption
from compiler.optimizer import SpectralOptimizer

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(optimizer: SpectralOptimizer, max_norm: float) -> Tensor:
    """Scale all gradients of an optimizer so that their natural norm is at most `max_norm`.

    The norm is √Σ_b c_b·‖G_b‖_F² over the blocks b of all weights, c_b = copies·fan_out/fan_in (times the block's squared gain) the
    SGD factor of the table, over its base value if there is a base. As ‖G_b‖_F follows 1/√c_b (THEORY 1.5), every term has
    exponent 0 in the width, and a change of gauge leaves it alone, where torch's norm grows with √d in the default gauge
    (THEORY P46). For one copy √c_b is ‖W‖₂ as the spectral condition wants it. Where every c_b is 1, as at base width, it is torch's.

    Args:
        optimizer: whose gradients are scaled, in place.
        max_norm: at least 0.

    Returns:
        The norm before clipping, a 0-d tensor. If it is NaN or Inf the gradients are left as they are, so that one bad weight
        does not spoil the others; the optimizer skips that weight.

    Raises:
        BadOption: for a negative or NaN max_norm.
    """
    if not max_norm >= 0:
        raise BadOption("max_norm", max_norm, "a number of at least 0")
    norms, gradients = [], []
    for group in optimizer.param_groups:
        for W in group["params"]:
            if W.grad is None:
                continue
            gradients.append(W.grad)
            for block in group["blocks"] or ({},):
                G = block_view(W.grad, block["axes"])[0] if block else W.grad
                norms.append(
                    torch.linalg.vector_norm(G, dtype=torch.promote_types(G.dtype, torch.float32)) * {**group, **block}["norm_scale"]
                )
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
    factor = torch.where(total.isfinite(), (max_norm / (total + 1e-6)).clamp(max=1), 1)
    for G in gradients:
        G.mul_(factor.to(G.device))
    return total
