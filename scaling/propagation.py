"""How every operator hands sizes on: forward the size of a value at init and of its change, backward that of its gradient.

Sums of n independent terms grow like √n, sums of n aligned terms like n (Yang et al. 2022, arXiv 2203.03466, table 14). A random matrix
moves any vector by at most its spectral norm, σ(√fan_in + √fan_out), and what training changes is aligned with it (Yang et al. 2023,
arXiv 2310.17813): one formula for hidden weights (√n) and readouts (n). An update is of low rank and aligned with its input: n.

A rule takes a call and the pieces of its tensor arguments, and returns the pieces of its value and a function that hands the gradient back
to the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from scaling.axes import Dim
from scaling.contractions import _as_float
from scaling.graph import Call, LayerGraph, Size
from scaling.growth import Growth
from scaling.limits import WIDTH, exponent
from scaling.operators import SPLITS, Binding, _spread, bind, rule_of
from scaling.orders import CONSTANT, NOTHING, UNKNOWN, ZERO, Exponent, Pieces, State, joined, least, minus, plus, shared, times, top, zipped
from scaling.uses import Dot, is_linear

__all__ = ["RULES", "Context", "Pull", "propagate"]

HALF = Fraction(1, 2)
TINY = 1e-3
"""A constant that is added or clamped at and is no larger is the ε of a norm, meant to be negligible."""
LARGEST = 2**24
"""Elements up to which the parts of a gradient are told apart through views."""

Values = Sequence[Pieces[State] | None]
Pull = Callable[[Pieces[Exponent]], Sequence[Pieces[Exponent] | None]]
Result = tuple[Pieces[State], Pull]
Rule = Callable[["Context", Call, Values], "Result | None"]
Curve = Callable[[State], tuple[State, Exponent]]


@dataclass(eq=False)
class Context:
    """The graph, what grows in it, and whether gradients are those at init (independent of the weights) or of a trained model.

    `logits` is written: the logits inside scaled_dot_product_attention, and the size of their gradient.
    """

    graph: LayerGraph
    growth: Growth
    dots: dict[fx.Node, Dot]
    trained: bool = False
    logits: dict[fx.Node, tuple[State, Exponent]] = field(default_factory=dict)
    _orders: dict[tuple[int, ...], Fraction] = field(default_factory=dict)

    def order(self, dim: Dim) -> Fraction:
        """The power of d in the length of an axis."""
        resolved = self.growth.axes.resolve(dim)
        key = tuple(map(id, resolved))
        if key not in self._orders:
            power = exponent(self.growth.of(resolved))
            self._orders[key] = Fraction(int(power.p), int(power.q))
        return self._orders[key]

    def dims(self, node: fx.Node) -> tuple[Dim, ...]:
        """The axes of a value."""
        return self.growth.axes.dims.get(node, ())

    def orders(self, node: fx.Node) -> Fraction:
        """The power of d in a value's number of elements."""
        return sum((self.order(dim) for dim in self.dims(node)), ZERO)

    def extent(self, dim: Dim, start: int, stop: int) -> Fraction:
        """The power of d in the length of a part [start, stop), at the first width, of an axis: that of the segments it is made of."""
        axes = self.growth.axes
        resolved = axes.resolve(dim)
        if len(resolved) == 1 and resolved[0].segments:
            inside = [s for s in resolved[0].segments if start <= s.start[0] and s.stop[0] <= stop]
            if inside:
                return max(self.order(s.dim) for s in inside)
        return self.order(dim)

    @property
    def widths(self) -> tuple[sympy.Rational, ...] | None:
        """The width d of every recording; None if nothing grows."""
        for atom, expression in self.growth.leaves.items():
            slope = expression / WIDTH
            if slope.is_Rational:
                return tuple(sympy.Rational(size) / slope for size in atom.size)
        return None

    def power(self, numbers: Sequence[float], sizes: Sequence[Size]) -> Exponent:
        """The power of d that a number in the model follows: fitted over the widths.

        From one width, ±1/2 and ±1 of one of the given growing lengths are recognised.
        """
        widths = self.widths
        if widths is None or any(number == 0 for number in numbers):
            return ZERO if widths is None else NOTHING
        if len(numbers) > 1:
            if len(set(numbers)) == 1:
                return ZERO
            i, j = widths.index(min(widths)), widths.index(max(widths))
            slope = math.log(abs(numbers[j] / numbers[i])) / math.log(float(widths[j] / widths[i]))
            nearest = Fraction(round(4 * slope), 4)
            return nearest if abs(float(nearest) - slope) < 0.02 else None
        for size in sizes:
            for power in (-HALF, Fraction(-1), HALF, Fraction(1)):
                if size[0] > 1 and math.isclose(abs(numbers[0]), size[0] ** float(power), rel_tol=1e-6):
                    return power
        return ZERO

    def lengths(self, node: fx.Node) -> list[Size]:
        """The growing lengths that a number on a value may follow: of its own axes, and of a contraction of activations upstream."""
        out = [self.growth.axes.size(dim) for dim in self.dims(node) if self.order(dim)]
        while node not in self.dots and node in self.graph.data and node.op == "call_function":
            data = [n for n in self.graph.calls[node].tensors if n is not None and n in self.graph.data]
            if len(data) != 1 or not is_linear(self.graph.calls[node]):
                return out
            node = data[0]
        dot = self.dots.get(node)
        return out + ([self.growth.axes.size(dot.dim)] if dot is not None and self.order(dot.dim) else [])

    def gathered(self, order: Exponent) -> Exponent:
        """What a sum of gradients over d**order terms adds to their size: √n at init, n once they are aligned."""
        return order if self.trained or order is None else order * HALF


