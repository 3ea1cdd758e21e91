"""Sums over products: linear, matmul, einsum, convolutions; √n of independent terms, n of aligned ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch

from scaling.graph import Call
from scaling.operators import Binding, _spread, bind
from scaling.orders import NOTHING, ZERO, Exponent, Pieces, State, joined, least, plus, shared, top, zipped
from scaling.propagation.context import HALF, Context, Pull, Result, Values, largest, shape_of
from scaling.propagation.moving import moves
from scaling.propagation.reductions import over, sum_of

__all__ = ["contract", "contraction", "handed_back"]


def _bound(matrix: State, summed: Fraction, own: Fraction) -> Exponent:
    """What a random matrix makes of a vector that is aligned with it: ‖A‖₂ = a·(√summed + √own) (THEORY 1.3), or its mean."""
    return top(plus(matrix.init, summed * HALF + max(ZERO, (summed - own) * HALF)), plus(matrix.mean, summed))


def contract(a: State, b: State, summed: Fraction, own_a: Fraction, own_b: Fraction) -> State:
    """Σ a·b over d**summed terms, where a has d**own_a rows that b does not share, and b d**own_b."""
    independent = top(plus(a.init, b.init, summed * HALF), plus(a.mean, b.mean, summed))
    aligned = least(plus(_bound(a, summed, own_a), b.init), plus(_bound(b, summed, own_b), a.init))
    init = top(independent, aligned) if shared(a, b) else independent
    change = top(
        plus(_bound(b, summed, own_b), a.change),
        plus(_bound(a, summed, own_a), b.change),
        plus(a.change, b.change, summed),
    )
    if own_b and not own_a:
        mean, roots = plus(a.init, b.mean, summed), b.roots
    elif own_a and not own_b:
        mean, roots = plus(b.init, a.mean, summed), a.roots
    else:
        mean, roots = init if shared(a, b) else plus(a.mean, b.mean, summed), a.roots | b.roots
    return State.of(init, least(mean, init), change, roots)


def handed_back(context: Context, matrix: State, summed: Fraction, own: Fraction) -> Exponent:
    """What the transposed matrix makes of a gradient: independent of it at init, aligned with it after training."""
    if not context.trained:
        return top(plus(matrix.init, summed * HALF), plus(matrix.mean, summed) if matrix.mean != NOTHING else NOTHING)
    return top(_bound(matrix, summed, own), plus(matrix.change, summed))


@dataclass(frozen=True)
class _Side:
    """One factor of a contraction: its pieces, and the axis of it along which rows (own) and columns (summed) may differ."""

    binding: Binding
    value: Pieces[State]
    own: Fraction
    row: int | None
    column: int | None

    def part(self, row: slice, column: slice) -> State:
        where = [slice(None)] * len(self.binding.axes)
        if self.row is not None:
            where[self.row] = row
        if self.column is not None:
            where[self.column] = column
        return self.value.within(tuple(where), joined)


def contraction(context: Context, call: Call, values: Values) -> Result | None:
    """Operators with a signature: linear, matmul, einsum, convolutions."""
    bound = bind(call, context.growth.axes)
    if bound is None:
        return None
    bindings, signature, *_ = bound
    of = dict(zip(call.tensors, values, strict=True))
    factors = [b for b in bindings if not b.added and of.get(b.node) is not None]
    terms = [b for b in bindings if b.added and of.get(b.node) is not None]
    output = _spread(signature.output, len(call.shape))
    if output is None:
        return None
    kept = {label.name for axis in output for label in axis}
    if len(factors) == 1 and not terms:
        return _alone(context, call, values, factors[0], kept)
    if len(factors) != 2:
        return None
    out, pull = _product(context, call, [(b, of[b.node]) for b in factors], kept, output)  # pyright: ignore[reportArgumentType]
    for term in terms:
        added = of[term.node]
        assert added is not None
        trailing = len(term.axes) <= 1 and (output[-1] == tuple(label for label, _ in term.axes[0]) if term.axes else True)
        out = zipped(lambda x, y: joined((x, y)), out, added if trailing else Pieces.of(added.whole(joined)), shape_of(call))

    def pulled(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        to_a, to_b = pull(d)
        back = {factors[1].node: to_b} | {factors[0].node: to_a}
        for term in terms:
            back[term.node] = _added_back(context, call, term, d)
        return [back.get(node) if node is not None else None for node in call.tensors]

    return out, pulled


def _alone(context: Context, call: Call, values: Values, factor: Binding, kept: set[str]) -> Result | None:
    """Einsum of one operand: its axes in another order, or sums over those that are gone."""
    gone = {label.name: dim for axis in factor.axes for label, dim in axis if label.name not in kept}
    if not gone:
        return moves(context, call, values)
    order = sum((context.order(dim) for dim in gone.values()), ZERO)
    return over(values, lambda x: sum_of(x, order), lambda x: ZERO)


def _added_back(context: Context, call: Call, term: Binding, d: Pieces[Exponent]) -> Pieces[Exponent]:
    """A bias' gradient: one per output coordinate, so it keeps the parts of the last axis."""
    rest = context.gathered(max(context.orders(call.node) - context.orders(term.node), ZERO))
    if d.labels is not None and len(term.axes) == 1 and term.node.meta["val"].shape[-1] == d.labels.shape[-1]:
        rows = d.labels.reshape(-1, d.labels.shape[-1])
        if bool((rows == rows[0]).all()):
            return Pieces.labelled([plus(e, rest) for e in d.parts], rows[0])
    return Pieces.of(plus(d.whole(largest), rest))


