"""Uses and growth -> one WeightRule per weight: its blocks with their fans, its ties, and what contractions fold into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product as combinations

import sympy
from torch import fx

from scaling import optimizers
from scaling.axes import Atom, Axes, Dim
from scaling.contractions import Fold, Selection
from scaling.errors import ConflictingUses, OurBug, TooManyGrowingAxes
from scaling.graph import Call, LayerGraph, Size
from scaling.growth import Growth
from scaling.limits import exponent
from scaling.operators import rule_of
from scaling.records import Block, Factor, Use, WeightRule
from scaling.scales import nearest
from scaling.uses import Span, WeightUse, is_linear

__all__ = ["rules_of"]


@dataclass(frozen=True, eq=False)
class _Cut:
    """One index (`dim` is ()) or range of the factor `at` of an axis; of the whole axis if `at` is None."""

    at: int | None
    start: Size
    stop: Size
    dim: Dim


_Cell = tuple[_Cut, ...]
"""A part of a weight's axis that is a block of its own: what it takes of the factors that are cut; () for all of the axis."""


def rules_of(
    graph: LayerGraph,
    uses: list[WeightUse],
    growth: Growth,
    folds: list[Fold],
    size: Callable[[fx.Node], sympy.Expr],
    *,
    many: bool = False,
) -> list[WeightRule]:
    """The rules of all trainable weights that are used; `size` is that of an activation, in d.

    Raises:
        ConflictingUses: if uses of a tied weight cannot be reconciled.
        TooManyGrowingAxes: if more than two axes of a weight grow, unless `many` are welcome.
    """
    by_weight: dict[Call, list[WeightUse]] = {}
    for use in uses:
        by_weight.setdefault(use.weight, []).append(use)
    undone = {
        tuple(sorted(id(a) for s in growth.axes.root(cat).segments for a in growth.axes.resolve(s.dim))) for cat in growth.axes.joined_cats
    }
    folds_of: dict[Call, list[Fold]] = {}
    for fold in folds:
        folds_of.setdefault(fold.carrier.weight, []).append(fold)
    given = {use: _given(use, graph, size) for use in uses}
    return [
        _rule(call, by_weight[call], growth, folds_of.get(call, []), undone, given, many=many)
        for call in graph.weights
        if call in by_weight and call.node.meta["trainable"]
    ]


def _given(use: WeightUse, graph: LayerGraph, size: Callable[[fx.Node], sympy.Expr]) -> sympy.Expr:
    """The RMS size of what a use is given."""
    return sympy.Mul(*(size(node) for node in dict.fromkeys(use.call.tensors) if node is not None and node in graph.data))


def _sized(block: Block, use: WeightUse, given: sympy.Expr, folds: list[Fold]) -> Block:
    """The block with the sizes of its input and output: a sum makes up for its input's, what is added has it, a gain hands it on."""
    parts = {span.part for axis in use.spans for span in axis}
    sums = bool(parts & {"in", "out"})
    target, entries = (
        [fold.target for fold in folds if fold.quantity == quantity and fold.carrier.call is use.call] for quantity in ("target", "entries")
    )
    target = sympy.Mul(*target)
    if "add" in parts and not sums and is_linear(use.call):
        target *= given
    branch = sympy.Mul(*(fold.target for fold in folds if fold.quantity == "branch"))
    if use.entrywise:  # what it is given is the input times the entries of the matrix beside it, which make up for the input's size
        given = optimizers.init_std(block)
    sized = block.model_copy(
        update={
            "input_scale": given if sums else sympy.Integer(1),
            "target": target,
            "branch": branch,
            "entries": next(iter(entries), None),
        }
    )
    return sized if sized.entries is None else sized.model_copy(update={"target": nearest(sized, target)})


