"""What a rule is given, and the types of rules: call and pieces in, pieces and the way back out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import sympy
from torch import fx

from scaling.axes import Dim
from scaling.graph import Call, LayerGraph, Size
from scaling.growth import Growth
from scaling.limits import WIDTH, exponent
from scaling.orders import NOTHING, ZERO, Exponent, Pieces, State, top
from scaling.uses import Dot, is_linear

__all__ = ["HALF", "LARGEST", "TINY", "Context", "Curve", "Pull", "Result", "Rule", "Values", "largest", "nothing", "shape_of"]


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
        """The power of d in the length of a part [start, stop), at the first width, of an axis: that of what it is made of."""
        axes = self.growth.axes
        resolved = axes.resolve(dim)
        few = [s for s in axes.samples if axes.resolve(s.source) == resolved]
        if few and all(any(s.start[0] <= at < s.stop[0] for s in few) for at in range(start, stop)):
            return max(self.order(s.dim) for s in few)
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


def shape_of(call: Call) -> tuple[int, ...]:
    """A call's shape at the first width."""
    return tuple(size[0] for size in call.shape)


def nothing(values: Values) -> list[Pieces[Exponent] | None]:
    """No gradient for any tensor argument."""
    return [None if value is None else Pieces.of(NOTHING) for value in values]


def largest(exponents: Sequence[Exponent]) -> Exponent:
    """The size of all parts of a gradient as one."""
    return top(*exponents)
