"""Sums, products and choices of values, entry by entry."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor, fx

from scaling.contractions import _as_float
from scaling.graph import Call
from scaling.orders import CONSTANT, NOTHING, ZERO, Exponent, Pieces, State, joined, least, minus, plus, shared, times, top, zipped
from scaling.propagation.context import HALF, TINY, Context, Result, Values, largest, nothing, shape_of
from scaling.propagation.pointwise import powered
from scaling.propagation.reductions import sum_of

__all__ = ["added", "broadcast", "merged", "multiplied", "placed", "product_of", "scattered", "zeros"]


def broadcast(context: Context, call: Call, node: fx.Node | None, d: Pieces[Exponent]) -> Pieces[Exponent]:
    """The gradient of an operand that was broadcast: summed over the axes it lacks."""
    if node is None:
        return d
    out, own = context.orders(call.node), context.orders(node)
    if tuple(node.meta["val"].shape) == shape_of(call):
        return d
    return Pieces.of(plus(d.whole(largest), context.gathered(max(out - own, ZERO))))


def added(context: Context, call: Call, values: Values) -> Result | None:
    """A sum of values and numbers; a constant that is no ε counts as Θ(1)."""
    tensors = [(node, value) for node, value in zip(call.tensors, values, strict=True) if value is not None]
    numbers = [x for name in ("self", "other") for x in (call.get(name),) if isinstance(x, (int, float))]
    alpha = call.get("alpha", 1)
    if not tensors or (isinstance(alpha, (int, float)) and alpha == 0):
        return None
    out = tensors[0][1]
    for _, value in tensors[1:]:
        out = zipped(lambda a, b: joined((a, b)), out, value, shape_of(call))
    if any(abs(number) > TINY for number in numbers):
        out = out.each(lambda x: joined((x, CONSTANT)))

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        return [None if v is None else broadcast(context, call, n, d) for n, v in zip(call.tensors, values, strict=True)]

    return out, pull


def product_of(context: Context, a: State, b: State, narrow: tuple[bool, bool], apart: tuple[Fraction, Fraction] = (ZERO, ZERO)) -> State:
    """a·b entry by entry; `narrow` says which of the two has no growing axis.

    `apart`: how much less a change of either, as a gain on a weight, is aligned than an update of that weight would be.
    """
    init = plus(a.init, b.init)
    change = top(plus(a.change, b.init, -apart[0]), plus(a.init, b.change, -apart[1]), plus(a.change, b.change))
    after = plus(a.after, b.after)
    if narrow[1]:
        mean = plus(a.mean, b.init)
    elif narrow[0]:
        mean = plus(a.init, b.mean)
    else:
        mean = init if shared(a, b) else plus(a.mean, b.mean)
    return State.of(init, mean, least(change, top(init, after)), a.roots | b.roots, after)


def multiplied(context: Context, call: Call, values: Values) -> Result | None:
    """A product or quotient of two values, or of a value and a number that may follow the width."""
    divides = call.name in {"aten.div", "aten.divide", "aten.true_divide"}
    operands = [(node, value) for node, value in zip(call.tensors, values, strict=True) if value is not None]
    numbers = [_numbers(call, name) for name in ("self", "other")]
    data = [(node, value) for node, value in operands if node is not None and not _is_number(node)]
    if len(data) == 1 and any(numbers):
        node, x = data[0]
        given = next(n for n in numbers if n)
        power = context.power(given, context.lengths(node))
        if divides and numbers[0]:  # a number over a value
            inverse, curve = powered(-1), None
            out = x.each(lambda s: inverse(s)[0].scaled(power))
            curve = x.each(lambda s: plus(inverse(s)[1], power))
            return out, lambda d: [zipped(plus, curve, d, shape_of(call)) if n is node else None for n in call.tensors]
        power = times(power, -1) if divides else power
        return x.each(lambda s: s.scaled(power)), lambda d: [d.each(lambda e: plus(e, power)) if n is node else None for n in call.tensors]
    if len(operands) != 2:
        return None
    (left, a), (right, b) = operands
    if left is None or right is None:
        return None
    inverse = powered(-1)
    factor = b.each(lambda s: inverse(s)[0]) if divides else b
    narrow = context.orders(left) == 0, context.orders(right) == 0
    apart = _apart(context, call, left), _apart(context, call, right)
    out = zipped(lambda x, y: product_of(context, x, y, narrow, apart), a, factor, shape_of(call))

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        to_a = zipped(lambda e, y: plus(e, y.after), d, factor, shape_of(call))
        to_b = zipped(lambda e, x: plus(e, x.after), d, a, shape_of(call))
        if divides:
            to_b = zipped(lambda e, y: minus(e, times(y.after, 2)), to_b, b, shape_of(call))
        return [broadcast(context, call, left, to_a), broadcast(context, call, right, to_b)]

    return out, pull


def _apart(context: Context, call: Call, gain: fx.Node) -> Fraction:
    """½ for every growing axis of a weight that a gain on it lacks: along these a change of the gain is as random as the weight."""
    if call.node not in context.graph.weight_only:
        return ZERO
    return HALF * max(context.orders(call.node) - context.orders(gain), ZERO)


def _is_number(node: fx.Node) -> bool:
    return _as_float(node) is not None


def _numbers(call: Call, name: str) -> tuple[float, ...]:
    """A number argument at every width; () if it is none."""
    values = [_as_float(value) for value in call.arguments.get(name, (None,))]
    return tuple(v for v in values if v is not None) if all(v is not None for v in values) else ()


def merged(context: Context, call: Call, values: Values) -> Result | None:
    """where, masked_fill, maximum, copy_: every entry is one of the operands'."""
    operands = [v for n, v in zip(call.tensors, values, strict=True) if v is not None and n is not None and _is_float(n)]
    if not operands:
        return None
    out, shape = operands[0], shape_of(call)
    for value in operands[1:]:
        out = zipped(lambda a, b: joined((a, b)), out, value if _covers(value, shape) else Pieces.of(value.whole(joined)), shape)

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        return [None if v is None else broadcast(context, call, n, d) for n, v in zip(call.tensors, values, strict=True)]

    return out, pull