def _rule(
    call: Call,
    uses: list[WeightUse],
    growth: Growth,
    folds: list[Fold],
    undone: set[tuple[int, ...]],
    given: dict[WeightUse, sympy.Expr],
    *,
    many: bool,
) -> WeightRule:
    dims = growth.axes.dims[call.node]
    lengths = tuple(growth.of(dim) for dim in dims)
    growing = sum(growth.grows(dim) for dim in dims)
    if growing > 2 and not many:
        raise TooManyGrowingAxes(call.names[0], f"[{', '.join(map(str, lengths))}]", str(uses[0].call.source))
    blocks, notes, described = [], {}, {}
    columns = [_cells(growth, axis, dim, uses, undone) for axis, dim in enumerate(dims)]
    for cells in combinations(*columns):
        covering = [use for use in uses if all(_within(cell, used) for cell, used in zip(cells, use.ranges, strict=True))]
        if not covering:
            message = f"no use covers a block of {call.names[0]}"
            raise OurBug(message)
        taken = [cell for cell, column in zip(cells, columns, strict=True) if len(column) > 1]
        here = _once([fold for fold in folds if _selected(fold.carrier.selection, taken)])
        maps = [_sized(_map(use, cells, dims, growth), use, given[use], here) for use in covering]
        blocks.append(maps[0])
        notes |= dict.fromkeys(fold.why for fold in here if fold.why)
        for use, multiplier in zip(covering, _multipliers(call, maps, covering), strict=True):
            m = maps[covering.index(use)]
            described.setdefault(
                id(use),
                Use(operator=use.call.name, source=use.call.source, fan_in=m.fan_in, fan_out=m.fan_out, copies=m.copies, entries=m.entries,
                    multiplier=multiplier, input_scale=m.input_scale, target=m.target, branch=m.branch, lookup=m.lookup),
            )  # fmt: skip
            if multiplier != 1:
                notes[f"tied: its use at {use.call.source} is multiplied by {multiplier}"] = None
    return WeightRule(
        names=call.names,
        shape=tuple(size[0] for size in call.shape),
        dims=lengths,
        uses=tuple(described[id(use)] for use in uses if id(use) in described),
        blocks=tuple(blocks),
        notes=tuple(notes),
    )


def _once(folds: list[Fold]) -> list[Fold]:
    """Less the repetitions: several paths from one map into products of activations (rotary embeddings) ask one thing of it."""
    found: dict[object, Fold] = {}
    for fold in folds:
        found.setdefault((fold.carrier.call, fold.target, fold.quantity) if fold.dot else fold, fold)
    return list(found.values())


# blocks


def _cells(growth: Growth, axis: int, dim: Dim, uses: list[WeightUse], undone: set[tuple[int, ...]]) -> list[_Cell]:
    """The blocks of one axis: segments that grow differently, that uses take apart, or that an output is split into for good."""
    axes = growth.axes
    resolved = axes.resolve(dim)
    emitted = any(span.part in {"out", "add", "copy"} for use in uses for span in use.spans[axis])
    cuts: list[list[_Cut]] = []
    for at, atom in enumerate(resolved):
        outer = at if len(resolved) > 1 else None
        if atom.segments and (_mixed(growth, atom) or _used_apart(axes, axis, dim, uses) or (emitted and not _undone(axes, atom, undone))):
            found = [_Cut(outer, start, stop, piece) for start, stop, piece in _pieces(growth, atom)]
        elif "indexed" in atom.facts and emitted and len(resolved) > 1 and len(set(atom.size)) == 1:
            found = [_Cut(at, (i,) * axes.widths, (i + 1,) * axes.widths, ()) for i in range(atom.size[0])]
        else:
            continue
        if all(any(_within((cut,), use.ranges[axis]) for use in uses) for cut in found):
            cuts.append(found)
    return list(combinations(*cuts))


def _within(cell: _Cell, used: tuple[Size, Size]) -> bool:
    """Whether the range of the axis that a use takes has the cell in it; without cuts, however much of the axis a run looked at."""
    return all(
        cut.at is not None
        or (all(a <= b for a, b in zip(used[0], cut.start, strict=True)) and all(b <= a for a, b in zip(used[1], cut.stop, strict=True)))
        for cut in cell
    )


def _mixed(growth: Growth, atom: Atom) -> bool:
    return len({growth.grows(dim) for _, _, dim in _pieces(growth, atom)}) > 1


