"""The layout of a step, kept for the next: which parts of which weights the kernels take in which batch.

It holds no tensor between steps, so that gradients and state can be freed or moved, and serves until a shape, stride, dtype or option
that it was made from is another one. What a host of a GPU saves by it is most of what it does in a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiler.bits import LOW
from compiler.fused import Mapped, Plain
from compiler.gradients import Ready
from compiler.pieces import Lane, Piece

__all__ = ["Layout", "Prepared", "layout_of"]

Layout = tuple[Any, ...]

OPTIONS = ("update", "map", "accuracy", "strict", "maximize", "capturable", "master", "workspace", "blocks")
"""What batches are made by; all other options are read anew in every step."""


def layout_of(entries: Sequence[Ready]) -> Layout:
    """What the batches of a step follow from."""
    groups = {entry.number: entry.group for entry in entries}
    options = [(number, group["momentum"] != 0, *(group[name] for name in OPTIONS)) for number, group in groups.items()]
    return (*options, *(_of(entry) for entry in entries))


def _of(entry: Ready) -> tuple[Any, ...]:
    W, G = entry.W, entry.W.grad
    buffers = [(name, T.dtype, T.stride()) for name, T in entry.state.items() if isinstance(T, Tensor)]
    return entry.position, entry.warm, W.device, W.dtype, W.shape, W.stride(), None if G is None else (G.dtype, G.stride()), *buffers


_View = tuple[torch.Size, tuple[int, ...], int]
"""Shape, strides and offset of a part of a tensor."""


@dataclass
class _Place:
    """A piece, its weight among those of the step, what it has besides, and which parts of W, G and them it is."""

    piece: Piece
    index: int
    names: tuple[str, ...]
    low: bool
    vectors: str | None
    views: list[_View | None]

    def fill(self, entry: Ready) -> None:
        """Take the tensors of this step."""
        piece, state = self.piece, entry.state
        piece.entry, piece.W, piece.G, piece.buffers = entry, entry.W, _gradient(entry), {name: state[name] for name in self.names}
        piece.low = state[LOW] if self.low else None
        if any(self.views):
            W, G, *buffers = self.views
            piece.low = None if piece.low is None else _viewed(piece.low, buffers.pop())
            piece.W, piece.G = _viewed(piece.W, W), _viewed(piece.G, G)
            piece.buffers = {name: _viewed(T, view) for (name, T), view in zip(piece.buffers.items(), buffers, strict=True)}
        piece.vectors = None if self.vectors is None else state[self.vectors]

    def clear(self) -> None:
        """Let go of them."""
        piece = self.piece
        del piece.W, piece.G, piece.buffers, piece.low, piece.entry, piece.vectors


def _gradient(entry: Ready) -> Tensor:
    assert entry.W.grad is not None
    return entry.W.grad


def _view(part: Tensor, whole: Tensor) -> _View | None:
    return None if part is whole else (part.shape, part.stride(), int(part.storage_offset() - whole.storage_offset()))


def _viewed(T: Tensor, view: _View | None) -> Tensor:
    return T if view is None else T.as_strided(view[0], view[1], T.storage_offset() + view[2])


class Prepared:
    """The batches of one step, for the next.

    Args:
        layout: what they were made from.
        ready: the weights of the step.
        pieces: of those weights of which the kernels take all.
        batches: of these pieces.
    """

    def __init__(self, layout: Layout, ready: Sequence[Ready], pieces: Sequence[Piece], batches: list[Mapped | Plain]) -> None:
        self.layout, self.batches = copy.deepcopy(layout), batches  # the options in it may be written in place
        index = {entry.position: i for i, entry in enumerate(ready)}
        self._places, lanes, members = [], {}, {}
        for piece in pieces:
            i, names = index[piece.entry.position], tuple(piece.buffers)
            parts = [piece.W, piece.G, *piece.buffers.values(), *([] if piece.low is None else [piece.low])]
            state = [piece.entry.state[name] for name in (*names, *([] if piece.low is None else [LOW]))]
            views = [_view(*pair) for pair in zip(parts, (piece.entry.W, _gradient(piece.entry), *state), strict=True)]
            vectors = None if piece.vectors is None else f"basis{piece.lane.key[-1]}"
            self._places.append(_Place(piece, i, names, piece.low is not None, vectors, views))
            lanes.setdefault(piece.lane.key, (i, piece.lane))
            members.setdefault(piece.entry.number, {})[i] = None
        self._lanes: list[tuple[int, Lane]] = list(lanes.values())
        self._groups: list[list[int]] = [list(group) for group in members.values()]
        self._taken = {place.index for place in self._places}
        self.clear()

    def fill(self, ready: Sequence[Ready], lane_: Callable[[Lane, Ready], None], count_: Callable[[list[Ready]], None]) -> list[Ready]:
        """Take the tensors of this step.

        Args:
            ready: the weights of the step, in the layout that this was made for.
            lane_: brings a lane's options up to date, from a weight of its group.
            count_: counts the step of the weights of a group.

        Returns:
            The weights that are not in the batches.
        """
        for i, lane in self._lanes:
            lane_(lane, ready[i])
        for group in self._groups:
            count_([ready[i] for i in group])
        for place in self._places:
            place.fill(ready[place.index])
        return [entry for i, entry in enumerate(ready) if i not in self._taken]

    def clear(self) -> None:
        """Let go of all tensors."""
        for place in self._places:
            place.clear()
