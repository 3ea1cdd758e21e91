"""Blocks of a weight as stacks of matrices: views into the weight, shaped (copies, out, in).

A block is a map of its own: q of a fused q‖k‖v, one parity of interleaved rows. Its layout is plain data: per weight axis the list
of its factors, outermost first, each `[size, part, start, stop]` with part "in", "out", "copy" or "lookup" (`scaling.records.Factor`
with numbers for sizes). Everything here is a view; only `matrices` may copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from compiler.errors import BadOption
from scaling.records import Block

__all__ = ["Axes", "axes_of", "block_view", "check_axes", "covers", "matrices", "plain"]

Axes = Sequence[Sequence[Sequence[Any]]]
ORDER = ("copy", "out", "in", "lookup")


def axes_of(block: Block, at: Any) -> list[list[list[Any]]]:
    """The layout of a block as plain data, with `at(expression)` for the numbers."""
    return [[[int(at(f.size)), f.part, int(at(f.start)), int(at(f.stop))] for f in axis] for axis in block.axes]


def plain(shape: Sequence[int]) -> list[list[list[Any]]]:
    """The layout of a weight that is one (out, in) matrix."""
    return [[[shape[0], "out", 0, shape[0]]], [[shape[1], "in", 0, shape[1]]]]


def covers(axes: Axes, shape: Sequence[int]) -> bool:
    """Whether the block is all of a weight of that shape."""
    return math.prod([stop - start for axis in axes for _, _, start, stop in axis]) == math.prod(shape)


def check_axes(axes: Axes, shape: Sequence[int]) -> None:
    """Refuse a layout that does not fit.

    Raises:
        BadOption: if the factors do not multiply to the shape, leave their range, or name an unknown part.
    """
    fits = len(axes) == len(shape) and all(math.prod(f[0] for f in axis) == size for axis, size in zip(axes, shape, strict=True))
    fits = fits and all(part in ORDER and 0 <= start < stop <= size for axis in axes for size, part, start, stop in axis)
    if not fits:
        raise BadOption("blocks", axes, f"one list of [size, part, start, stop] per axis of shape {tuple(shape)}")


def block_view(W: Tensor, axes: Axes) -> tuple[Tensor, tuple[int, int, int]]:
    """The block as a view of W with its axes in the order copies, out, in.

    Returns:
        The view, one axis per factor; and (copies, out, in), the sizes to flatten it to. Indices that are looked up count as "in".
    """
    for axis in reversed(range(len(axes))):
        factors = axes[axis]
        if len(factors) == 0:
            W = W.squeeze(axis)
        elif len(factors) > 1:
            W = W.unflatten(axis, [f[0] for f in factors])
    flat = [factor for axis in axes for factor in axis]
    for axis, (_, _, start, stop) in enumerate(flat):
        W = W.narrow(axis, start, stop - start)
    W = W.permute([axis for part in ORDER for axis, factor in enumerate(flat) if factor[1] == part])
    sizes = {part: math.prod([stop - start for _, of, start, stop in flat if of == part]) for part in ORDER}
    return W, (sizes["copy"], sizes["out"], sizes["in"] * sizes["lookup"])


def matrices(view: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """The block as (copies, out, in): a view where strides allow, else a copy."""
    return view.reshape(sizes)
