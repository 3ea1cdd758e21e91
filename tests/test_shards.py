"""Which part of which matrix each rank holds: boxes partition every shard of every layout; owners are balanced."""

import math
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.blocks import block_view
from compiler.shards import UNASSIGNED, Sharding, assign, local_bounds, runs, units_of

SMALL = settings(max_examples=60, deadline=None)


@st.composite
def layouts(draw):
    """The layout of a block, and the tensor's shape."""
    axes = []
    for _ in range(draw(st.integers(1, 3))):
        factors = []
        for _ in range(draw(st.integers(0, 3))):
            size = draw(st.integers(1, 4))
            start = draw(st.integers(0, size - 1))
            part = draw(st.sampled_from(["copy", "out", "in", "lookup"]))
            factors.append([size, part, start, draw(st.integers(start + 1, size))])
        axes.append(factors)
    return axes, tuple(math.prod(f[0] for f in factors) for factors in axes)


@SMALL
@given(layouts(), st.integers(1, 4), st.data())
def test_the_runs_of_all_ranks_put_every_unit_together(layout, ranks, data):
    axes, shape = layout
    axis = data.draw(st.integers(0, len(shape) - 1))
    W = torch.arange(math.prod(shape)).view(shape)
    sharding = Sharding(axis, local_bounds(shape[axis], ranks), None, 0)
    shards = [W.narrow(axis, a, b - a) for a, b in sharding.bounds]
    units = units_of(0, 0, axes, shape, sharding, whole=data.draw(st.booleans()))
    seen = []
    for unit in units:
        stack = torch.full(unit.extents, -1)
        for shard, held in zip(shards, unit.runs, strict=True):
            for run in held:
                run.place(stack).copy_(run.view(shard))
        assert (stack >= 0).all()
        assert math.prod(unit.sizes) == stack.numel()
        seen.append(stack.flatten())
        if unit.owner != UNASSIGNED:
            assert [bool(held) for held in unit.runs].count(True) == 1
    view, _ = block_view(W, axes)
    assert torch.equal(torch.cat(seen).sort().values, view.flatten().sort().values)
    if len(units) == 1:
        assert torch.equal(seen[0], view.flatten())


@SMALL
@given(layouts(), st.data())
def test_a_range_of_an_axis_is_few_boxes(layout, data):
    axes, shape = layout
    first = data.draw(st.integers(0, shape[0]))
    last = data.draw(st.integers(first, shape[0]))
    boxes = list(runs(axes[0], first, last))
    assert len(boxes) <= max(1, 2 * len(axes[0]) - 1)
    assert all(first <= a.first < a.last <= last for a in boxes)
    assert all(a.last <= b.first for a, b in pairwise(boxes))


def test_whole_experts_are_mapped_where_they_lie_and_cut_ones_are_shared():
    axes = [[[6, "copy", 0, 6]], [[4, "out", 0, 4]], [[5, "in", 0, 5]]]
    even = units_of(0, 0, axes, (6, 4, 5), Sharding(0, local_bounds(6, 3), None, 0))
    assert [(u.owner, u.sizes) for u in even] == [(r, (2, 4, 5)) for r in range(3)]
    flat = [[[3, "copy", 0, 3], [4, "out", 0, 4]], [[5, "in", 0, 5]]]
    cut = units_of(0, 0, flat, (12, 5), Sharding(0, local_bounds(12, 2), None, 0))
    assert [u.owner for u in cut] == [0, UNASSIGNED, 1]
    along = units_of(0, 0, axes, (6, 4, 5), Sharding(1, local_bounds(4, 4), None, 0))
    assert [(u.owner, u.sizes[0]) for u in along] == [(UNASSIGNED, 2)] * 3  # six experts in at most four parts


def test_owners_are_balanced_by_cost():
    shapes = [(64, 256), (64, 64), (64, 64), (256, 64), (64, 128), (128, 64), (64, 64), (64, 64), (64, 256)]
    units = []
    for i, (m, n) in enumerate(shapes):
        units += units_of(i, 0, [[[m, "out", 0, m]], [[n, "in", 0, n]]], (m, n), Sharding(0, local_bounds(m, 4), None, 0))
    loads = [0] * 4
    for unit in assign(units, 4):
        loads[unit.owner] += unit.cost
    assert max(loads) <= 4 / 3 * max(sum(loads) / 4, max(u.cost for u in units))
    assert assign(units, 4) == assign(units, 4)
