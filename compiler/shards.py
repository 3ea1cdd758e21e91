"""How a weight lies over ranks, which part of which of its matrices each rank holds, and who maps which matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup, get_rank, get_world_size
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from compiler.blocks import ORDER, Axes, block_view
from compiler.errors import NotShardable

__all__ = ["UNASSIGNED", "Run", "Sharding", "Unit", "assign", "local", "local_bounds", "placements", "runs", "sharding_of", "units_of"]


UNASSIGNED = -1


def local(T: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return T.to_local() if isinstance(T, DTensor) else T


def placements(T: Tensor) -> tuple[Placement, ...]:
    """Where a DTensor lies on its mesh; () for any other tensor."""
    return tuple(T.placements) if isinstance(T, DTensor) else ()


@dataclass(frozen=True)
class Sharding:
    """A weight over the ranks of a group: rank r holds bounds[r] = [from, to) of tensor axis `axis`; axis None: each holds it all."""

    axis: int | None
    bounds: tuple[tuple[int, int], ...]
    group: ProcessGroup
    rank: int


def local_bounds(size: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """The ranges of `torch.chunk`, which DTensor's Shard follows: all of one length but the last; the last may be empty.

    >>> local_bounds(5, 4)
    ((0, 2), (2, 4), (4, 5), (5, 5))
    """
    chunk = -(-size // ranks)
    return tuple((min(size, r * chunk), min(size, (r + 1) * chunk)) for r in range(ranks))


def sharding_of(name: str, W: Tensor, shared: ProcessGroup | None = None) -> Sharding | None:
    """How W lies over ranks; None if this rank can map all of it for itself.

    Args:
        name: for the error.
        W: a tensor or a DTensor.
        shared: the group whose ranks hold the same replicated weights and share the work on them.

    Raises:
        NotShardable: for FSDP1's flat parameters, partial sums, strided shards, or shards along more than one mesh axis.
    """
    if getattr(W, "_is_flat_param", False) or getattr(W, "_fsdp_flattened", False):
        raise NotShardable(name, "is part of a flat parameter of FSDP1, which has no matrices", "shard the model with fully_shard (FSDP2)")
    split: list[tuple[int, Any]] = []
    if isinstance(W, DTensor):
        mesh = W.device_mesh
        split = [(dim, p) for dim, p in enumerate(W.placements) if mesh.size(dim) > 1 and not isinstance(p, Replicate)]
        odd = [p for _, p in split if type(p) is not Shard]
        if odd:
            raise NotShardable(name, f"has the placement {odd[0]!r}", "redistribute it to Shard or Replicate first")
    if not split:
        return None if shared is None else Sharding(None, ((0, 0),) * get_world_size(shared), shared, get_rank(shared))
    if len(split) > 1:
        cure = "keep one Shard per weight: FSDP2 or HSDP without tensor parallelism on this weight, or map=None for it"
        raise NotShardable(name, f"is sharded along {len(split)} axes of its mesh, {W.placements}", cure)  # pyright: ignore[reportAttributeAccessIssue]
    [(dim, placement)] = split
    axis = placement.dim % W.ndim
    found = Sharding(axis, local_bounds(W.size(axis), mesh.size(dim)), mesh.get_group(dim), mesh.get_local_rank(dim))  # pyright: ignore[reportPossiblyUnboundVariable]
    first, last = found.bounds[found.rank]
    if local(W).size(axis) != last - first:
        raise NotShardable(name, f"has {local(W).size(axis)} rows here, not {last - first}", "use fully_shard or distribute_tensor")
    return found


class Range(NamedTuple):
    """Consecutive entries of a tensor axis that are a box of factors: entries, layout, and where the box begins in the block."""

    first: int
    last: int
    factors: list[list[Any]]
    begins: list[int]


def runs(factors: Iterable[Iterable[Any]], first: int, last: int) -> Iterator[Range]:
    """The entries of a block among [first, last) of an axis, in as few boxes as it takes: at most two per factor, and one.

    >>> [(r.first, r.last, r.begins) for r in runs([[3, "copy", 1, 3], [4, "out", 0, 4]], 2, 10)]
    [(4, 8, [0, 0]), (8, 10, [1, 0])]
    """
    factors = [list(factor) for factor in factors]
    if first >= last:
        return
    if not factors:
        yield Range(first, last, [], [])
        return
    [_, part, start, stop], *inner = factors
    stride = math.prod(factor[0] for factor in inner)
    low, high = -(-first // stride), last // stride
    if low > high:  # within one index
        yield from _inside(part, start, stop, inner, high, first - high * stride, last - high * stride)
        return
    if first < low * stride:
        yield from _inside(part, start, stop, inner, low - 1, first - (low - 1) * stride, stride)
    a, b = max(low, start), min(high, stop)
    if a < b:
        yield Range(a * stride, b * stride, [[b - a, part, 0, b - a], *inner], [a - start, *(0 for _ in inner)])
    if high * stride < last:
        yield from _inside(part, start, stop, inner, high, 0, last - high * stride)


def _inside(part: str, start: int, stop: int, inner: list[list[Any]], index: int, first: int, last: int) -> Iterator[Range]:
    """The boxes within one index of the leading factor."""
    if start <= index < stop:
        offset = index * math.prod(factor[0] for factor in inner)
        for box in runs(inner, first, last):
            yield Range(offset + box.first, offset + box.last, [[1, part, 0, 1], *box.factors], [index - start, *box.begins])


@dataclass(frozen=True)
class Run:
    """A box of a unit in one rank's shard.

    Attributes:
        narrows: per tensor axis (start, length) in the local tensor.
        axes: the layout of that part.
        begins: per factor in the order of `block_view`, where the box begins in the unit.
        extents: its size there.
        copies: how many matrices it has entries of.
    """

    narrows: tuple[tuple[int, int], ...]
    axes: Axes
    begins: tuple[int, ...]
    extents: tuple[int, ...]
    copies: int

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.extents)

    def view(self, T: Tensor) -> Tensor:
        """The box as a view of the local tensor, shaped `extents`."""
        for axis, (start, length) in enumerate(self.narrows):
            T = T.narrow(axis, start, length)
        return block_view(T, self.axes)[0]

    def place(self, stack: Tensor) -> Tensor:
        """The box as a view of the unit, a tensor shaped as `Unit.extents`."""
        for axis, (begin, extent) in enumerate(zip(self.begins, self.extents, strict=True)):
            stack = stack.narrow(axis, begin, extent)
        return stack


@dataclass(frozen=True)
class Unit:
    """Whole matrices that are mapped together by one rank: a block of a weight, or some of its copies.

    Attributes:
        weight: the position of the weight in the optimizer.
        block: the number of the block.
        parts: per factor "copy", "out", "in" or "lookup", in the order of `block_view`; extents: the sizes of these factors.
        sizes: (copies, out, in).
        runs: per rank what it holds.
        owner: the rank that maps; UNASSIGNED until `assign`.
        replicated: whether every rank holds everything.
    """

    weight: int
    block: int
    parts: tuple[str, ...]
    extents: tuple[int, ...]
    sizes: tuple[int, int, int]
    runs: tuple[tuple[Run, ...], ...]
    owner: int
    replicated: bool

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.extents)

    @property
    def cost(self) -> int:
        """Multiplications of a product of Gram matrices, up to a constant: copies·max·min²."""
        copies, out, into = self.sizes
        return copies * max(out, into) * min(out, into) ** 2


def units_of(weight: int, block: int, axes: Axes, shape: Iterable[int], sharding: Sharding, *, whole: bool = False) -> list[Unit]:
    """The units of a block: copies that one rank holds are its own; those that several hold, or all, are yet to be assigned.

    Args:
        weight: its position.
        block: its number.
        axes: the layout of the block.
        shape: the global shape of the weight.
        sharding: how it lies over ranks.
        whole: keep all copies in one unit.
    """
    shape = tuple(shape)
    found = []
    for split, first, last in [(None, 0, 0)] if whole else _atoms(axes, shape, sharding):
        windows = [(0, size) for size in shape]
        if split is not None:
            windows[split] = (first, last)
        found.append(_unit(weight, block, axes, windows, sharding))
    return found


def _atoms(axes: Axes, shape: tuple[int, ...], sharding: Sharding) -> list[tuple[int | None, int, int]]:
    """(axis, from, to): the ranges of copies that are not divided further."""
    leads = [axis for axis, factors in enumerate(axes) if factors and factors[0][1] == "copy"]
    if not leads:
        return [(None, 0, 0)]
    split = sharding.axis if sharding.axis in leads else leads[0]
    size, _, start, stop = axes[split][0]
    stride = shape[split] // size
    if split == sharding.axis:  # whole in one shard, or cut by a boundary between shards
        inside = [(max(start, -(-a // stride)), min(stop, b // stride)) for a, b in sharding.bounds]
    else:
        inside = [(start + a, start + b) for a, b in local_bounds(stop - start, len(sharding.bounds))]
    inside = [(a, b) for a, b in inside if a < b]
    edges = [start, *(edge for pair in inside for edge in pair), stop]
    cut = [(i, i + 1) for a, b in zip(edges[::2], edges[1::2], strict=True) for i in range(a, b)]
    return [(split, a * stride, b * stride) for a, b in sorted(inside + cut)]


def _unit(weight: int, block: int, axes: Axes, windows: list[tuple[int, int]], sharding: Sharding) -> Unit:
    [box] = product(*(runs(factors, *window) for factors, window in zip(axes, windows, strict=True)))
    flat = [factor for axis in box for factor in axis.factors]
    order = [i for part in ORDER for i, factor in enumerate(flat) if factor[1] == part]
    origin = [begin for axis in box for begin in axis.begins]
    extents = tuple(flat[i][3] - flat[i][2] for i in order)
    parts = tuple(flat[i][1] for i in order)
    held = []
    for low, high in sharding.bounds:
        mine, shift = list(windows), [0] * len(windows)
        if sharding.axis is not None:
            a, b = windows[sharding.axis]
            mine[sharding.axis], shift[sharding.axis] = (max(a, low), min(b, high)), low
        boxes = product(*(runs(factors, *window) for factors, window in zip(axes, mine, strict=True)))
        held.append(tuple(_run(box, shift, order, origin) for box in boxes))
    holders = [rank for rank, some in enumerate(held) if some]
    size = {part: math.prod(e for e, p in zip(extents, parts, strict=True) if p == part) for part in ORDER}
    sizes = size["copy"], size["out"], size["in"] * size["lookup"]
    owner = holders[0] if len(holders) == 1 else UNASSIGNED
    return Unit(weight, block, parts, extents, sizes, tuple(held), owner, sharding.axis is None)


def _run(box: tuple[Range, ...], shift: list[int], order: list[int], origin: list[int]) -> Run:
    flat = [factor for axis in box for factor in axis.factors]
    begins = [begin for axis in box for begin in axis.begins]
    extents = tuple(flat[i][3] - flat[i][2] for i in order)
    copies = math.prod(extent for i, extent in zip(order, extents, strict=True) if flat[i][1] == "copy")
    narrows = tuple((axis.first - offset, axis.last - axis.first) for axis, offset in zip(box, shift, strict=True))
    return Run(narrows, [axis.factors for axis in box], tuple(begins[i] - origin[i] for i in order), extents, copies)


def assign(units: list[Unit], ranks: int) -> list[Unit]:
    """Every unit with an owner: the costliest first, each to the rank with the least to do (Graham 1969, LPT: within 4/3 of the best)."""
    loads = [0] * ranks
    for unit in units:
        if unit.owner != UNASSIGNED:
            loads[unit.owner] += unit.cost
    out = list(units)
    for i in sorted((i for i, unit in enumerate(units) if unit.owner == UNASSIGNED), key=lambda i: -units[i].cost):
        owner = loads.index(min(loads))
        loads[owner] += units[i].cost
        out[i] = replace(units[i], owner=owner)
    return out
