"""Steps in few launches, by `compiler.kernels`: everything else takes `compiler.pieces`.

`Mapped`: momenta under a map that does not ask for the scale of Φ, by one launch before the map and one after it for all matrices of a
shape. Φ goes straight from gradient and momentum into the batch, scaled by a power of two, and U straight from the batch into the weights.
`Plain`: Adam without a map, one launch for tensors of all shapes.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from compiler.kernels import adam_, advance_, apply_, runs_triton, table
from compiler.maps import chunks, map_batch, peak
from compiler.msign import polar, storage
from compiler.norms import VECTORS, follow
from compiler.pieces import Piece
from compiler.updates import correction

__all__ = ["Bounds", "Mapped", "Plain", "batches", "fits"]

Bounds = dict[Hashable, Tensor]
"""Momentum -> the largest entry of each of its matrices after the last step, on the device."""


def fits(piece: Piece) -> bool:
    """Whether the kernels can take a piece."""
    o = piece.o
    return (
        piece.good is not None
        and not torch.compiler.is_compiling()
        and not o["maximize"]
        and runs_triton(piece.W, piece.G) is not None
        and (_fits_mapped(piece) if o["map"] is not None else _fits_plain(piece))
    )


def _fits_mapped(piece: Piece) -> bool:
    o, tensors = piece.o, _tensors(piece)
    return o["update"] in ("momentum", "nesterov") and o["map"] in ("msign", "sn") and all(_splits(T, piece.sizes) for T in tensors)


def _fits_plain(piece: Piece) -> bool:
    """Whether entry by entry, in the order of memory, is the same for all."""
    W = piece.W
    dense = 1 + sum((n - 1) * step for n, step in zip(W.shape, W.stride(), strict=True)) == W.numel()
    alike = piece.G.dtype == W.dtype and all(T.stride() == W.stride() for T in _tensors(piece))
    return piece.o["update"] == "adam" and piece.unit is None and dense and alike


def _tensors(piece: Piece) -> list[Tensor]:
    return [piece.W, piece.G, *piece.buffers.values(), *([] if piece.low is None else [piece.low])]


def _splits(T: Tensor, sizes: tuple[int, int, int]) -> bool:
    """Whether strides allow a view of shape (copies, out, in)."""
    if T.shape == sizes[1:]:
        return True
    try:
        T.view(sizes)
    except RuntimeError:
        return False
    return True


def batches(pieces: Sequence[Piece]) -> list[Mapped | Plain]:
    """The pieces, all of which `fits` has passed, as the kernels take them at once."""
    lanes: dict[Hashable, list[Piece]] = {}
    for piece in pieces:
        if piece.o["map"] is None:
            lanes.setdefault((piece.key, *(T.dtype for T in _tensors(piece))), []).append(piece)
    return [
        *(Mapped(chunk) for chunk in chunks([piece for piece in pieces if piece.o["map"] is not None], _bytes_of)),
        *(Plain(members) for members in lanes.values()),
    ]


class Plain:
    """Pieces under Adam, of one lane and dtype."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces

    def update_(self, _: Bounds) -> None:
        """Take their step."""
        lane = self.pieces[0].lane
        beta1, beta2 = lane.o["betas"]
        steps = torch.stack([piece.entry.state["step"] for piece in self.pieces])  # counted already, of those that are good
        adam_(
            [piece.W for piece in self.pieces],
            [piece.G for piece in self.pieces],
            *([piece.buffers[name] for piece in self.pieces] for name in ("exp_avg", "exp_avg_sq")),
            lows=[piece.low for piece in self.pieces if piece.low is not None] or None,
            betas=(beta1, beta2),
            eps=lane.o["eps"] * lane.o["eps_scale"],
            rate=lane.lr / correction(beta1, steps),
            decay=torch.ones_like(steps) - lane.lr * lane.decay,
            root=correction(beta2, steps).sqrt(),
            finite=_gathered(self.pieces, "flags"),
        )