def _shape(call: Call) -> tuple[int, ...]:
    return tuple(size[0] for size in call.shape)


def _nothing(values: Values) -> list[Pieces[Exponent] | None]:
    return [None if value is None else Pieces.of(NOTHING) for value in values]


def _top(exponents: Sequence[Exponent]) -> Exponent:
    return top(*exponents)


def _words(text: str) -> list[str]:
    return text.split()


def _aten(text: str) -> list[str]:
    return [f"aten.{name}" for name in _words(text)]


# --- one value, entry by entry ------------------------------------------------------------------------------------------------------


def _same(x: State) -> tuple[State, Exponent]:
    return x, ZERO


def _positive(x: State) -> tuple[State, Exponent]:
    """relu, abs: as large as its input, with a mean."""
    return State.of(x.init, x.init, x.change, x.roots, x.after), ZERO


def _odd_bounded(x: State) -> tuple[State, Exponent]:
    """tanh: linear where its input is small, at most 1."""
    low, mean = least(x.init, ZERO), least(x.mean, ZERO)
    return State.of(low, mean, least(x.change, ZERO), x.roots, least(x.after, ZERO)), ZERO


def _bounded(x: State) -> tuple[State, Exponent]:
    low = least(x.init, ZERO)
    return State.of(low, low, least(x.change, ZERO), x.roots, least(x.after, ZERO)), ZERO


def _even_bounded(x: State) -> tuple[State, Exponent]:
    """sigmoid: Θ(1) whatever its input."""
    return State.of(ZERO, ZERO, least(x.change, ZERO), x.roots), ZERO


def _smooth(x: State) -> tuple[State, Exponent]:
    """gelu, silu: linear at 0 and far away; their mean is the input's curvature where that is small."""
    bend = x.init if x.init is None or x.init >= 0 else times(x.init, 2)
    return State.of(x.init, top(x.mean, bend), x.change, x.roots, x.after), ZERO


def _softplus(x: State) -> tuple[State, Exponent]:
    return State.of(top(x.init, ZERO), top(x.init, ZERO), x.change, x.roots), ZERO


def _exp(x: State) -> tuple[State, Exponent]:
    small = x.after is not None and x.after <= 0
    return (State.of(ZERO, ZERO, x.change, x.roots), ZERO) if small else (UNKNOWN, None)


def _log(x: State) -> tuple[State, Exponent]:
    known = x.init == 0 and x.after == 0
    return (State.of(ZERO, ZERO, x.change, x.roots), ZERO) if known else (UNKNOWN, None)


def _powered(power: Fraction) -> Curve:
    def curve(x: State) -> tuple[State, Exponent]:
        if power < 0 and (x.init == NOTHING or x.after == NOTHING):
            return UNKNOWN, None
        init, after = times(x.init, power), times(x.after, power)
        if x.change == NOTHING:
            change: Exponent = NOTHING
        elif x.change is None or x.init is None:
            change = None
        else:
            change = x.change + (power - 1) * x.init if x.change <= x.init else top(init, after)
        mean = init if power != 1 and (power.denominator > 1 or power % 2 == 0) else (NOTHING if x.mean == NOTHING else init)
        slope = ZERO if x.after == NOTHING else times(x.after, power - 1)
        return State.of(init, mean, change, x.roots, after), slope

    return curve


def _normalised(x: State, *, centred: bool) -> tuple[State, Exponent]:
    """A value over its own RMS: Θ(1) whatever its size, and so is its change at most."""
    if x.init == NOTHING:
        moved = NOTHING if x.change == NOTHING else ZERO
        return State.of(NOTHING, NOTHING, moved, x.roots), times(x.after, -1) if x.after != NOTHING else ZERO
    mean = NOTHING if centred else minus(x.mean, x.init)
    return State.of(times(x.init, 0), mean, least(minus(x.change, x.init), ZERO), x.roots, times(x.init, 0)), times(x.after, -1)


def _generic(x: State) -> tuple[State, Exponent]:
    """Any other function of one entry, of which only this is known: it keeps Θ(1)."""
    return (State.of(ZERO, ZERO, x.change, x.roots), ZERO) if x.init == 0 and x.after == 0 else (UNKNOWN, None)


