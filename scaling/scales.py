"""How large the activations are in d where the rules hold: what a model's own forward multiplies, normalizes and sums.

Every map is meant to give values of size Θ(1) (THEORY 1.2, 1.7 step 4). A number the forward multiplies by (an embedding times √d, logits
over d) is made up for in the init and learning rates of the map before it, an exact abc shift; where no map comes before, as after
`F.normalize`, the map after it is told the size of its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import fx

from scaling.contractions import Carrier, Fold, as_number, taken_by, upstream
from scaling.graph import Call, LayerGraph
from scaling.growth import Growth
from scaling.limits import WIDTH, exponent
from scaling.notation import formula
from scaling.operators import bind, rule_of
from scaling.optimizers import Map, attained
from scaling.records import Contraction, Use, WeightRule
from scaling.uses import Dot, WeightUse, sum_of

__all__ = ["Scales", "bent", "few_normalized", "few_taken", "grown_outputs", "nearest", "scales_of", "too_large_once_aligned"]

ONE = sympy.Integer(1)


@dataclass(frozen=True, eq=False)
class Scales:
    """`of` has the size of every activation that is not Θ(1); `folds` what weights make up for."""

    of: dict[fx.Node, sympy.Expr] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)

    def at(self, node: fx.Node) -> sympy.Expr:
        """The RMS size of a value, in d."""
        return self.of.get(node, ONE)


def scales_of(graph: LayerGraph, growth: Growth, uses: list[WeightUse], dots: list[Dot]) -> Scales:
    """The sizes of all activations, if every map but those of `folds` gives values of size Θ(1)."""
    return _Sizes(graph, growth, uses, dots).run()


def nearest(use: Map, wanted: sympy.Expr) -> sympy.Expr:
    """The size nearest to the wanted one that the outputs of a map can have whose `entries` are given: its weight makes up for no more."""
    least, most = attained(use)
    if exponent(wanted) < exponent(least):
        return least
    return most if exponent(wanted) > exponent(most) else wanted


def _is_curve(call: Call) -> bool:
    """Whether a call is a function of each entry that does not keep scales (exp, sigmoid), or of an axis of them (softmax)."""
    each = torch.Tag.pointwise in getattr(call.node.target, "tags", ())
    operator = rule_of(call)
    return call.name in CURVES or (each and operator is not None and not operator.linear and call.name not in SIZES)


def _sums(use: WeightUse) -> bool:
    """Whether a use sums over an axis of its weight."""
    return any(span.part == "in" for axis in use.spans for span in axis)


class _Sizes:
    def __init__(self, graph: LayerGraph, growth: Growth, uses: list[WeightUse], dots: list[Dot]) -> None:
        self.graph, self.growth = graph, growth
        self.uses: dict[fx.Node, list[WeightUse]] = {}
        for use in uses:
            self.uses.setdefault(use.call.node, []).append(use)
        self.sums = {ended.node for use in uses if (ended := sum_of(graph, use.call)) is not None and _sums(use)}
        self.dots = {dot.call.node for dot in dots if growth.grows(dot.dim)}
        self.taken = taken_by(graph, growth, dots)
        self.scales = Scales()
        self.entries = self._divided()

    def run(self) -> Scales:
        for use in (use for uses in self.uses.values() for use in uses):
            if use in self.entries:
                self.scales.folds.append(Fold(Carrier(use.weight, use.call, None), self.entries[use], "entries"))
            else:
                self._on_the_weight(use)
        for node, call in self.graph.calls.items():
            if node in self.graph.data and node.op == "call_function":
                size = self._size(call)
                if size != 1 and exponent(size) != 0:
                    self.scales.of[node] = size
        return self.scales

    def _size(self, call: Call) -> sympy.Expr:
        maps = [
            use for use in self.uses.get(call.node, ()) if any(span.part in {"in", "lookup", "out"} for axis in use.spans for span in axis)
        ]
        inputs = [self.scales.at(node) for node in call.tensors if node is not None and node in self.graph.data]
        if maps or call.node in self.dots:
            return nearest(self._map(maps[0], sympy.Mul(*inputs)), ONE) if len(maps) == 1 and maps[0] in self.entries else ONE
        if call.node in self.sums:
            return inputs[0]  # what the map before it gives
        number = self._number(call)
        if number != 1 and inputs:
            return ONE if inputs[0] == 1 and self._made_up_for(call, number) else inputs[0] * number
        rule = SIZES.get(call.name)
        if rule is not None:
            return rule(self, call, inputs)
        operator = rule_of(call)
        keeps = operator is not None and (operator.linear or operator.moves is not None)
        return max(inputs, key=exponent) if inputs and keeps else ONE

    def _number(self, call: Call) -> sympy.Expr:
        """The number a call multiplies by, where it depends on the width."""
        numbers = as_number(self.graph, call)
        if call.node in self.taken or all(number == 1 for number in numbers):
            return ONE  # most calls: no path is looked for
        return self._law(numbers, call, [carrier.weight for carrier in upstream(self.graph, call.node) or ()])

    def _on_the_weight(self, use: WeightUse) -> None:
        """Numbers that multiply the weight itself, before it meets data; not what a curve makes of it, which the weight's size is not."""
        for call in map(self.graph.calls.__getitem__, self.graph.made_of(use.operand)[use.weight][1:]):
            if _is_curve(call):
                return
            law = self._law(as_number(self.graph, call), call, [use.weight])
            if law != 1:
                why = f"makes up for the factor {law} at {call.source}"
                self.scales.folds.append(Fold(Carrier(use.weight, use.call, None), 1 / law, why=why))

    def _made_up_for(self, call: Call, number: sympy.Expr) -> bool:
        """Whether maps that feed nothing else come before: they make up for the number."""
        carriers = upstream(self.graph, call.node, alone=True) or []
        if not carriers or not all(self._is_map(carrier.weight, carrier.call) for carrier in carriers):
            return False
        divided = [use for carrier in carriers for use in self.uses.get(carrier.call.node, ()) if use in self.entries]
        if any(exponent(nearest(self._map(use, ONE), 1 / number)) != exponent(1 / number) for use in divided):
            return False
        why = f"makes up for the factor {number} at {call.source}"
        self.scales.folds.extend(Fold(carrier, 1 / number, why=why) for carrier in carriers)
        return True

    def _is_map(self, weight: Call, call: Call) -> bool:
        """Whether a weight is more there than a gain: a constant that it starts at would have to move with the fold."""
        spans = [axis for use in self.uses.get(call.node, ()) if use.weight is weight for axis in use.spans]
        return any(span.part != "copy" for axis in spans for span in axis)

    def _divided(self) -> dict[WeightUse, sympy.Expr]:
        """The size of the entries of what a use makes of its weight, where the weight's own cancels: W/‖W‖ has 1/√n, however large W is."""
        sizes: dict[fx.Node, sympy.Expr] = {}
        for node, call in self.graph.calls.items():
            if node in self.graph.weight_only:
                sizes[node] = self._of_weights(call, [sizes[n] for n in call.tensors if n is not None and n in sizes])
        return {
            use: sizes[use.operand]
            for uses in self.uses.values()
            for use in uses
            if sizes[use.operand].free_symbols <= {WIDTH}
            and len(self.graph.made_of(use.operand)) == 1
            and any(span.part in {"in", "lookup", "out"} for axis in use.spans for span in axis)
        }

    def _of_weights(self, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
        """The same of any value made of weights, where each weight's own size is a letter, and so is what nothing is known of."""
        letter = sympy.Dummy(positive=True)
        if not inputs or call.name in CURVES:
            return letter
        if call.name in NORMALIZES:
            return ONE if len(inputs) == 1 else letter
        if call.name in SIZES:
            return SIZES[call.name](self, call, inputs) * self._law(as_number(self.graph, call), call, [])
        operator = rule_of(call)
        return inputs[0] if operator is not None and operator.linear else letter

    def _map(self, use: WeightUse, given: sympy.Expr) -> Use:
        """A use whose norm is divided out, as a map of inputs of a given size."""
        fans = {"in": ONE, "out": ONE}
        for dim, spans in zip(self.growth.axes.dims[use.weight.node], use.spans, strict=True):
            atoms = self.growth.axes.resolve(dim)
            for factor, span in zip([(atom,) for atom in atoms] if len(atoms) == len(spans) else [dim], spans, strict=False):
                if span.part in fans:
                    fans[span.part] *= self.growth.of(factor)
        return Use(
            operator=use.call.name,
            source=use.call.source,
            fan_in=fans["in"],
            fan_out=fans["out"],
            input_scale=given,
            entries=self.entries[use],
        )

    def _law(self, numbers: tuple[float, ...], call: Call, weights: list[Call]) -> sympy.Expr:
        """The number as an expression in d: a power of d through its values, or of an axis at hand if there is one width only."""
        sizes = self.growth.sizes
        if all(number == 1 for number in numbers):
            return ONE
        if len(set(sizes)) > 1 and len(numbers) == len(sizes):
            i, j = sizes.index(min(sizes)), sizes.index(max(sizes))
            for power in POWERS:
                if abs(numbers[j] / numbers[i] / (sizes[j] / sizes[i]) ** float(power) - 1) < 1e-3:
                    return _exact(abs(numbers[0]) / sizes[0] ** float(power)) * WIDTH**power
            return ONE
        dims = [dim for node in (call.node, *(weight.node for weight in weights)) for dim in self.growth.axes.dims.get(node, ())]
        for dim in dims:
            if self.growth.grows(dim):
                length = self.growth.axes.size(dim)[0]
                for power in POWERS:
                    if abs(abs(numbers[0]) / length ** float(power) - 1) < 1e-6:
                        return self.growth.of(dim) ** power
        return ONE


POWERS: tuple[sympy.Expr, ...] = tuple(sympy.Rational(n, 2) for n in (-1, 1, -2, 2, -3, 3, -4, 4))


def _exact(value: float) -> sympy.Expr:
    """A constant factor: the root of a fraction."""
    square = Fraction(value**2).limit_denominator(10**8)
    return sympy.sqrt(sympy.Rational(square.numerator, square.denominator)) if square else ONE


# how operators change sizes; whatever is linear or only moves values keeps them, all else gives Θ(1)

Rule = Callable[["_Sizes", Call, list[sympy.Expr]], sympy.Expr]


def _power(power: sympy.Expr) -> Rule:
    def rule(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
        return inputs[0] ** power if inputs else ONE

    return rule


def _to_the(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
    power = call.get("exponent")
    return inputs[0] ** sympy.Rational(Fraction(power).limit_denominator(12)) if inputs and isinstance(power, (int, float)) else ONE


def _product(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
    return sympy.Mul(*inputs)


def _quotient(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
    first = call.tensors[0]
    if len(inputs) == 2:
        return inputs[0] / inputs[1]
    sized = sizes.graph.data if call.node in sizes.graph.data else sizes.graph.weight_only
    return sympy.Mul(*inputs) if first in sized else 1 / sympy.Mul(*inputs)


def _reduced(power: sympy.Expr) -> Rule:
    """Over n growing entries (of a weight: any n), nᵖ times their size."""

    def rule(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
        source = call.tensors[0]
        dims = sizes.growth.axes.dims.get(source, ()) if source is not None else ()
        which = call.get("dim", None)
        gone = range(len(dims)) if which in (None, []) else [which] if isinstance(which, int) else which
        counted = [dims[i] for i in gone if dims and (sizes.growth.grows(dims[i]) or call.node in sizes.graph.weight_only)]
        return sympy.Mul(*inputs[:1], *(sizes.growth.of(dim) ** power for dim in counted))

    return rule


def _shares(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
    """Of n entries that add up to 1, one has 1/n."""
    return _reduced(-ONE)(sizes, call, [])


def _norm(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
    return _reduced(_root(call.get("ord", call.get("p", 2))))(sizes, call, inputs)


def _root(p: Any) -> sympy.Expr:
    """1/p: the p-norm of n entries of like size is n^(1/p) times it (2 unless it is a number)."""
    return HALF if not isinstance(p, (int, float)) or p <= 0 else sympy.Integer(0) if math.isinf(p) else 1 / sympy.Rational(Fraction(p))


def _loss(power: int) -> Rule:
    """|x - y|ᵖ, entry by entry, their mean or (2 for torch) their sum."""

    def rule(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
        size = max(inputs, key=exponent) ** power if inputs else ONE
        return _all_of(sizes, call, size, ONE) if call.get("reduction") == 2 else size

    return rule


def _distance(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
    return _all_of(sizes, call, max(inputs, key=exponent), _root(call.get("p", 2))) if inputs else ONE


def _all_of(sizes: _Sizes, call: Call, size: sympy.Expr, power: sympy.Expr) -> sympy.Expr:
    """Over all entries of two values, which are broadcast together."""
    counts = [sympy.Mul(*map(sizes.growth.of, sizes.growth.axes.dims.get(node, ()))) for node in call.tensors if node is not None]
    return size * max((count**power for count in counts), key=exponent, default=ONE)


def _scattered(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
    """Sums of those entries that have the same index."""
    own, *_, added = (sizes.growth.axes.dims.get(node, ()) for node in call.tensors if node is not None)
    more = sizes.growth.of(added[call.get("dim")]) / sizes.growth.of(own[call.get("dim")]) if own and added else ONE
    return max(inputs, key=exponent) * max(more, ONE, key=exponent) if inputs else ONE


def _contracted(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
    """The sums of an einsum of one value; a product of two over a growing axis is a contraction of its own."""
    bound = bind(call, sizes.growth.axes) if len(call.tensors) == 1 else None
    kept = {label.name for axis in bound[1].output.axes for label in axis} if bound is not None else set()
    gone = [dim for binding in (bound[0] if bound else ()) for axis in binding.axes for label, dim in axis if label.name not in kept]
    return sympy.Mul(*inputs, *(sizes.growth.of(dim) for dim in gone))


def _fourier(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
    """n^(1/2) times as large in the root of the mean square (Parseval), less what its `norm` divides by."""
    norm = call.get("norm", None)
    divided = {"ortho": HALF, "forward": ONE}.get(norm, ONE if norm is None and "_i" in call.name else sympy.Integer(0))
    return _reduced(HALF - divided)(sizes, call, inputs)


def _first(sizes: _Sizes, call: Call, inputs: list[sympy.Expr]) -> sympy.Expr:
    return inputs[0] if inputs else ONE


HALF: sympy.Expr = sympy.Rational(1, 2)
NORMALIZES = {"aten.layer_norm", "aten.rms_norm"}
"""Operators whose value has entries of size 1."""
CURVES = {"aten.softmax", "aten._softmax"}
"""Operators that no scale goes through, beside those that torch tags as pointwise."""

SIZES: dict[str, Rule] = {
    **{f"aten.{name}": _product for name in ("mul", "multiply", "matmul", "bmm", "mm", "inner")},
    "aten.einsum": _contracted,
    **{f"aten.{name}": _quotient for name in ("div", "divide", "true_divide")},
    **{f"aten.{name}": _norm for name in ("linalg_vector_norm", "norm")},
    "aten.dist": _distance,
    **{f"aten.{name}": _shares for name in ("softmax", "_softmax")},
    **{f"aten.fft_{inverse}{kind}{rank}": _fourier for inverse in ("", "i") for kind in ("fft", "rfft") for rank in ("", "2", "n")},
    "aten.mse_loss": _loss(2),
    **{f"aten.{name}": _loss(1) for name in ("l1_loss", "smooth_l1_loss", "huber_loss")},
    **{f"aten.{name}": _scattered for name in ("index_add", "scatter_add")},
    **{
        f"aten.{name}": _first for name in ("relu", "leaky_relu", "abs", "clamp", "clamp_min", "maximum", "minimum", "masked_fill", "where")
    },
    **{f"aten.{name}": _first for name in ("std", "amax", "amin", "max", "min", "mean")},
    "aten.var": _power(sympy.Integer(2)),
    **{f"aten.{name}": _reduced(ONE) for name in ("sum", "nansum", "cumsum")},
    "aten.square": _power(sympy.Integer(2)),
    "aten.sqrt": _power(HALF),
    "aten.rsqrt": _power(-HALF),
    "aten.reciprocal": _power(sympy.Integer(-1)),
    "aten.pow": _to_the,
}
"""Operator -> the size of its value from the sizes of its inputs."""


# what nothing makes up for


def grown_outputs(graph: LayerGraph, scales: Scales) -> list[Contraction]:
    """Outputs that are sums over the width (of features, of squared distances), with no map after them to make up for it (THEORY P58)."""
    found = []
    for node in graph.outputs:
        size = scales.at(node)
        if exponent(size) <= 0:
            continue
        while True:  # the operator that made it so large
            call = graph.calls[node]
            below = [n for n in call.tensors if n is not None and scales.at(n) == scales.at(node)]
            if not below:
                break
            node = below[0]
        found.append(Contraction(operator=call.name, source=call.source, dim=size, present=ONE, folded=()))
    return found


# weights whose norm is divided out


def too_large_once_aligned(rules: list[WeightRule]) -> tuple[str, ...]:
    """Notes on weights that the model divides by their own norm, which leaves them larger than a map of their fans may be.

    A readout of d features may have rows of norm 1/√d; with rows of norm 1 its outputs are Θ(1) at init, but a change of the features
    that is aligned with them moves them by √d, and no rule of the weight's mends that.
    """
    notes = []
    for rule in rules:
        for block in rule.blocks:
            power = exponent(attained(block)[1] / block.target) if block.entries is not None else 0
            if power > 0:
                more = formula(WIDTH**power)
                notes.append(
                    f"{rule.name} is divided by its own norm at {rule.uses[0].source}: what the layers before it learn moves its outputs"
                    f" {more} times as much as what it learns itself, however it starts; divide its inputs or outputs by {more}"
                )
    return tuple(dict.fromkeys(notes))


# norms over few coordinates

NORMS = NORMALIZES | {"aten.rsqrt"}
"""Operators that divide by a size: the fused ones, and what a norm that is written out ends in."""


def few_normalized(graph: LayerGraph, growth: Growth, uses: list[WeightUse], rules: list[WeightRule]) -> tuple[str, ...]:
    """Notes on norms over coordinates that do not grow, of what a sum over the width made: no rule helps them.

    At init such a sum is 1/√d of what it becomes, and a norm divides the gradient by what it is: upstream it is √d too large
    (THEORY P22; the norm of a latent of fixed rank, of the keys of a fixed number of heads).
    """
    sums = {name for rule in rules for name in rule.names if any(exponent(block.fan_in) > 0 for block in rule.blocks)}
    grown = {use.call.node for use in uses if sums & set(use.weight.names) and any(s.part == "in" for axis in use.spans for s in axis)}
    found: dict[str, None] = {}
    for call in graph.calls.values():
        source = call.tensors[0] if call.name in NORMS and call.tensors else None
        while source in graph.data and source not in grown and graph.calls[source].tensors:
            source = graph.calls[source].tensors[0]
        if source is None or source not in grown or any(growth.grows(dim) for dim in growth.axes.dims.get(source, ())):
            continue
        maker = f" ({graph.calls[source].source.module})" if graph.calls[source].source.module else ""
        found[
            f"the norm at {call.source} is over a fixed number of coordinates, each a sum over the width{maker}: at init it hands back a "
            "gradient √d larger than without it, which no rule mends; normalize before the map, or let the number of its outputs grow"
        ] = None
    return tuple(found)


# weights that are bent before they are used


def bent(graph: LayerGraph, growth: Growth, uses: list[WeightUse]) -> tuple[str, ...]:
    """Notes on matrices that a curve goes over before they sum over the width (exp(W)·x): the rules are those of W itself."""
    found: dict[str, None] = {}
    for use in uses:
        dims = zip(growth.axes.dims[use.weight.node], use.spans, strict=True)
        if any(growth.grows(dim) and any(span.part == "in" for span in axis) for dim, axis in dims):
            for call in map(graph.calls.__getitem__, graph.made_of(use.operand)[use.weight][1:]):
                if _is_curve(call):
                    found[f"{call.name.removeprefix('aten.')} of {use.weight.names[0]} sums over the width at {use.call.source}"] = None
    return tuple(f"{what}: its rules are those of a weight that is used as it is, and nothing is proven of the curve" for what in found)


# gates that read a few features


def few_taken(graph: LayerGraph, growth: Growth) -> tuple[str, ...]:
    """Notes on the few entries of a growing axis that something reads beside the whole: the rules are those of the axis.

    They are few among d, but what they feed (a gate of all features) sends each of them a gradient that does not fall with d as the other
    entries' does. An update that does not see the size of a gradient stays Θ(1); SGD's grows.
    """
    found: dict[str, None] = {}
    for sample in growth.axes.samples:
        if growth.grows(sample.source) and not growth.grows(sample.dim):
            line = graph.calls[sample.node].source.model_copy(update={"module": ""})  # the same in every layer
            found[f"{growth.of(sample.dim)} of {growth.of(sample.source)} features are taken at {line}"] = None
    return tuple(
        f"{what}: too few to have rules of their own. Their gradient is larger than that of the others: Adam does not see it,"
        " under SGD their change grows with the width (flow(table, 'sgd') says how)"
        for what in found
    )