class Mapped:
    """Pieces of one batch of `compiler.maps`."""

    def __init__(self, chunk: list[Piece]) -> None:
        alike: dict[Hashable, list[Piece]] = {}
        for piece in chunk:
            layout = [(T.dtype, T.stride()) for T in _tensors(piece)]
            alike.setdefault((piece.key, piece.sizes[1:], *layout), []).append(piece)
        self.parts = list(alike.values())

    def update_(self, bounds: Bounds) -> None:
        """Take their step."""
        parts = [_Alike(pieces) for pieces in self.parts]
        ordered = [piece for pieces in self.parts for piece in pieces]
        first = ordered[0]
        counts, sides = [len(part.weights) for part in parts], (min(first.sizes[1:]), max(first.sizes[1:]))
        batch = torch.empty(sum(counts), *sides, dtype=_storage(first), device=first.device)
        squares: list[Tensor] = []
        for part, Phi in zip(parts, batch.split(counts), strict=True):
            exponent, held = part.exponent(bounds)
            o = part.pieces[0].o
            square, largest = advance_(
                part.gradients, part.buffers, Phi, momentum=o["momentum"], nesterov=o["update"] == "nesterov", exponent=exponent,
                finite=part.finite,
            )  # fmt: skip
            squares.append(square)
            if held:
                torch._foreach_copy_(held, list(largest.split([len(old) for old in held])))
        U, scales = _mapped(batch, torch.cat(squares), ordered, torch.cat([part.finite for part in parts]))
        for part, those, scale in zip(parts, U.split(counts), scales.split(counts), strict=True):
            lane = part.pieces[0].lane
            apply_(part.weights, those, lows=part.lows, scale=scale * lane.lr, decay=1 - lane.lr * lane.decay, finite=part.finite)


def _matrices(T: Tensor, piece: Piece) -> list[Tensor]:
    return [T] if T.shape == piece.sizes[1:] else list(T.view(piece.sizes).unbind())


def _gathered(pieces: Sequence[Piece], name: str) -> Tensor:
    """The flag, or the largest entry of the gradient, that the weight of each matrix has."""
    found = getattr(pieces[0].entry, name)
    return found.index_select(0, table(tuple(piece.entry.at for piece in pieces for _ in range(piece.sizes[0])), found.device))


class _Alike:
    """Pieces of one shape, layout and lane: rows of the batch, one launch."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.weights = [W for piece in pieces for W in _matrices(piece.W, piece)]
        self.gradients = [G for piece in pieces for G in _matrices(piece.G, piece)]
        self.buffers = [B for piece in pieces for buffer in piece.buffers.values() for B in _matrices(buffer, piece)] or None
        self.lows = [B for piece in pieces if piece.low is not None for B in _matrices(piece.low, piece)] or None
        self.finite = _gathered(pieces, "flags")

    def exponent(self, bounds: Bounds) -> tuple[Tensor, list[Tensor]]:
        """The power of two above every entry of G and B, and where B's largest is kept."""
        if all(piece.G.numel() == piece.entry.W.numel() for piece in self.pieces) and len(self.pieces) == len(self.gradients):
            largest = _gathered(self.pieces, "sizes")
        else:
            largest = torch.stack(list(torch._foreach_norm(self.gradients, ord=math.inf))).float()
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


def _bytes_of(piece: Piece) -> int:
    """Temporary memory that a piece takes: under msign (copies, m, n) before and after, and four operands and R, or Q and the result."""
    copies, out, into = piece.sizes
    m, n = min(out, into), max(out, into)
    if piece.o["map"] == "msign":
        entries = 2 * m * n + max(5 * m * m, m * m + m * n)
    else:
        entries = (2 if _followed(piece) else peak(piece.o, warm=False)) * m * n
    return copies * entries * _storage(piece).itemsize


def _followed(piece: Piece) -> bool:
    """Whether σ₁ is found from the vectors of the last step, all 16 of them."""
    return piece.o["map"] == "sn" and not piece.o["strict"] and piece.warm and min(piece.sizes[1:]) >= VECTORS


def _storage(piece: Piece) -> torch.dtype:
    """Of the batch: what nothing is decided from but by sums of many entries may be rounded to fp16."""
    if piece.o["map"] == "msign" or _followed(piece):
        return storage(min(piece.sizes[1:]), piece.working, piece.device, piece.o["accuracy"])
    return piece.working


def _mapped(batch: Tensor, squares: Tensor, pieces: list[Piece], finite: Tensor) -> tuple[Tensor, Tensor]:
    """The update as a batch and a factor of each matrix, applied while it is written: one pass less, and no digits of fp16 are lost."""
    first = pieces[0]
    if first.o["map"] == "msign":
        return polar(batch, squares, first.o["accuracy"])
    if not _followed(first):
        return map_batch(batch, pieces).contiguous(), torch.ones_like(squares)
    bases = [piece.vectors for piece in pieces if piece.vectors is not None]
    old = torch.cat(bases)
    sigma, new = follow(batch, old)
    torch._foreach_copy_(bases, list(new.where(finite[:, None, None], old).split([len(basis) for basis in bases])))
    return batch, torch.where(sigma > 0, 1 / sigma, 0)
