"""MAPS: from base updates Φ to updates U, many matrices in one batch, tall and wide together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from compiler.msign import msign, power_of_two
from compiler.norms import VECTORS, ritz, spectral_normalize, svc
from compiler.pieces import keep_

__all__ = ["MAPS", "Mappable", "chunks", "empty_basis", "keeps_vectors", "map_batch", "mapped", "peak"]


class Mappable(Protocol):
    """Matrices of one weight that are mapped for themselves."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(copies, out, in)."""
        ...

    @property
    def o(self) -> dict[str, Any]:
        """The options."""
        ...

    @property
    def key(self) -> tuple[Any, ...]:
        """Alike for all that are updated alike."""
        ...

    @property
    def vectors(self) -> Tensor | None:
        """Where SN keeps its own."""
        ...

    @property
    def warm(self) -> bool:
        """Whether SN may start from them."""
        ...

    @property
    def good(self) -> Tensor | None:
        """Whether the weight is updated, if only the device knows."""
        ...

    @property
    def working(self) -> torch.dtype:
        """The dtype to map in."""
        ...

    @property
    def device(self) -> torch.device:
        """Where they are."""
        ...


M = TypeVar("M", bound=Mappable)


def _tall(piece: Mappable) -> bool:
    return piece.sizes[1] > piece.sizes[2]


def _batch(piece: Mappable) -> tuple[Any, ...]:
    """What the pieces of one batch have in common."""
    _, out, into = piece.sizes
    if piece.o["map"] is None:
        return piece.key
    options = (piece.o["map"], piece.o["accuracy"], piece.o["strict"], piece.warm, piece.o["workspace"])
    return min(out, into), max(out, into), piece.working, piece.device, *options


def chunks(pieces: Sequence[M], size: Callable[[M], int] | None = None) -> Iterator[list[M]]:
    """The pieces in batches that keep within their workspace, but of at least one: of equal shape, or, without a map, of equal options.

    `size` is what one takes in bytes, `peak` of its Φ if not given.
    """
    batches: dict[tuple[Any, ...], list[M]] = {}
    for piece in pieces:
        batches.setdefault(_batch(piece), []).append(piece)
    for batch in batches.values():
        chunk, used = [], 0
        for piece in batch:
            needs = size(piece) if size else peak(piece.o, warm=piece.warm) * math.prod(piece.sizes) * piece.working.itemsize
            if chunk and used + needs > piece.o["workspace"]:
                yield chunk
                chunk, used = [], 0
            chunk.append(piece)
            used += needs
        yield chunk


def mapped(chunk: Sequence[Mappable], stacks: Sequence[Tensor]) -> list[Tensor]:
    """The update U of every piece of a chunk, as (copies, out, in), from Φ in that shape."""
    stack = torch.cat([(stack.mT if _tall(piece) else stack).to(piece.working) for piece, stack in zip(chunk, stacks, strict=True)])
    updates = map_batch(stack, chunk).split([piece.sizes[0] for piece in chunk])
    return [U.mT if _tall(piece) else U for piece, U in zip(chunk, updates, strict=True)]


def map_batch(stack: Tensor, pieces: Sequence[Mappable]) -> Tensor:
    """U of a batch (B, m, n), m ≤ n, of the matrices of these pieces."""
    return MAPS[pieces[0].o["map"]](stack, pieces)


def keeps_vectors(o: dict[str, Any]) -> bool:
    """Whether SN, with these options, keeps vectors."""
    return o["map"] == "sn" and not o["strict"]


def empty_basis(W: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Where SN keeps its vectors of a piece of W, before it has any: (copies, min(out, in), at most 16)."""
    m = min(sizes[1:])
    return W.new_zeros(sizes[0], m, min(VECTORS, m))


def _msign(stack: Tensor, pieces: Sequence[Mappable]) -> Tensor:
    return msign(stack, accuracy=pieces[0].o["accuracy"])


def _sn(stack: Tensor, pieces: Sequence[Mappable]) -> Tensor:
    if pieces[0].o["strict"]:
        return spectral_normalize(stack, strict=True)
    A, _, _ = power_of_two(stack)
    bases = [piece.vectors for piece in pieces if piece.vectors is not None]
    sigma, basis = ritz(A, torch.cat(bases) if pieces[0].warm else None)
    for piece, old, new in zip(pieces, bases, basis.split([piece.sizes[0] for piece in pieces]), strict=True):
        keep_(old, new, piece.good)
    return A / sigma.where(sigma > 0, 1)[:, None, None]


def _svc(stack: Tensor, pieces: Sequence[Mappable]) -> Tensor:
    scales = [float(piece.o["clip"] * piece.o["clip_scale"]) for piece in pieces]
    if len(set(scales)) == 1:
        return svc(stack, scales[0])
    filled = [stack.new_full(piece.sizes[:1], scale, dtype=torch.float64) for piece, scale in zip(pieces, scales, strict=True)]
    return svc(stack, torch.cat(filled))


MAPS: dict[str, Callable[[Tensor, Sequence[Mappable]], Tensor]] = {"msign": _msign, "sn": _sn, "svc": _svc}
"""Name -> the map of a stack of matrices (B, m, n), m ≤ n."""


def peak(o: dict[str, Any], *, warm: bool = False) -> int:
    """Temporary memory of a step in units of the Φ it takes at once, by measurement (tests/test_hazards.py), rounded up."""
    if o["map"] is None:
        return 6
    if keeps_vectors(o):
        return 8 if warm else 16  # small matrices: the space SN looks at first has 144 columns
    return 12 if o["map"] == "svc" or o["accuracy"] == "exact" else 10  # what is left to LAPACK is done in fp64
