"""Sums, means, norms, softmax and losses over axes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from scaling.graph import Call
from scaling.orders import UNKNOWN, ZERO, Exponent, Pieces, State, joined, least, minus, plus, top
from scaling.propagation.context import HALF, Context, Result, Rule, Values, largest, nothing
from scaling.propagation.pointwise import positive, powered, unary

__all__ = [
    "cumulated",
    "deviation",
    "difference",
    "distance",
    "entropy",
    "extreme",
    "mean",
    "norm_of",
    "over",
    "softmax",
    "sum_of",
    "summed",
    "variance",
]


def _reduced(context: Context, call: Call) -> Fraction:
    """The power of d in the number of entries that a reduction takes together."""
    node = call.tensors[0]
    dims = context.dims(node) if node is not None else ()
    which = call.get("dim", None)
    gone = range(len(dims)) if which is None or which == [] else [which] if isinstance(which, int) else which
    return sum((context.order(dims[i]) for i in gone), ZERO)


def sum_of(x: State, order: Fraction) -> State:
    """A sum of d**order entries: √ of them where they are independent, all of what is common; a change is common."""
    return State.of(top(plus(x.mean, order), plus(x.init, order * HALF)), plus(x.mean, order), plus(x.change, order), x.roots)


def over(values: Values, shape: Callable[[State], State], slope: Callable[[State], Exponent]) -> Result | None:
    """A reduction of the first value, its parts taken together: what becomes of it, and by how much its gradient differs."""
    x = values[0]
    if x is None:
        return None
    state = x.whole(joined)

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        return [Pieces.of(plus(d.whole(largest), slope(state))), *nothing(values[1:])]

    return Pieces.of(shape(state)), pull


def _reduce(shape: Callable[[State, Fraction], State], slope: Callable[[State, Fraction], Exponent]) -> Rule:
    def rule(context: Context, call: Call, values: Values) -> Result | None:
        order = _reduced(context, call)
        return over(values, lambda x: shape(x, order), lambda x: slope(x, order))

    return rule


def _mean_square(x: State, order: Fraction) -> State:
    return powered(2)(x)[0]


summed = _reduce(sum_of, lambda x, k: ZERO)
mean = _reduce(lambda x, k: sum_of(x, k).scaled(-k), lambda x, k: -k)
variance = _reduce(_mean_square, lambda x, k: minus(x.after, k))
deviation = _reduce(lambda x, k: positive(x)[0], lambda x, k: -k)
extreme = _reduce(lambda x, k: positive(x)[0], lambda x, k: ZERO)


def norm_of(context: Context, call: Call, values: Values) -> Result | None:
    """The p-norm: n^(1/p) entries of like size, so over a growing axis not the largest of them (p = ∞), of which no rule tells."""
    kind = call.get("ord", call.get("p", 2))
    order, p = _reduced(context, call), 2 if kind is None else kind
    if order == 0:
        return over(values, lambda x: positive(x)[0], lambda x: ZERO)
    if p not in {1, 2}:
        return None
    size = order / int(p)
    return over(values, lambda x: positive(x)[0].scaled(size), lambda x: size - order)


def distance(context: Context, call: Call, values: Values) -> Result | None:
    """‖x - y‖₂ of all entries."""
    pair = [value.whole(joined) for value in values if value is not None]
    nodes = [node for node in call.tensors if node is not None]
    if not pair or call.get("p", 2) != 2:
        return None
    order = max(context.orders(node) for node in nodes)

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        return [None if value is None else Pieces.of(plus(d.whole(largest), -order * HALF)) for value in values]

    return Pieces.of(positive(joined(pair))[0].scaled(order * HALF)), pull


def cumulated(context: Context, call: Call, values: Values) -> Result | None:
    """Sums of the first k entries of an axis, for every k: most of them over a share of it."""
    node = call.tensors[0]
    order = context.order(context.dims(node)[call.get("dim")]) if node is not None and context.dims(node) else ZERO
    return over(values, lambda x: sum_of(x, order), lambda x: context.gathered(order))


def softmax(context: Context, call: Call, values: Values) -> Result | None:
    """Over a growing axis, 1/n each while its logits stay Θ(1); over any other, Θ(1)."""
    x = values[0]
    node = call.tensors[0]
    if x is None or node is None:
        return None
    dims = context.dims(node)
    order = context.order(dims[call.get("dim")]) if dims else ZERO

    def curve(s: State) -> tuple[State, Exponent]:
        if order and (s.after is None or s.after > 0):
            return UNKNOWN, None
        return State.of(-order, -order, plus(least(s.change, ZERO), -order), s.roots), -order

    def log_curve(s: State) -> tuple[State, Exponent]:
        return (State.of(top(s.init, ZERO), top(s.init, ZERO), s.change, s.roots), ZERO) if order == 0 else (UNKNOWN, None)

    return unary(log_curve if "log" in call.name else curve)(context, call, values)


def _mean_of(context: Context, call: Call) -> Fraction:
    """The power of d in the number of entries that a loss is the mean over."""
    node = call.tensors[0]
    return context.orders(node) if node is not None and call.get("reduction", MEAN) == MEAN else ZERO


MEAN, SUM = 1, 2
"""torch's numbers for reduction="mean" and "sum"."""


def entropy(context: Context, call: Call, values: Values) -> Result | None:
    """Losses of logits or log-probabilities: at least Θ(1), with a gradient that is bounded; over classes that do not grow."""
    if _mean_of(context, call):
        return None
    return over(values, lambda x: State.of(top(x.init, ZERO), top(x.init, ZERO), x.change, x.roots), lambda x: ZERO)


def difference(power: int) -> Rule:
    """Losses |x - y|ᵖ: entry by entry, their sum, or their mean."""

    def rule(context: Context, call: Call, values: Values) -> Result | None:
        pair = [value.whole(joined) for value in values[:2] if value is not None]
        if not pair:
            return None
        apart, order = joined(pair), _mean_of(context, call)
        size = powered(power)(apart)[0]
        if call.get("reduction", MEAN) == SUM and pair:
            size = size.scaled(max(context.orders(node) for node in call.tensors[:2] if node is not None))
        slope = plus(apart.after, Fraction(-order)) if power == 2 else -order

        def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
            back = Pieces.of(plus(d.whole(largest), slope))
            return [None if value is None else back for value in values]

        return Pieces.of(size), pull

    return rule