def _pieces(growth: Growth, atom: Atom) -> list[tuple[Size, Size, Dim]]:
    """The segments of an atom, those that are mixed themselves in their own segments."""
    out = []
    for segment in atom.segments:
        inner = growth.axes.resolve(segment.dim)
        if len(inner) == 1 and _mixed(growth, inner[0]):
            out += [(_plus(segment.start, a), _plus(segment.start, b), dim) for a, b, dim in _pieces(growth, inner[0])]
        else:
            out.append((segment.start, segment.stop, segment.dim))
    return out


def _plus(a: Size, b: Size) -> Size:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _used_apart(axes: Axes, axis: int, dim: Dim, uses: list[WeightUse]) -> bool:
    return len({use.ranges[axis] for use in uses}) > 1 and any(use.ranges[axis] != (axes.zero, axes.size(dim)) for use in uses)


def _undone(axes: Axes, atom: Atom, undone: set[tuple[int, ...]]) -> bool:
    """Whether the pieces are concatenated again (rotary embeddings): then they are no maps of their own."""
    pieces = tuple(sorted(id(a) for segment in atom.segments for a in axes.resolve(segment.dim)))
    return pieces in undone


def _selected(selection: Selection | None, cells: list[_Cell]) -> bool:
    """Whether a path's selection is the block of these cells (of the axes that have several)."""
    if selection is None or not cells:
        return True
    return any(
        selection.index == cut.start[0]
        if cut.at is not None and cut.dim == ()
        else (selection.start, selection.stop) == (cut.start, cut.stop)
        for cell in cells
        for cut in cell
    )


# fans


def _map(use: WeightUse, cells: tuple[_Cell, ...], dims: tuple[Dim, ...], growth: Growth) -> Block:
    parts = [
        _factors(_banked(spans, dim, dims, growth.axes), cell, dim, growth) for spans, cell, dim in zip(use.spans, cells, dims, strict=True)
    ]
    grown = any(part == "add" and factor.extent.free_symbols for factors in parts for factor, part in factors)
    axes = []
    for factors in parts:
        of_axis = [factor for factor, part in factors if part == "add"]
        looked_up = grown and of_axis and not any(factor.extent.free_symbols for factor in of_axis)
        axes.append(tuple(_settled(factor, part, looked_up=bool(looked_up)) for factor, part in factors))
    flat = [factor for axis in axes for factor in axis if factor.extent != 0]  # without entries there is nothing to count
    fans = {part: sympy.Mul(*(factor.extent for factor in flat if factor.part == part)) for part in ("in", "out", "copy")}
    operator = rule_of(use.call)
    summed = any(factor.part == "in" for factor in flat)  # a bias sums nothing
    thinned = operator.thinned(use.call) if operator is not None and operator.thinned is not None and summed else 1
    looked_up = any(factor.part == "lookup" and factor.size != 1 for factor in flat)
    return Block(axes=tuple(axes), fan_in=fans["in"] / thinned, fan_out=fans["out"], copies=fans["copy"], lookup=looked_up)


def _banked(spans: tuple[Span, ...], dim: Dim, dims: tuple[Dim, ...], axes: Axes) -> tuple[Span, ...]:
    """An axis that counts separate maps at another weight (experts) counts them at this one too, though here all see one input."""
    bank = len(dims) > 2 and dim and all("bank" in atom.facts for atom in axes.leaves(dim))
    return tuple(Span(span.size, "copy") if bank and span.part == "out" else span for span in spans)


def _settled(factor: Factor, part: str, *, looked_up: bool) -> Factor:
    """An added table of vectors ([T, d]) is looked up along its finite axes, as an embedding is; any other added axis survives."""
    if part != "add":
        return factor
    return factor.model_copy(update={"part": "lookup" if looked_up else "out"})


def _factors(spans: tuple[Span, ...], cell: _Cell, dim: Dim, growth: Growth) -> list[tuple[Factor, str]]:
    """The factors of an axis with what the block takes of each; adjacent whole ones of equal part are one."""
    axes = growth.axes
    resolved = axes.resolve(dim)
    whole = growth.of(dim)
    taken = {cut.at: _range(growth, resolved if cut.at is None else (resolved[cut.at],), cut) for cut in cell}
    parts = {span.part for span in spans} or {"out"}
    if None in taken or (not cell and len(parts) == 1):
        return [_factor(whole, next(iter(parts)), taken.get(None))] if whole != 1 or resolved else []
    factors = zip(resolved, _per_factor(resolved, spans, axes), strict=True)
    return _merged([(growth.of((atom,)), part, taken.get(at)) for at, (atom, part) in enumerate(factors)])


