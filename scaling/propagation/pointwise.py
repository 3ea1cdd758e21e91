"""Functions of one entry: what they make of its size, its mean and its change, and their slope."""

from __future__ import annotations

from fractions import Fraction

from torch import fx

from scaling.graph import Call
from scaling.orders import NOTHING, UNKNOWN, ZERO, Exponent, Pieces, State, least, minus, plus, times, top, zipped
from scaling.propagation.context import TINY, Context, Curve, Result, Rule, Values, nothing, shape_of

__all__ = [
    "bounded",
    "clamp",
    "even_bounded",
    "exponential",
    "generic",
    "logarithm",
    "normalised",
    "odd_bounded",
    "positive",
    "powered",
    "raised",
    "same",
    "smooth",
    "softplus",
    "unary",
]


def same(x: State) -> tuple[State, Exponent]:
    """As large as its input."""
    return x, ZERO


def positive(x: State) -> tuple[State, Exponent]:
    """relu, abs: as large as its input, with a mean."""
    return State.of(x.init, x.init, x.change, x.roots, x.after), ZERO


def odd_bounded(x: State) -> tuple[State, Exponent]:
    """tanh: linear where its input is small, at most 1."""
    low, mean = least(x.init, ZERO), least(x.mean, ZERO)
    return State.of(low, mean, least(x.change, ZERO), x.roots, least(x.after, ZERO)), ZERO


def bounded(x: State) -> tuple[State, Exponent]:
    """At most 1, with a mean."""
    low = least(x.init, ZERO)
    return State.of(low, low, least(x.change, ZERO), x.roots, least(x.after, ZERO)), ZERO


def even_bounded(x: State) -> tuple[State, Exponent]:
    """sigmoid: Θ(1) whatever its input."""
    return State.of(ZERO, ZERO, least(x.change, ZERO), x.roots), ZERO


def smooth(x: State) -> tuple[State, Exponent]:
    """gelu, silu: linear at 0 and far away; their mean is the input's curvature where that is small."""
    bend = x.init if x.init is None or x.init >= 0 else times(x.init, 2)
    return State.of(x.init, top(x.mean, bend), x.change, x.roots, x.after), ZERO


def softplus(x: State) -> tuple[State, Exponent]:
    """At least Θ(1), as large as its input if that is larger."""
    return State.of(top(x.init, ZERO), top(x.init, ZERO), x.change, x.roots), ZERO


def exponential(x: State) -> tuple[State, Exponent]:
    """The exponential of a value that stays Θ(1)."""
    small = x.after is not None and x.after <= 0
    return (State.of(ZERO, ZERO, x.change, x.roots), ZERO) if small else (UNKNOWN, None)


def logarithm(x: State) -> tuple[State, Exponent]:
    """The logarithm of a value that is and stays Θ(1)."""
    known = x.init == 0 and x.after == 0
    return (State.of(ZERO, ZERO, x.change, x.roots), ZERO) if known else (UNKNOWN, None)


def powered(power: Fraction | int) -> Curve:
    """x**power."""
    power = Fraction(power)

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


def normalised(x: State, *, centred: bool) -> tuple[State, Exponent]:
    """A value over its own RMS: Θ(1) whatever its size, and so is its change at most."""
    if x.init == NOTHING:
        moved = NOTHING if x.change == NOTHING else ZERO
        return State.of(NOTHING, NOTHING, moved, x.roots), times(x.after, -1) if x.after != NOTHING else ZERO
    mean = NOTHING if centred else minus(x.mean, x.init)
    return State.of(times(x.init, 0), mean, least(minus(x.change, x.init), ZERO), x.roots, times(x.init, 0)), times(x.after, -1)


def generic(x: State) -> tuple[State, Exponent]:
    """Any other function of one entry, of which only this is known: it keeps Θ(1)."""
    return (State.of(ZERO, ZERO, x.change, x.roots), ZERO) if x.init == 0 and x.after == 0 else (UNKNOWN, None)


def unary(curve: Curve) -> Rule:
    """The rule of a pointwise function."""

    def rule(_: Context, call: Call, values: Values) -> Result | None:
        x = values[0]
        if x is None:
            return None

        def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
            slope = x.each(lambda state: curve(state)[1])
            return [zipped(plus, slope, d, shape_of(call)), *nothing(values[1:])]

        return x.each(lambda state: curve(state)[0]), pull

    return rule


def raised(context: Context, call: Call, values: Values) -> Result | None:
    """A power by an exact fraction."""
    power = call.get("exponent")
    exact = isinstance(power, (int, float)) and Fraction(power).limit_denominator(8)
    if exact is False or exact != power or values[0] is None:
        return None
    return unary(powered(exact))(context, call, values)


def clamp(context: Context, call: Call, values: Values) -> Result | None:
    """A clamp between two bounds, or at an ε."""
    low, high = call.get("min"), call.get("max")
    if any(isinstance(bound, fx.Node) for bound in (low, high)):
        return None
    if low is not None and high is not None:
        return unary(odd_bounded if low == -high else bounded)(context, call, values)
    bound = low if low is not None else high
    if bound is None or abs(bound) > TINY:
        return None
    return unary(same)(context, call, values)
