"""A step of mapped momenta in one launch before the map and one after it, for all matrices of a batch: `compiler.kernels` by shape.

Φ goes straight from gradient and momentum into the batch, scaled by a power of two, and U straight from the batch into the weights.
For "momentum" and "nesterov" under a map that does not ask for the scale of Φ; everything else takes `compiler.pieces`.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from compiler.kernels import advance_, apply_, runs_triton
from compiler.maps import map_batch
from compiler.msign import polar, storage
from compiler.pieces import Piece

__all__ = ["Bounds", "fits", "update_"]

Bounds = dict[Hashable, Tensor]
"""Momentum -> the largest entry of each of its matrices after the last step, on the device."""


def fits(piece: Piece) -> bool:
    """Whether the kernels can take a piece."""
    o = piece.o
    return (
        piece.good is not None
        and not torch.compiler.is_compiling()
        and piece.low is None
        and o["update"] in ("momentum", "nesterov")
        and o["map"] in ("msign", "sn")
        and not o["maximize"]
        and runs_triton(piece.W, piece.G) is not None
        and all(_stack(T, piece.sizes) is not None for T in (piece.W, piece.G, *piece.buffers.values()))
    )


def _stack(T: Tensor, sizes: tuple[int, int, int]) -> Tensor | None:
    """A view of shape (copies, out, in), if strides allow one."""
    try:
        return T.view(sizes)
    except RuntimeError:
        return None


class _Alike:
    """Pieces of one shape, layout and lane: rows of the batch, one launch."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.weights = [W for piece in pieces for W in _matrices(piece.W, piece)]
        self.gradients = [G for piece in pieces for G in _matrices(piece.G, piece)]
        self.buffers = [B for piece in pieces for buffer in piece.buffers.values() for B in _matrices(buffer, piece)] or None
        goods = [piece.good.expand(piece.sizes[0]) for piece in pieces if piece.good is not None]
        self.finite = torch.cat(goods).contiguous()

    def exponent(self, bounds: Bounds) -> tuple[Tensor, list[Tensor]]:
        """The power of two above every entry of G and B, and where B's largest is kept."""
        known = [piece.largest for piece in self.pieces if piece.largest is not None and piece.sizes[0] == 1]
        if len(known) < len(self.pieces):
            known = torch._foreach_norm(self.gradients, ord=math.inf)
        largest = torch.stack(list(known)).float()
        held = []
        for piece in self.pieces:
            for B in piece.buffers.values():
                key = (B.data_ptr(), *piece.sizes, *B.stride())
                if key not in bounds:
                    bounds[key] = torch.stack(list(torch._foreach_norm(_matrices(B, piece), ord=math.inf))).float()
                held.append(bounds[key])
        if held:
            largest = torch.maximum(largest, torch.cat(held))
        return torch.frexp(largest.where(self.finite, 1)).exponent, held


def _matrices(T: Tensor, piece: Piece) -> list[Tensor]:
    return list(T.view(piece.sizes).unbind())


def update_(chunk: list[Piece], bounds: Bounds) -> None:
    """Take the step of the pieces of a chunk, all of which `fits` has passed."""
    alike: dict[Hashable, list[Piece]] = {}
    for piece in chunk:
        layout = [(T.dtype, T.view(piece.sizes).stride()) for T in (piece.W, piece.G, *piece.buffers.values())]
        alike.setdefault((piece.key, piece.sizes[1:], *layout), []).append(piece)
    parts = [_Alike(pieces) for pieces in alike.values()]
    ordered = [piece for pieces in alike.values() for piece in pieces]
    first = chunk[0]
    sides, rows = (min(first.sizes[1:]), max(first.sizes[1:])), sum(len(part.weights) for part in parts)
    at_once = first.o["map"] == "msign"
    dtype = storage(first.working, first.device, first.o["accuracy"]) if at_once else first.working
    batch = torch.empty(rows, *sides, dtype=dtype, device=first.device)
    squares: list[Tensor] = []
    for part, Phi in zip(parts, batch.split([len(part.weights) for part in parts]), strict=True):
        exponent, held = part.exponent(bounds)
        o = part.pieces[0].o
        square, largest = advance_(
            part.gradients, part.buffers, Phi, momentum=o["momentum"], nesterov=o["update"] == "nesterov", exponent=exponent,
            finite=part.finite,
        )  # fmt: skip
        squares.append(square)
        for old, new in zip(held, largest.split([len(old) for old in held]), strict=True):
            old.copy_(new)
    # the factors that msign leaves to be applied are applied while U is written: one pass less, and no digits of fp16 lost
    U, scales = polar(batch, torch.cat(squares), first.o["accuracy"]) if at_once else (map_batch(batch, ordered).contiguous(), None)
    row = 0
    for part in parts:
        lane, those = part.pieces[0].lane, slice(row, row + len(part.weights))
        decay: Any = 1 - lane.lr * lane.decay
        scale = lane.lr if scales is None else scales[those] * lane.lr
        apply_(part.weights, U[those], scale=scale, decay=decay, finite=part.finite)
        row += len(part.weights)
