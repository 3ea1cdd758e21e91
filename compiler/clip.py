"""Gradient clipping by a norm that depends neither on width nor on gauge."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from compiler.blocks import block_view
from compiler.errors import BadOption
from compiler.gradients import refuse_sparse
from compiler.optimizer import SpectralOptimizer
from compiler.options import names_of
from compiler.shards import local, placements, sharding_of, units_of

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(optimizer: SpectralOptimizer, max_norm: float) -> Tensor:
    """Scale all gradients of an optimizer so that their natural norm is at most `max_norm`.

    The norm is √Σ_b c_b·‖G_b‖_F² over the blocks b of all weights, c_b = copies·fan_out/fan_in (times the block's squared gain) the
    SGD factor of the table, over its base value if there is a base. As ‖G_b‖_F follows 1/√c_b, every term has
    exponent 0 in the width, and a change of gauge leaves it alone, where torch's norm grows with √d in the default gauge.
    For one copy √c_b is ‖W‖₂ as the spectral condition wants it. Where every c_b is 1, as at base width, it is torch's.

    Over ranks the norm is that of the whole gradients, the same on all; they do not travel.

    transformers' Trainer clips by torch's norm, to 1, unless max_grad_norm=0: then a callback's on_pre_optimizer_step can call this.

    Args:
        optimizer: whose gradients are scaled, in place; accelerate's wrapper of it will do.
        max_norm: at least 0.

    Returns:
        The norm before clipping, a 0-d tensor. If it is NaN or Inf the gradients are left as they are, so that one bad weight
        does not spoil the others; the optimizer skips that weight.

    Raises:
        BadOption: for a negative or NaN max_norm, or another optimizer, whose groups know no factors.
        BadGradient: for a sparse gradient. Nothing has been scaled then.
    """
    if not isinstance(max_norm, Real) or not float(max_norm) >= 0:
        raise BadOption("max_norm", max_norm, "a number of at least 0")
    if not all("norm_scale" in group for group in getattr(optimizer, "param_groups", [{}])):
        raise BadOption("optimizer", type(optimizer).__name__, "a SpectralOptimizer; torch's clip_grad_norm_ serves others")
    parts: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    gradients = []
    for group in optimizer.param_groups:
        names = names_of(group)
        refuse_sparse(zip(names, group["params"], strict=True))
        for name, W in zip(names, group["params"], strict=True):
            summed = tuple(W.device_mesh.get_group(dim) for dim, p in enumerate(placements(W)) if p.is_shard())
            if W.grad is None:  # here; another rank may have one, and then waits for this one
                parts.setdefault(summed, []).append(torch.zeros((), device=W.device))
                continue
            gradients.append(local(W.grad))
            for block in group["blocks"] or ({},):
                scale = {**group, **block}["norm_scale"]
                for G in _boxes(W, block, name):
                    norm = torch.linalg.vector_norm(G, dtype=torch.promote_types(G.dtype, torch.float32))
                    parts.setdefault(summed, []).append(norm * scale)
    totals = [torch.tensor(0.0, device="cpu")] if not parts else []
    for summed, norms in parts.items():
        norm = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
        square = norm.double() ** 2
        for ranks in summed:
            dist.all_reduce(square, group=ranks)
        totals.append(square.sqrt().to(norm.dtype) if summed else norm)
    total = torch.linalg.vector_norm(torch.stack([norm.to(totals[0]) for norm in totals]))
    factor = torch.where(total.isfinite(), (max_norm / (total + 1e-6)).clamp(max=1), 1)
    for G in gradients:
        G.mul_(factor.to(G.device))
    return total


def _boxes(W: Tensor, block: dict[str, Any], name: str) -> list[Tensor]:
    """The parts of a gradient that are of a block and here."""
    G = local(W.grad)  # pyright: ignore[reportArgumentType]
    if not block:
        return [G]
    sharding = sharding_of(name, W)
    if sharding is None:
        return [block_view(G, block["axes"])[0]]
    [unit] = units_of(0, 0, block["axes"], W.shape, sharding, whole=True)
    return [run.view(G) for run in unit.runs[sharding.rank]] or [G.new_zeros(1)]
