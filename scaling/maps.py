"""Every weight as the linear maps it is, and the norms of those maps that theory speaks of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import sympy
import torch
from torch import Tensor, nn

from scaling.limits import WIDTH, exponent
from scaling.measured import Quantity
from scaling.records import Block, ScalingTable

__all__ = ["GRADIENT", "WeightMaps", "full", "nuclear_ratio", "predicted_norms", "relative_norm", "sign_ratio", "spectral_norms"]


class WeightMaps:
    """A model's trainable weights, each as the linear maps it is: (copies, fan_out, fan_in)."""

    def __init__(self, model: nn.Module, table: ScalingTable | None) -> None:
        self.trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.table = table
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
        self.size = table.size_of(shapes) if table else 0

    def values(self) -> dict[str, Tensor]:
        """Copies of the weights."""
        return {name: weight.detach().clone() for name, weight in self.trainable.items()}

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the weights that have one."""
        return {name: weight.grad for name, weight in self.trainable.items() if weight.grad is not None}

    def maps(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Tensors in the weights' shapes, as (copies, fan_out, fan_in): one per block by the table, else first axis × the others."""
        for name, tensor in tensors.items():
            if self.table is None or name not in self.table:
                yield name, tensor.reshape(1, len(tensor) if tensor.ndim else 1, -1)
            else:
                yield from ((label, _map(tensor, block, self.size)) for label, block in _blocks(name, self.table))

    def norms(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
        """‖·‖₂ of every map, the largest copy's."""
        return ((name, float(spectral_norms(maps).max())) for name, maps in self.maps(tensors))

    def frobenius(self, tensors: Mapping[str, Tensor], *, rank: int | None = None) -> Iterator[tuple[str, float]]:
        """‖·‖_F/√rank of every map with two fans above 1, the root of the mean of squares over copies; None is the full rank."""
        matrices = ((name, full(maps)) for name, maps in self.maps(tensors) if min(maps.shape[1:]) > 1)
        return ((name, float((maps.square().sum((1, 2)).mean() / (rank or min(maps.shape[1:]))).sqrt())) for name, maps in matrices)


def _blocks(name: str, table: ScalingTable) -> list[tuple[str, Block]]:
    blocks = table[name].blocks
    return [(f"{name} block {i}" if len(blocks) > 1 else name, block) for i, block in enumerate(blocks)]


def predicted_norms(table: ScalingTable | None) -> dict[str, float]:
    """The exponent of √(fan_out/fan_in), by the names that `WeightMaps.maps` gives."""
    if table is None:
        return {}
    return {label: float(exponent(block.spectral_norm)) for rule in table for name in rule.names for label, block in _blocks(name, table)}


def _map(weight: Tensor, block: Block, size: int) -> Tensor:
    """The block as (copies, fan_out, fan_in); each looked-up index is a map of its own, from one number to fan_out."""
    factors = [factor for axis in block.axes for factor in axis]
    extents = [slice(_at(factor.start, size), _at(factor.stop, size)) for factor in factors]
    part = weight.reshape([_at(factor.size, size) for factor in factors])[tuple(extents)]
    kinds = (("copy", "lookup"), ("out",), ("in",))
    order = [[i for i, factor in enumerate(factors) if factor.part in kind] for kind in kinds]
    return part.permute([*chain(*order)]).reshape([math.prod(part.shape[i] for i in axes) for axes in order])


def _at(expression: sympy.Expr, size: int) -> int:
    return int(expression.subs(WIDTH, size))


def spectral_norms(maps: Tensor) -> Tensor:
    """‖·‖₂ of every copy; nan where an entry is not finite."""
    finite = maps.isfinite().all(-1).all(-1)
    return torch.linalg.matrix_norm(full(maps).where(finite[:, None, None], 0), 2).where(finite, math.nan)


def nuclear_ratio(G: Tensor) -> float:
    """‖G‖_*/‖G‖₂, the largest copy's; 0 for G = 0, nan where an entry is not finite."""
    norms = spectral_norms(G)
    if not norms.isfinite().all():
        return math.nan
    return float((torch.linalg.matrix_norm(full(G), "nuc") / norms.where(norms > 0, 1)).max())


def sign_ratio(G: Tensor) -> float:
    """‖sign G‖₂/√(fan_in·fan_out), the largest copy's."""
    return float(spectral_norms(G.sign()).max()) / math.sqrt(G.shape[1] * G.shape[2])


def relative_norm(G: Tensor) -> float:
    """copies·‖G‖₂/√(fan_in/fan_out), the largest copy's: each of `copies` maps sees 1/copies of the gradient."""
    copies, fan_out, fan_in = G.shape
    return copies * float(spectral_norms(G).max()) / math.sqrt(fan_in / fan_out)


GRADIENT: dict[Quantity, Callable[[Tensor], float]] = {"rank": nuclear_ratio, "sign": sign_ratio, "gradient": relative_norm}
"""The quantities of `Assumptions` that are functions of a gradient (copies, fan_out, fan_in)."""


def full(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