def _factor(size: sympy.Expr, part: str, taken: tuple[sympy.Expr, sympy.Expr] | None) -> tuple[Factor, str]:
    start, stop = taken or (sympy.Integer(0), size)
    return Factor.model_construct(size=size, part=part, start=start, stop=stop), part  # pyright: ignore[reportArgumentType] - "add" is settled later


def _merged(rows: list[tuple[sympy.Expr, str, tuple[sympy.Expr, sympy.Expr] | None]]) -> list[tuple[Factor, str]]:
    out: list[tuple[sympy.Expr, str, tuple[sympy.Expr, sympy.Expr] | None]] = []
    for size, part, taken in rows:
        if out and taken is None and out[-1][2] is None and out[-1][1] == part:
            out[-1] = (out[-1][0] * size, part, None)
        else:
            out.append((size, part, taken))
    return [_factor(*row) for row in out]


def _per_factor(resolved: Dim, spans: tuple[Span, ...], axes: Axes) -> list[str]:
    """The part of every factor; the spans are products of factors."""
    out, left = [], list(spans)
    rest = axes.one
    part = spans[0].part if spans else "out"
    for atom in resolved:
        if rest == axes.one and left:
            span = left.pop(0)
            rest, part = span.size, span.part
        out.append(part)
        rest = tuple(a // b if a % b == 0 else 1 for a, b in zip(rest, atom.size, strict=True))
    return out


def _range(growth: Growth, dim: Dim, cut: _Cut) -> tuple[sympy.Expr, sympy.Expr]:
    return _offset(growth, dim, cut.start), _offset(growth, dim, cut.stop)


def _offset(growth: Growth, dim: Dim, at: Size) -> sympy.Expr:
    """A position on an axis, exact in d: the sum of the segments before it."""
    axes = growth.axes
    if at == axes.zero:
        return sympy.Integer(0)
    if at == axes.size(dim):
        return growth.of(dim)
    if len(dim) == 1 and dim[0].segments:
        return sympy.Add(
            *(growth.of(piece) for _, stop, piece in _pieces(growth, dim[0]) if all(a <= b for a, b in zip(stop, at, strict=True)))
        )
    return sympy.Integer(at[0])


# ties


def _multipliers(call: Call, maps: list[Block], uses: list[WeightUse]) -> list[sympy.Expr]:
    """The factor on each use that makes one init and one learning rate right for all of them (THEORY 2.3): 1 on the first.

    Uses u and v agree iff (1+p)(σ_u − σ_v) = η_u − η_v in exponents, for optimizers of every degree p; the factor is then η_u/η_v of
    degree 0. Where the weight's norm is divided out, any σ does, and the rates alone have to agree.
    """
    first = maps[0]
    out: list[sympy.Expr] = [sympy.Integer(1)]
    for other, use in zip(maps[1:], uses[1:], strict=True):
        size = optimizers.adam if first.entries is not None and other.entries is not None else optimizers.init_std
        gap = exponent(size(other)) - exponent(size(first))
        alike = exponent(other.copies) == exponent(first.copies)
        for family, degree in optimizers.DEGREES.items():
            if family == "muon" and not alike:
                continue  # msign of other matrices of the same entries: of low rank, its entries are those of a sign, which Adam has judged
            rates = exponent(optimizers.LEARNING_RATES[family](other)) - exponent(optimizers.LEARNING_RATES[family](first))
            if rates != (1 + degree) * gap:
                wants = [
                    f"init_std {optimizers.init_std(m)} and {family} lr {optimizers.LEARNING_RATES[family](m)}" for m in (first, other)
                ]
                places = [str(uses[0].call.source), str(use.call.source)]
                raise ConflictingUses(call.names[0], wants, places, "no multiplier reconciles them: use two weights, or the same map twice")
        ratio = optimizers.adam(other) / optimizers.adam(first)
        out.append(ratio if gap != 0 else sympy.Integer(1))
    return out