def _covers(value: Pieces[State], shape: tuple[int, ...]) -> bool:
    """Whether a value's parts lie along those of a shape: what a scatter writes has lengths of its own."""
    own = () if value.labels is None else tuple(value.labels.shape)
    return len(own) <= len(shape) and all(size in {1, whole} for size, whole in zip(own[::-1], shape[::-1], strict=False))


def scattered(context: Context, call: Call, values: Values) -> Result | None:
    """index_add, scatter_add: each entry is a value's own and a sum of those of the other that have its index."""
    (base, whole), *_, (added, terms) = ((n, v) for n, v in zip(call.tensors, values, strict=True) if n is not None)
    axis = call.get("dim")
    if whole is None or terms is None:
        return None
    order = context.order(context.dims(added)[axis]) - context.order(context.dims(base)[axis])
    if order <= 0:
        return merged(context, call, values)
    own, sums = whole.whole(joined), sum_of(terms.whole(joined), order)

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        return [None if v is None else Pieces.of(d.whole(largest)) for v in values]

    return Pieces.of(joined((own, sums))), pull


def placed(context: Context, call: Call, values: Values) -> Result | None:
    """slice_scatter, select_scatter: entries of the whole or of what is written into it."""
    present = [value.whole(joined) for value in values if value is not None]

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        return [None if value is None else Pieces.of(d.whole(largest)) for value in values]

    return Pieces.of(joined(present)), pull


def zeros(context: Context, call: Call, values: Values) -> Result | None:
    """Zeros in the shape of a value."""
    return Pieces.of(State(NOTHING, NOTHING, NOTHING, NOTHING)), lambda _: nothing(values)


def _is_float(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and not _is_number(node)