CURVES: dict[str, Curve] = {
    **dict.fromkeys(_words("neg dropout alpha_dropout feature_dropout nan_to_num real conj"), _same),
    **dict.fromkeys(_words("relu leaky_relu abs threshold celu elu selu relu6 hardswish"), _positive),
    **dict.fromkeys(_words("tanh erf sin atan hardtanh softsign sign asinh"), _odd_bounded),
    **dict.fromkeys(_words("sigmoid cos hardsigmoid"), _even_bounded),
    **dict.fromkeys(_words("gelu silu mish"), _smooth),
    "softplus": _softplus,
    "exp": _exp,
    "log": _log,
    "square": _powered(Fraction(2)),
    "sqrt": _powered(HALF),
    "rsqrt": _powered(-HALF),
    "reciprocal": _powered(Fraction(-1)),
}
"""Pointwise functions: State -> (State of the value, size of the slope)."""


def unary(curve: Curve) -> Rule:
    """The rule of a pointwise function."""

    def rule(_: Context, call: Call, values: Values) -> Result | None:
        x = values[0]
        if x is None:
            return None

        def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
            slope = x.each(lambda state: curve(state)[1])
            return [zipped(plus, slope, d, _shape(call)), *_nothing(values[1:])]

        return x.each(lambda state: curve(state)[0]), pull

    return rule


def _pow(context: Context, call: Call, values: Values) -> Result | None:
    power = call.get("exponent")
    exact = isinstance(power, (int, float)) and Fraction(power).limit_denominator(8)
    if exact is False or exact != power or values[0] is None:
        return None
    return unary(_powered(exact))(context, call, values)


def _clamp(context: Context, call: Call, values: Values) -> Result | None:
    low, high = call.get("min"), call.get("max")
    if any(isinstance(bound, fx.Node) for bound in (low, high)):
        return None
    if low is not None and high is not None:
        return unary(_odd_bounded if low == -high else _bounded)(context, call, values)
    bound = low if low is not None else high
    if bound is None or abs(bound) > TINY:
        return None
    return unary(_same)(context, call, values)


# --- sums and products of values ----------------------------------------------------------------------------------------------------


def _broadcast(context: Context, call: Call, node: fx.Node | None, d: Pieces[Exponent]) -> Pieces[Exponent]:
    """The gradient of an operand that was broadcast: summed over the axes it lacks."""
    if node is None:
        return d
    out, own = context.orders(call.node), context.orders(node)
    if tuple(node.meta["val"].shape) == _shape(call):
        return d
    return Pieces.of(plus(d.whole(_top), context.gathered(max(out - own, ZERO))))


def _add(context: Context, call: Call, values: Values) -> Result | None:
    tensors = [(node, value) for node, value in zip(call.tensors, values, strict=True) if value is not None]
    numbers = [x for name in ("self", "other") for x in (call.get(name),) if isinstance(x, (int, float))]
    alpha = call.get("alpha", 1)
    if not tensors or (isinstance(alpha, (int, float)) and alpha == 0):
        return None
    out = tensors[0][1]
    for _, value in tensors[1:]:
        out = zipped(lambda a, b: joined((a, b)), out, value, _shape(call))
    if any(abs(number) > TINY for number in numbers):
        out = out.each(lambda x: joined((x, CONSTANT)))

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        return [None if v is None else _broadcast(context, call, n, d) for n, v in zip(call.tensors, values, strict=True)]

    return out, pull


def _times(context: Context, a: State, b: State, narrow: tuple[bool, bool]) -> State:
    """a·b entry by entry; `narrow` says which of the two has no growing axis."""
    init = plus(a.init, b.init)
    change = top(plus(a.change, b.init), plus(a.init, b.change), plus(a.change, b.change))
    after = plus(a.after, b.after)
    if narrow[1]:
        mean = plus(a.mean, b.init)
    elif narrow[0]:
        mean = plus(a.init, b.mean)
    else:
        mean = init if shared(a, b) else plus(a.mean, b.mean)
    return State.of(init, mean, least(change, top(init, after)), a.roots | b.roots, after)


def _mul(context: Context, call: Call, values: Values) -> Result | None:
    divides = call.name in {"aten.div", "aten.divide", "aten.true_divide"}
    operands = [(node, value) for node, value in zip(call.tensors, values, strict=True) if value is not None]
    numbers = [_numbers(call, name) for name in ("self", "other")]
    data = [(node, value) for node, value in operands if node is not None and not _is_number(node)]
    if len(data) == 1 and any(numbers):
        node, x = data[0]
        given = next(n for n in numbers if n)
        power = context.power(given, context.lengths(node))
        if divides and numbers[0]:  # a number over a value
            inverse, curve = _powered(Fraction(-1)), None
            out = x.each(lambda s: inverse(s)[0].scaled(power))
            curve = x.each(lambda s: plus(inverse(s)[1], power))
            return out, lambda d: [zipped(plus, curve, d, _shape(call)) if n is node else None for n in call.tensors]
        power = times(power, -1) if divides else power
        return x.each(lambda s: s.scaled(power)), lambda d: [d.each(lambda e: plus(e, power)) if n is node else None for n in call.tensors]
    if len(operands) != 2:
        return None
    (left, a), (right, b) = operands
    if left is None or right is None:
        return None
    inverse = _powered(Fraction(-1))
    factor = b.each(lambda s: inverse(s)[0]) if divides else b
    narrow = context.orders(left) == 0, context.orders(right) == 0
    out = zipped(lambda x, y: _times(context, x, y, narrow), a, factor, _shape(call))

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        to_a = zipped(lambda e, y: plus(e, y.after), d, factor, _shape(call))
        to_b = zipped(lambda e, x: plus(e, x.after), d, a, _shape(call))
        if divides:
            to_b = zipped(lambda e, y: minus(e, times(y.after, 2)), to_b, b, _shape(call))
        return [_broadcast(context, call, left, to_a), _broadcast(context, call, right, to_b)]

    return out, pull