def _product(
    context: Context, call: Call, factors: list[tuple[Binding, Pieces[State]]], kept: set[str], output: Any
) -> tuple[Pieces[State], Pull]:
    orders, names = {}, []
    for binding, _ in factors:
        letters = {label.name: dim for axis in binding.axes for label, dim in axis if label.name != "_"}
        names.append(set(letters))
        for name, dim in letters.items():
            orders[name] = max(orders.get(name, ZERO), context.order(dim))
    summed = sum((order for name, order in orders.items() if name not in kept), ZERO)
    sides = []
    for i, (binding, value) in enumerate(factors):
        own = names[i] - names[1 - i]
        row = _axis_with(binding, value, lambda name, own=own: name in own and name in kept)
        column = _axis_with(binding, value, lambda name: name not in kept and name != "_")
        sides.append(_Side(binding, value, sum((orders[n] for n in own if n in kept), ZERO), row, column))
    a, b = sides
    if b.column is None and a.column is not None and b.value.labels is None:
        a, b = b, a  # the pieces lie along a's axis
    place = next((i for i, axis in enumerate(output) if b.row is not None and axis == tuple(n for n, _ in b.binding.axes[b.row])), None)
    if place is None:
        b = _Side(b.binding, b.value, b.own, None, b.column)
    columns = _columns(context, a, b, summed)
    whole = slice(None)

    def row_order(row: slice) -> Fraction:
        if b.row is None or row == whole or len(b.binding.axes[b.row]) != 1:
            return b.own
        dim = b.binding.axes[b.row][0][1]
        return b.own - context.order(dim) + context.extent(dim, row.start, row.stop)

    rows = _runs(b.value.cuts(b.row), call.shape[place][0]) if b.row is not None and place is not None else [whole]
    made = [
        joined([contract(_column(a, col_a), b.part(row, col_b), k, a.own, row_order(row)) for col_a, col_b, k in columns]) for row in rows
    ]
    out = _in_rows(made, rows, place, shape_of(call))

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        cuts: list[int] = sorted(
            {*(b.value.cuts(b.row) if b.row is not None else []), *(d.cuts(place) if place is not None and d.labels is not None else [])}
        )
        parts = _runs(cuts, call.shape[place][0]) if place is not None and cuts else [whole]
        at = [d.within(tuple(row if i == place else whole for i in range(len(call.shape))), largest) for row in parts]
        to_a = []
        for _, col_b, k in columns:
            back = [plus(e, handed_back(context, b.part(row, col_b), row_order(row), k)) for e, row in zip(at, parts, strict=True)]
            to_a.append(top(*back))
        to_b = [[plus(e, handed_back(context, _column(a, col_a), a.own, k)) for col_a, _, k in columns] for e in at]
        given_a = _in_rows(to_a, [col for col, _, _ in columns], a.column, tuple(a.binding.node.meta["val"].shape))
        given_b = _in_grid(to_b, parts, [col for _, col, _ in columns], b, tuple(b.binding.node.meta["val"].shape))
        return [given_a, given_b] if a.binding is factors[0][0] else [given_b, given_a]

    return out, pull


def _column(side: _Side, column: slice) -> State:
    return side.part(slice(None), column)


def _axis_with(binding: Binding, value: Pieces[State], wanted: Callable[[str], bool]) -> int | None:
    """The axis of a factor with letters of one kind: the one along which it has parts, or the longest."""
    axes = [i for i, axis in enumerate(binding.axes) if axis and all(wanted(label.name) for label, _ in axis)]
    parted = [i for i in axes if value.cuts(i)]
    shape = binding.node.meta["val"].shape
    return parted[0] if parted else max(axes, key=lambda i: shape[i], default=None)


def _columns(context: Context, a: _Side, b: _Side, summed: Fraction) -> list[tuple[slice, slice, Fraction]]:
    """The parts of the axis that is summed over, as a slice of either factor, and the power of d in their lengths."""
    whole = slice(None)
    if a.column is None or b.column is None:
        return [(whole, whole, summed)]
    mine, other = a.binding.axes[a.column], b.binding.axes[b.column]
    if [label.name for label, _ in mine] != [label.name for label, _ in other] or len(mine) != 1:
        return [(whole, whole, summed)]
    cuts = sorted({*a.value.cuts(a.column), *b.value.cuts(b.column)})
    if not cuts:
        return [(whole, whole, summed)]
    dim = mine[0][1]
    length = a.binding.node.meta["val"].shape[a.column]
    return [(run, run, summed - context.order(dim) + context.extent(dim, run.start, run.stop)) for run in _runs(cuts, length)]


def _runs(cuts: list[int], length: int) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise([0, *cuts, length])] if cuts else [slice(None)]


def _in_rows(parts: Sequence[Any], rows: Sequence[slice], axis: int | None, shape: tuple[int, ...]) -> Pieces[Any]:
    if len(parts) == 1 or axis is None:
        return Pieces.of(parts[0] if len(parts) == 1 else joined(parts) if isinstance(parts[0], State) else top(*parts))
    line = torch.zeros(shape[axis], dtype=torch.int16)
    for i, row in enumerate(rows):
        line[row] = i
    return Pieces.labelled(parts, line.reshape([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape))


def _in_grid(parts: list[list[Exponent]], rows: list[slice], columns: list[slice], side: _Side, shape: tuple[int, ...]) -> Pieces[Exponent]:
    labels = torch.zeros(shape, dtype=torch.int16) if len(rows) * len(columns) > 1 else None
    flat = [e for row in parts for e in row]
    if labels is None:
        return Pieces.of(flat[0])
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            where = [slice(None)] * len(shape)
            if side.row is not None:
                where[side.row] = row
            if side.column is not None:
                where[side.column] = column
            labels[tuple(where)] = i * len(columns) + j
    return Pieces.labelled(flat, labels)
