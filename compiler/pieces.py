"""The parts of weights that one step updates: their base updates Φ, and writing them back, for all that share options at once.

On a CPU a weight with a spoilt gradient is left out by the host. Elsewhere the host never learns which these are: every piece carries
a flag on the device, and weight and buffers are written through it.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* are public operators by another name: torch.optim is made of them

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiler.bits import join, split
from compiler.gradients import Ready
from compiler.shards import Run
from compiler.updates import UPDATES, Direction, scale_

__all__ = ["Lane", "Piece", "advance", "directions", "keep_", "lanes", "subtract_", "write_"]


@dataclass
class Lane:
    """The options of one block of a group's weights in one step; lr = lr·lr_scale, decay = weight_decay·wd_scale.

    lr and decay are floats, or 0-d tensors where a schedule on the device may write them; no two lanes have the same key.
    """

    key: tuple[Any, ...]
    o: dict[str, Any]
    lr: float | Tensor
    decay: float | Tensor

    @property
    def coupled(self) -> bool:
        """Whether decay goes into the gradient, as in torch.optim.SGD."""
        return self.o["update"] == "sgd" and self.o["map"] is None

    @property
    def decays(self) -> bool:
        """Whether there is decay; a number on the device is not asked."""
        return isinstance(self.decay, Tensor) or self.decay != 0


@dataclass
class Piece:
    """A block of one weight in one step: views of shape (copies..., out..., in...), or the whole weight.

    Attributes:
        W, G, buffers, low: views; low holds the bits a bf16 weight lacks, if it is kept to fp32 precision.
        lane: its options.
        entry: its weight.
        sizes: (copies, out, in).
        vectors: where SN keeps its own.
        unit, run: what it is of a matrix that lies over ranks.
    """

    W: Tensor
    G: Tensor
    buffers: dict[str, Tensor]
    low: Tensor | None
    lane: Lane
    entry: Ready
    sizes: tuple[int, int, int]
    vectors: Tensor | None
    unit: int | None = None
    run: Run | None = None

    @property
    def good(self) -> Tensor | None:
        """None, or a flag on the device: whether it is updated at all."""
        return self.entry.good

    @property
    def warm(self) -> bool:
        """Whether SN may start from its vectors."""
        return self.entry.warm

    @property
    def o(self) -> dict[str, Any]:
        """The options."""
        return self.lane.o

    @property
    def key(self) -> tuple[Any, ...]:
        """Of its lane."""
        return self.lane.key

    @property
    def working(self) -> torch.dtype:
        """The dtype in which Φ is mapped."""
        return torch.promote_types(self.W.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.W.device


def lanes(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbours of one lane."""
    members: list[Piece] = []
    for piece in pieces:
        if members and members[0].lane.key != piece.lane.key:
            yield members
            members = []
        members.append(piece)
    if members:
        yield members


def advance(pieces: list[Piece]) -> Direction:
    """Advance the buffers of pieces of one lane; Φ, zero for those that are not good."""
    lane, masked = pieces[0].lane, pieces[0].good is not None
    G = [piece.G for piece in pieces]
    if masked:
        G = [torch.where(piece.good, g, 0) for piece, g in zip(pieces, G, strict=True)]  # pyright: ignore[reportArgumentType, reportCallIssue]
    if lane.o["maximize"]:
        G = list(torch._foreach_neg(G))
    if lane.coupled and lane.decays:
        weights = [_whole(piece) for piece in pieces]
        if isinstance(lane.decay, Tensor):
            G = [g + W * lane.decay for g, W in zip(G, weights, strict=True)]
        else:
            G = list(torch._foreach_add(G, weights, alpha=lane.decay))
    buffers = {name: [piece.buffers[name] for piece in pieces] for name in pieces[0].buffers}
    for held in buffers.values():
        G = [g.to(buffer.dtype) for g, buffer in zip(G, held, strict=True)]
    steps = [piece.entry.step for piece in pieces]
    if not masked:
        return UPDATES[lane.o["update"]](G, buffers, lane.o, steps)
    new = {name: [buffer.clone() for buffer in held] for name, held in buffers.items()}
    direction = UPDATES[lane.o["update"]](G, new, lane.o, steps)
    for name, held in buffers.items():
        for piece, buffer, after in zip(pieces, held, new[name], strict=True):
            keep_(buffer, after, piece.good)
    return direction


def directions(pieces: list[Piece]) -> list[Tensor]:
    """Advance the buffers of pieces of any lanes; the Φ of each, read only."""
    return [direction for members in lanes(pieces) for direction in advance(members).tensors()]


def write_(pieces: list[Piece], direction: Direction) -> None:
    """W ← (1 - lr·decay)·W - lr·Φ for pieces of one lane; those that are not good keep every bit."""
    lane = pieces[0].lane
    apart = pieces[0].low is not None or pieces[0].good is not None
    weights = [_whole(piece, copy=True) if apart else piece.W for piece in pieces]
    if lane.decays and not lane.coupled:
        scale_(weights, 1 - lane.lr * lane.decay)
    direction.subtract_from_(weights, lane.lr)
    if not apart:
        return
    for piece, W in zip(pieces, weights, strict=True):
        if piece.low is None:
            keep_(piece.W, W, piece.good)
        else:
            high, low = split(W)
            keep_(piece.W, high, piece.good)
            keep_(piece.low, low, piece.good)


def subtract_(pieces: list[Piece], updates: Sequence[Tensor]) -> None:
    """W ← (1 - lr·decay)·W - lr·U, piece by piece of any lanes, U of any shape."""
    done = 0
    for members in lanes(pieces):
        shaped = [U.reshape(piece.W.shape) for piece, U in zip(members, updates[done : done + len(members)], strict=True)]
        write_(members, Direction(shaped))
        done += len(members)


def keep_(old: Tensor, new: Tensor, good: Tensor | None) -> None:
    """Write new over old where good."""
    old.copy_(new if good is None else torch.where(good, new, old))


def _whole(piece: Piece, *, copy: bool = False) -> Tensor:
    """The weight to the precision it is kept in."""
    if piece.low is not None:
        return join(piece.W, piece.low)
    return piece.W.clone() if copy else piece.W