def _is_number(node: fx.Node) -> bool:
    return _as_float(node) is not None


def _numbers(call: Call, name: str) -> tuple[float, ...]:
    """A number argument at every width; () if it is none."""
    values = [_as_float(value) for value in call.arguments.get(name, (None,))]
    return tuple(v for v in values if v is not None) if all(v is not None for v in values) else ()


def _merge(context: Context, call: Call, values: Values) -> Result | None:
    """where, masked_fill, maximum, copy_: every entry is one of the operands'."""
    operands = [v for n, v in zip(call.tensors, values, strict=True) if v is not None and n is not None and _is_float(n)]
    if not operands:
        return None
    out = operands[0]
    for value in operands[1:]:
        out = zipped(lambda a, b: joined((a, b)), out, value, _shape(call))

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        return [None if v is None else _broadcast(context, call, n, d) for n, v in zip(call.tensors, values, strict=True)]

    return out, pull


def _is_float(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_floating_point() and not _is_number(node)


# --- sums over axes -----------------------------------------------------------------------------------------------------------------


def _reduced(context: Context, call: Call) -> Fraction:
    """The power of d in the number of entries that a reduction takes together."""
    node = call.tensors[0]
    dims = context.dims(node) if node is not None else ()
    which = call.get("dim", None)
    gone = range(len(dims)) if which is None or which == [] else [which] if isinstance(which, int) else which
    return sum((context.order(dims[i]) for i in gone), ZERO)


def _summed(x: State, order: Fraction) -> State:
    """A sum of d**order entries: √ of them where they are independent, all of what is common; a change is common."""
    return State.of(top(plus(x.mean, order), plus(x.init, order * HALF)), plus(x.mean, order), plus(x.change, order), x.roots)


def _reduce(shape: Callable[[State, Fraction], State], slope: Callable[[State, Fraction], Exponent]) -> Rule:
    def rule(context: Context, call: Call, values: Values) -> Result | None:
        x = values[0]
        if x is None:
            return None
        order, state = _reduced(context, call), x.whole(joined)

        def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
            return [Pieces.of(plus(d.whole(_top), slope(state, order))), *_nothing(values[1:])]

        return Pieces.of(shape(state, order)), pull

    return rule


def _mean_square(x: State, order: Fraction) -> State:
    return _powered(Fraction(2))(x)[0]


REDUCTIONS: dict[str, Rule] = {
    "sum": _reduce(_summed, lambda x, k: ZERO),
    "mean": _reduce(lambda x, k: _summed(x, k).scaled(-k), lambda x, k: -k),
    "var": _reduce(_mean_square, lambda x, k: minus(x.after, k)),
    "std": _reduce(lambda x, k: _positive(x)[0], lambda x, k: -k),
    "linalg_vector_norm": _reduce(lambda x, k: _positive(x)[0].scaled(k * HALF), lambda x, k: -k * HALF),
    "norm": _reduce(lambda x, k: _positive(x)[0].scaled(k * HALF), lambda x, k: -k * HALF),
    **dict.fromkeys(_words("amax amin max min median logsumexp"), _reduce(lambda x, k: _positive(x)[0], lambda x, k: ZERO)),
}
"""Reductions over axes that are gone. Norms are 2-norms."""


def _norm_of(context: Context, call: Call, values: Values) -> Result | None:
    kind = call.get("ord", call.get("p", 2))
    return REDUCTIONS["norm"](context, call, values) if kind in {None, 2} or _reduced(context, call) == 0 else None


def _softmax(context: Context, call: Call, values: Values) -> Result | None:
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


# --- contractions -------------------------------------------------------------------------------------------------------------------


def _bound(matrix: State, summed: Fraction, own: Fraction) -> Exponent:
    """What a random matrix makes of a vector that is aligned with it: ‖A‖₂ = a·(√summed + √own) (THEORY 1.3), or its mean."""
    return top(plus(matrix.init, summed * HALF + max(ZERO, (summed - own) * HALF)), plus(matrix.mean, summed))


def _contract(a: State, b: State, summed: Fraction, own_a: Fraction, own_b: Fraction) -> State:
    """Σ a·b over d**summed terms, where a has d**own_a rows that b does not share, and b d**own_b."""
    independent = top(plus(a.init, b.init, summed * HALF), plus(a.mean, b.mean, summed))
    init = plus(a.init, b.init, summed) if shared(a, b) else independent
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


def _handed_back(context: Context, matrix: State, summed: Fraction, own: Fraction) -> Exponent:
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
    if len(factors) != 2 or output is None:
        return None
    kept = {label.name for axis in output for label in axis}
    out, pull = _product(context, call, [(b, of[b.node]) for b in factors], kept, output)  # pyright: ignore[reportArgumentType]
    for term in terms:
        added = of[term.node]
        assert added is not None
        trailing = len(term.axes) <= 1 and (output[-1] == tuple(label for label, _ in term.axes[0]) if term.axes else True)
        out = zipped(lambda x, y: joined((x, y)), out, added if trailing else Pieces.of(added.whole(joined)), _shape(call))

    def pulled(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        to_a, to_b = pull(d)
        back = {factors[1].node: to_b} | {factors[0].node: to_a}
        for term in terms:
            back[term.node] = _added_back(context, call, term, d)
        return [back.get(node) if node is not None else None for node in call.tensors]

    return out, pulled


def _added_back(context: Context, call: Call, term: Binding, d: Pieces[Exponent]) -> Pieces[Exponent]:
    """A bias' gradient: one per output coordinate, so it keeps the parts of the last axis."""
    rest = context.gathered(max(context.orders(call.node) - context.orders(term.node), ZERO))
    if d.labels is not None and len(term.axes) == 1 and term.node.meta["val"].shape[-1] == d.labels.shape[-1]:
        rows = d.labels.reshape(-1, d.labels.shape[-1])
        if bool((rows == rows[0]).all()):
            return Pieces.labelled([plus(e, rest) for e in d.parts], rows[0])
    return Pieces.of(plus(d.whole(_top), rest))


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
        joined([_contract(_column(a, col_a), b.part(row, col_b), k, a.own, row_order(row)) for col_a, col_b, k in columns]) for row in rows
    ]
    out = _in_rows(made, rows, place, _shape(call))

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        cuts: list[int] = sorted(
            {*(b.value.cuts(b.row) if b.row is not None else []), *(d.cuts(place) if place is not None and d.labels is not None else [])}
        )
        parts = _runs(cuts, call.shape[place][0]) if place is not None and cuts else [whole]
        at = [d.within(tuple(row if i == place else whole for i in range(len(call.shape))), _top) for row in parts]
        to_a = []
        for _, col_b, k in columns:
            back = [plus(e, _handed_back(context, b.part(row, col_b), row_order(row), k)) for e, row in zip(at, parts, strict=True)]
            to_a.append(top(*back))
        to_b = [[plus(e, _handed_back(context, _column(a, col_a), a.own, k)) for col_a, _, k in columns] for e in at]
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


def _attention(context: Context, call: Call, values: Values) -> Result | None:
    bound = bind(call, context.growth.axes)
    if bound is None or any(value is None for value in values[:3]):
        return None
    q, k, v = (value.whole(joined) for value in values[:3] if value is not None)
    letters = [{label.name: context.order(dim) for axis in b.axes for label, dim in axis} for b in bound[0][:3]]
    summed, values_of, repeats = letters[0].get("e", ZERO), letters[2].get("f", ZERO), letters[0].get("r", ZERO)
    keys = letters[1].get("s", ZERO)
    if keys:
        return None
    scale = _scale(context, call)
    logits = _contract(q, k, summed, ZERO, ZERO).scaled(scale)
    out = State.of(v.init, v.mean, top(v.change, plus(v.init, least(logits.change, ZERO))), v.roots)

    context.logits[call.node] = logits, NOTHING

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        e = d.whole(_top)
        context.logits[call.node] = logits, plus(e, _handed_back(context, v, values_of, ZERO))
        to_logits = plus(context.logits[call.node][1], scale)
        shared_heads = context.gathered(repeats)
        to_q, to_k = plus(to_logits, k.after), plus(to_logits, q.after, shared_heads)
        return [Pieces.of(to_q), Pieces.of(to_k), Pieces.of(plus(e, shared_heads)), *(None for _ in values[3:])]

    return Pieces.of(out), pull


def _scale(context: Context, call: Call) -> Exponent:
    """The power of d in attention's scale; left out it is 1/√(the last axis of q)."""
    query = [node.args[0] for node in call.nodes]
    sizes = tuple(int(node.meta["val"].shape[-1]) for node in query if isinstance(node, fx.Node))
    given = call.over_widths("scale")
    if all(scale is None for scale in given):
        node = call.tensors[0]
        return -HALF * context.order(context.dims(node)[-1]) if node is not None else None
    return context.power([float(s) if s is not None else n**-0.5 for s, n in zip(given, sizes, strict=True)], [sizes])


# --- norms, lookups -----------------------------------------------------------------------------------------------------------------


def _place(call: Call, node: Any) -> int | None:
    """Which tensor argument a node is."""
    return next((i for i, n in enumerate(call.tensors) if n is not None and n is node), None)


def _normalisation(context: Context, call: Call, values: Values) -> Result | None:
    """layer, rms, batch, group and instance norm, as in training; gain and bias are the operator's own arguments."""
    x = values[0]
    names = {name: _place(call, call.get(name)) for name in ("weight", "bias")}
    if x is None:
        return None
    over_all = joined(x.parts)
    centred = "rms" not in call.name
    size = over_all.init

    def one(part: State) -> State:
        scaled = _normalised(over_all, centred=centred)[0]
        if part is over_all or size in {None, NOTHING}:
            return scaled
        return State.of(minus(part.init, size), scaled.mean, least(minus(part.change, size), ZERO), part.roots)

    hat = x.each(one) if len(x.parts) > 1 else Pieces.of(one(over_all))
    gain = values[names["weight"]] if names["weight"] is not None else None
    bias = values[names["bias"]] if names["bias"] is not None else None
    out = hat
    trailing = call.name in {"aten.layer_norm", "aten.rms_norm"}
    for other, combine in ((gain, lambda a, b: _times(context, a, b, (False, False))), (bias, lambda a, b: joined((a, b)))):
        if other is not None:
            out = zipped(combine, out, other if trailing else Pieces.of(other.whole(joined)), _shape(call))
    slope = _normalised(over_all, centred=centred)[1]

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        back: list[Pieces[Exponent] | None] = [None] * len(values)
        through = ZERO if gain is None else gain.whole(joined).after
        back[0] = d.each(lambda e: plus(e, through, slope))
        for place, factor in ((names["weight"], hat.whole(joined).after), (names["bias"], ZERO)):
            node = call.tensors[place] if place is not None else None
            if place is not None and node is not None:
                extra = context.gathered(max(context.orders(call.node) - context.orders(node), ZERO))
                back[place] = Pieces.of(plus(d.whole(_top), factor, extra))
        return back

    return out, pull


def _recurrent(bounded: Curve) -> Rule:
    """lstm, gru, rnn: h = f(W_ih·x + W_hh·h + b) over a finite number of steps; gates are Θ(1) (THEORY 2.2, row 29)."""

    def rule(context: Context, call: Call, values: Values) -> Result | None:
        params = call.get("params")
        biases = call.get("has_biases")
        nodes = [n for n in params if isinstance(n, fx.Node)] if isinstance(params, (list, tuple)) else []
        count = 4 if biases else 2
        given = dict(zip(call.tensors, values, strict=True))
        states = [v.whole(joined) for n in nodes if (v := given.get(n)) is not None]
        x = values[0]
        if x is None or not nodes or len(nodes) % count or len(states) != len(nodes):
            return None
        directions = 2 if call.get("bidirectional") else 1
        below, cells = x.whole(joined), []
        for first in range(0, len(nodes), count * directions):
            layer = [_Cell.of(context, nodes, states, at, count, below, bounded) for at in range(first, first + count * directions, count)]
            cells.append(layer)
            below = joined([cell.hidden for cell in layer])

        def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
            back: dict[fx.Node, Exponent] = {}
            e = d.whole(_top)
            for layer in reversed(cells):
                for cell in layer:
                    back |= dict(zip(nodes[cell.at : cell.at + count], cell.handed_back(context, e), strict=False))
                e = top(*(cell.to_input(context, e) for cell in layer))
            back[call.tensors[0]] = e  # pyright: ignore[reportArgumentType]
            return [Pieces.of(back[n]) if n in back else None for n in call.tensors]  # pyright: ignore[reportArgumentType]

        return Pieces.of(below), pull

    return rule


@dataclass(frozen=True)
class _Cell:
    """One layer of a recurrent operator in one direction: its matrices with the powers of d in their columns and rows."""

    at: int
    matrices: tuple[tuple[State, Fraction, Fraction], ...]
    given: tuple[State, State]
    hidden: State

    @classmethod
    def of(
        cls, context: Context, nodes: Sequence[fx.Node], states: Sequence[State], at: int, count: int, x: State, bounded: Curve
    ) -> _Cell:
        """The cell of the weights from `at` on."""
        matrices = []
        for node, state in zip(nodes[at : at + 2], states[at : at + 2], strict=True):
            rows, columns = (context.order(dim) for dim in context.dims(node))
            matrices.append((state, columns, rows))
        (w, columns, rows), (u, own, _) = matrices
        parts = [_contract(x, w, columns, ZERO, rows), *states[at + 2 : at + count]]
        begun = bounded(joined(parts))[0]
        hidden = bounded(joined([*parts, _contract(begun, u, own, ZERO, rows)]))[0]  # as in every later step
        return cls(at, tuple(matrices), (x, hidden), hidden)

    def handed_back(self, context: Context, d: Exponent) -> list[Exponent]:
        """The gradients of W_ih, W_hh and the biases."""
        d = self.through_time(context, d)
        return [plus(d, self.given[0].after), plus(d, self.given[1].after), d, d]

    def through_time(self, context: Context, d: Exponent) -> Exponent:
        """The gradient of the sums inside, from all steps."""
        matrix, columns, rows = self.matrices[1]
        return top(d, plus(d, _handed_back(context, matrix, rows, columns)))

    def to_input(self, context: Context, d: Exponent) -> Exponent:
        """The gradient of the input."""
        matrix, columns, rows = self.matrices[0]
        return plus(self.through_time(context, d), _handed_back(context, matrix, rows, columns))


def _lookup(context: Context, call: Call, values: Values) -> Result | None:
    table = values[0]
    if table is None:
        return None
    out = table if table.labels is None else Pieces.of(table.whole(joined))
    if table.labels is not None and table.labels.dim() == 2 and bool((table.labels == table.labels[0]).all()):
        out = Pieces.labelled(table.parts, table.labels[0].expand(_shape(call)))
    return out, lambda d: [Pieces.of(d.whole(_top)), *(None for _ in values[1:])]


def _glu(context: Context, call: Call, values: Values) -> Result | None:
    x = values[0]
    if x is None:
        return None
    state = x.whole(joined)
    gate = _even_bounded(state)[0]
    out = State.of(plus(state.init, gate.init), state.mean, top(plus(state.change, gate.init), plus(state.init, gate.change)), state.roots)
    return Pieces.of(out), lambda d: [Pieces.of(plus(d.whole(_top), top(ZERO, state.after)))]


# --- values that only move ----------------------------------------------------------------------------------------------------------

TAKES = {"getitem", "aten.select", "aten.slice", "aten.narrow"}


def _run(call: Call, tensors: dict[fx.Node, Tensor]) -> Tensor | None:
    """The operator itself on labels in place of its tensor arguments; None where it does not run on them."""
    node = call.node

    def given(n: fx.Node) -> Any:
        return tensors[n] if n in tensors else n.meta["val"]

    try:
        if call.name == "getitem":
            source, index = node.args[0], node.args[1]
            assert isinstance(source, fx.Node)
            assert isinstance(index, int)
            target: Any = source.target
            inner = dict.fromkeys(source.all_input_nodes[:1], tensors[source])
            arguments = fx.map_arg((source.args, source.kwargs), lambda n: inner.get(n, n.meta["val"]))
            return target(*arguments[0], **arguments[1])[index]  # pyright: ignore
        arguments = fx.map_arg((node.args, node.kwargs), given)
        function: Any = node.target
        out = function(*arguments[0], **arguments[1])  # pyright: ignore
    except (RuntimeError, TypeError, NotImplementedError, ValueError, IndexError):
        return None
    return out if isinstance(out, Tensor) and tuple(out.shape) == _shape(call) else None


def moves(context: Context, call: Call, values: Values) -> Result | None:
    """view, permute, cat, slice, …: the operator itself tells where the parts go."""
    sources = [(node, value) for node, value in zip(call.tensors, values, strict=True) if value is not None and node is not None]
    if not sources:
        return None
    if call.name in SPLITS or call.name == "aten.unbind":  # its parts are taken by getitem
        x = sources[0][1]
        return x, lambda d: [d, *(None for _ in values[1:])]
    sources = [(n, v) for n, v in sources if _is_source(n)]
    states: list[State] = []
    labels: dict[fx.Node, Tensor] = {}
    for node, value in sources:
        own = torch.zeros((), dtype=torch.int16) if value.labels is None else value.labels
        labels.setdefault(node, (own + len(states)).expand(_source_shape(node)))
        states += [_taken(call, state) for state in value.parts]
    if len(states) == 1 or len(set(states)) == 1:
        out = Pieces.of(states[0])
    else:
        ran = _run(call, labels)
        out = Pieces.of(joined(states)) if ran is None else Pieces.labelled(states, ran)

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        return [_moved_back(call, node, d) if node in labels else None for node in call.tensors]

    return out, pull


def _is_source(node: fx.Node) -> bool:
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        return any(isinstance(part, Tensor) and part.is_floating_point() for part in value)
    return isinstance(value, Tensor) and value.is_floating_point()


def _source_shape(node: fx.Node) -> tuple[int, ...]:
    """A value's shape; of a split, that of what is split."""
    value = node.meta["val"] if isinstance(node.meta["val"], Tensor) else node.all_input_nodes[0].meta["val"]
    return tuple(value.shape)


def _taken(call: Call, state: State) -> State:
    """What a part of a value comes from: that part of the weight's rows."""
    if call.name not in TAKES:
        return state
    if call.name == "getitem":
        part: tuple = ("part", call.node.args[1])
    else:
        part = (call.name, call.get("dim"), call.get("index", None), call.get("start", None), call.get("end", call.get("length", None)))
    return State(state.init, state.mean, state.change, state.after, frozenset((name, (*path, part)) for name, path in state.roots))


def _moved_back(call: Call, node: fx.Node | None, d: Pieces[Exponent]) -> Pieces[Exponent]:
    """The gradient of a source: where an entry went nowhere it is nothing."""
    assert node is not None
    shape = _source_shape(node)
    count = math.prod(shape)
    if (
        (d.labels is None and call.name not in TAKES and call.name not in {"aten.cat", "aten.stack"})
        or count > LARGEST
        or d.parts == (None,)
    ):
        return Pieces.of(d.whole(_top))
    index = torch.arange(1, count + 1).reshape(shape)
    others = {n: torch.zeros(_source_shape(n), dtype=index.dtype) for n in call.node.all_input_nodes if n is not node and _is_source(n)}
    went = _run(call, {node: index, **others})
    if went is None or None in d.parts:
        return Pieces.of(d.whole(_top))
    ranked = sorted({NOTHING, *d.parts})  # pyright: ignore[reportArgumentType]
    rank = torch.tensor([ranked.index(e) for e in d.parts])
    at = rank[0].expand(went.shape) if d.labels is None else rank[d.labels.long()]
    arrived = torch.zeros(count + 1, dtype=torch.long).scatter_reduce(0, went.reshape(-1), at.reshape(-1), "amax")[1:]
    return Pieces.labelled(ranked, arrived.reshape(shape))


def _gather(context: Context, call: Call, values: Values) -> Result | None:
    """Entries chosen by indices: as large as where they come from."""
    return _lookup(context, call, values)


def _pass(context: Context, call: Call, values: Values) -> Result | None:
    """Pooling, interpolation, padding, cumulative sums over axes that do not grow."""
    x, node = values[0], call.tensors[0]
    if x is None or node is None or context.orders(node) != context.orders(call.node):
        return None
    out = x if x.labels is None else Pieces.of(x.whole(joined))
    return out, lambda d: [Pieces.of(d.whole(_top)), *(None for _ in values[1:])]


def _rules() -> dict[str, Rule]:
    rows: list[tuple[str, Rule]] = [
        *((name, unary(curve)) for name, curve in CURVES.items()),
        ("pow", _pow),
        *((name, _clamp) for name in ("clamp", "clamp_min", "clamp_max")),
        *((name, _add) for name in ("add", "sub", "rsub")),
        *((name, _mul) for name in ("mul", "div", "multiply", "divide", "true_divide")),
        *((name, _merge) for name in ("where", "masked_fill", "maximum", "minimum", "copy", "index_put", "masked_scatter", "index_add")),
        *((name, _merge) for name in ("slice_scatter", "select_scatter", "index_copy")),
        *((name, rule) for name, rule in REDUCTIONS.items() if "norm" not in name),
        *((name, _norm_of) for name in ("norm", "linalg_vector_norm")),
        *((name, _softmax) for name in ("softmax", "_softmax", "log_softmax", "_log_softmax")),
        ("scaled_dot_product_attention", _attention),
        *((f"{kind}_norm", _normalisation) for kind in ("layer", "rms", "batch", "group", "instance")),
        *((name, _lookup) for name in ("embedding",)),
        *((name, _gather) for name in ("index", "index_select", "gather", "topk", "sort")),
        ("glu", _glu),
        *((name, _recurrent(_odd_bounded)) for name in ("lstm", "gru", "rnn_tanh")),
        ("rnn_relu", _recurrent(_positive)),
    ]
    return {f"aten.{name}": rule for name, rule in rows}


RULES: dict[str, Rule] = _rules()
"""Operator without overload -> how sizes go through it; what is not here goes by its row of `scaling.operators.OPERATORS`."""

MOVES = {
    *_aten("view reshape flatten unflatten _unsafe_view _reshape_alias view_as reshape_as ravel permute transpose t mT numpy_T swapaxes"),
    *_aten("swapdims adjoint matrix_H movedim moveaxis unsqueeze squeeze expand expand_as broadcast_to repeat tile repeat_interleave cat"),
    *_aten("concat concatenate stack select slice narrow unbind flip roll tril triu to clone contiguous detach alias type_as rot90"),
    "aten.pixel_shuffle",
    *SPLITS,
    "getitem",
}
"""Operators that only move values."""

PASSES = {
    *(f"aten.{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
    *_aten("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d"),
    *_aten("upsample_trilinear3d max_pool2d_with_indices pad constant_pad_nd _adaptive_avg_pool2d cumsum cumprod"),
    *(f"aten.{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2)),
}
"""Operators that keep sizes as long as no growing axis changes its length."""


def _rule(call: Call) -> Rule | None:
    if call.name in RULES:
        return RULES[call.name]
    if call.name in MOVES:
        return moves
    if call.name in PASSES:
        return _pass
    operator = rule_of(call)
    if operator is None or operator.moves is not None:
        return None
    if len([n for n in call.tensors if n is not None]) > 1:
        return contraction
    return unary(_generic) if torch.Tag.pointwise in getattr(call.node.target, "tags", ()) else None


def propagate(context: Context, call: Call, values: Values) -> Result:
    """The value of a call, and how its gradient goes back; of unknown size where there is no rule."""
    rule = _rule(call)
    result = rule(context, call, values) if rule is not None else None
    if result is None:
        return Pieces.of(UNKNOWN), lambda _: [None if value is None else Pieces.of(None) for value in values]
    return result
