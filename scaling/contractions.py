"""Products of two activations over a growing axis (q·k): where the factor 1/dim they need is, and which weight can carry the rest.

Trained q and k are aligned, so q·k = Θ(dim) and needs 1/dim, not 1/√dim (TP5 definition 4.1). What the model itself does not apply is
folded into the init and learning rate of the nearest weight upstream, an exact abc shift: the user's forward stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from scaling.graph import SPLITS, Call, LayerGraph, Size, operator_name
from scaling.growth import Growth
from scaling.limits import exponent
from scaling.operators import MULTIPLIES
from scaling.records import Contraction
from scaling.uses import Dot, is_linear

__all__ = ["Carrier", "Fold", "Selection", "as_number", "folded", "taken", "taken_by", "upstream"]


@dataclass(frozen=True)
class Selection:
    """The part of a weight's output that a path goes through: a range of it, or one index of a factor."""

    start: Size | None = None
    stop: Size | None = None
    index: int | None = None


@dataclass(frozen=True)
class Carrier:
    """A weight (or the selected part of what it makes) at the call that uses it, whose scale is the scale of a value downstream."""

    weight: Call
    call: Call
    selection: Selection | None


@dataclass(frozen=True)
class Fold:
    """A carrier whose output is meant to be `target` times its usual size.

    `quantity`: the field of a block that says so: "target", or "branch" for the multiplier of a residual branch, which is the weight's at
    all its uses; or "entries" for the size of the weight's entries, where the model divides it by its own norm. `why` is said in the rule's
    notes. `dot`: whether a product of two activations asks for it.
    """

    carrier: Carrier
    target: sympy.Expr
    quantity: str = "target"
    why: str = ""
    dot: bool = False


def folded(
    graph: LayerGraph, growth: Growth, dots: list[Dot], size: Callable[[fx.Node], sympy.Expr]
) -> tuple[list[Contraction], list[Fold]]:
    """The contractions over growing axes, and what each asks of a weight upstream; `size` is that of an activation, in d."""
    contractions, folds = [], []
    dots = [dot for dot in dots if growth.grows(dot.dim)]
    factors = {(product, factor) for dot in dots for product in _products(dot) for factor in (dot.left, dot.right)}
    for dot in dots:
        length = growth.of(dot.dim)
        calls = _around(graph, growth, dot)
        present = length ** _power(_scalars(graph, dot, calls), growth.axes.size(dot.dim)) * size(dot.left) * size(dot.right)
        found, both = _carriers(graph, dot, factors) if exponent(length * present) != 0 else ([], False)
        contraction = Contraction(
            operator=dot.call.name,
            source=dot.call.source,
            dim=length,
            present=present,
            folded=tuple(dict.fromkeys(carrier.weight.names[0] for carrier in found)),
            both=both,
        )
        contractions.append(contraction)
        folds += [Fold(carrier, contraction.carried, dot=True) for carrier in found]
    return contractions, folds


def _carriers(graph: LayerGraph, dot: Dot, factors: set[tuple[fx.Node, fx.Node]]) -> tuple[list[Carrier], bool]:
    """The weights of the left factor, or of the right; and whether of both, as they are the same ones (h·h, two towers that share).

    Of the two sooner one that makes nothing else: what is also looked at otherwise (tokens that a router compares with slots, and mixes)
    would be as small there.
    """
    left, right = upstream(graph, dot.left), upstream(graph, dot.right)
    if left and right and {(c.weight, c.selection) for c in left} == {(c.weight, c.selection) for c in right}:
        return list(dict.fromkeys(left + right)), True
    sides = [side for side in (left, right) if side]
    only = (side for side in sides if all(_only_for(graph, carrier.call.node, factors) for carrier in side))
    return next(only, next(iter(sides), [])), False


def _products(dot: Dot) -> tuple[fx.Node, ...]:
    """Where the factors meet: the call itself, or the product entry by entry that it sums."""
    return (dot.call.node, *(n for n in dot.call.tensors[:1] if n is not None and dot.call.name == "aten.sum"))


def _only_for(graph: LayerGraph, node: fx.Node, factors: set[tuple[fx.Node, fx.Node]]) -> bool:
    """Whether a value, itself or what keeps its scale, is a factor of such products and nothing else."""
    todo, seen = [node], {node}
    while todo:
        value = todo.pop()
        for user in value.users:
            call = graph.calls.get(user)
            if (user, value) in factors and value not in (call.tensors[2:3] if call is not None else ()):  # keys that are values too
                continue
            if call is None or not is_linear(call) or _times_data(graph, call):
                return False
            todo += [user] if user not in seen else []
            seen.add(user)
    return True


def upstream(graph: LayerGraph, node: fx.Node, selection: Selection | None = None, *, alone: bool = False) -> list[Carrier] | None:
    """The weights whose scale is the scale of `node`; None if something on the way does not keep scales.

    With `alone` also None if a value on the way is used elsewhere too.
    """
    call = graph.calls[node]
    weights = [n for n in call.tensors if n is not None and n in graph.weight_only]
    data = [n for n in dict.fromkeys(call.tensors) if n is not None and n in graph.data]
    if node.op != "call_function":
        return None
    own = [Carrier(main, call, selection) for weight in weights for main in graph.mains(weight)]
    if weights and call.name not in {"aten.add", "aten.sub"}:
        return own
    if not is_linear(call) or _times_data(graph, call):
        return None
    part = taken(call)
    out = own
    for source in data:
        found = None if alone and len(source.users) > 1 else upstream(graph, source, part or selection, alone=alone)
        if found is None:
            return None
        out += found
    return list(dict.fromkeys(out)) or None


def _times_data(graph: LayerGraph, call: Call) -> bool:
    return call.name in MULTIPLIES and sum(n in graph.data for n in call.tensors if n is not None) > 1


def taken(call: Call) -> Selection | None:
    """What part of its input a call hands on, where it is a part."""
    if call.name == "getitem":
        source, index = call.node.args[0], call.node.args[1]
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        name = operator_name(source)
        if name == "aten.unbind":
            return Selection(index=index)
        if name in SPLITS:
            axis = _split_axis(call)
            start = tuple(sum(int(part.shape[axis]) for part in node.args[0].meta["val"][:index]) for node in call.nodes)  # pyright: ignore
            return Selection(start, tuple(a + b for a, b in zip(start, call.shape[axis], strict=True)))
    if call.name == "aten.select":
        return Selection(index=call.get("index"))
    if call.name in {"aten.slice", "aten.narrow"}:
        axis = (call.get("dim") or 0) % len(call.shape)
        start = tuple(max(s or 0, 0) for s in call.over_widths("start"))
        return Selection(start, tuple(a + b for a, b in zip(start, call.shape[axis], strict=True)))
    return None


def _split_axis(call: Call) -> int:
    """The axis along which the parts of a split lie."""
    source = call.node.args[0]
    assert isinstance(source, fx.Node)
    whole = source.all_input_nodes[0].meta["val"].shape
    return next((i for i, (a, (b, *_)) in enumerate(zip(whole, call.shape, strict=True)) if a != b), 0)


# the factor that is there already


FUSED = "aten.scaled_dot_product_attention"


def _scalars(graph: LayerGraph, dot: Dot, calls: tuple[Call, ...]) -> tuple[float, ...]:
    """The product of the numbers that multiply the contraction, by itself and in `calls`, at each width."""
    total = [1.0] * len(graph.recordings)
    if dot.call.name == FUSED:
        sizes = dot.call.values and [node.all_input_nodes[0].meta["val"].shape[-1] for node in dot.call.nodes]
        for i, (scale, size) in enumerate(zip(dot.call.over_widths("scale"), sizes, strict=True)):
            total[i] *= float(scale) if scale is not None else size**-0.5
    for call in calls:
        for i, number in enumerate(as_number(graph, call)):
            total[i] *= number
    return tuple(total)


def taken_by(graph: LayerGraph, growth: Growth, dots: list[Dot]) -> frozenset[fx.Node]:
    """The calls whose numbers belong to a product of two activations."""
    return frozenset(call.node for dot in dots for call in _around(graph, growth, dot))


def _around(graph: LayerGraph, growth: Growth, dot: Dot) -> tuple[Call, ...]:
    """Those after the product; and those on the way to it, unless it is nearer to 1/dim without: then they are its maps' own.

    (u-muP multiplies what every map gives by 1/√fan_in, and q·k by 1/dim.)
    """
    after = () if dot.call.name == FUSED else tuple(_down(graph, dot.call))  # past the softmax and the values
    if not growth.grows(dot.dim):
        return after
    left, right = tuple(_up(graph, dot.left)), tuple(_up(graph, dot.right))
    sizes = growth.axes.size(dot.dim)
    without, beside = (abs(1 + _power(_scalars(graph, dot, calls), sizes)) for calls in (after, (*left, *right, *after)))
    on_both = all(any(set(as_number(graph, call)) != {1.0} for call in way) for way in (left, right))
    return after if without < beside or (without == beside and on_both) else (*left, *right, *after)


def _up(graph: LayerGraph, node: fx.Node) -> Iterator[Call]:
    while node.op == "call_function":
        call = graph.calls[node]
        data = [n for n in call.tensors if n is not None and n in graph.data]
        if not data or not is_linear(call) or any(n in graph.weight_only for n in call.tensors if n is not None):
            return
        yield call
        node = data[0]


def _down(graph: LayerGraph, call: Call) -> Iterator[Call]:
    while len(call.node.users) == 1:
        user = next(iter(call.node.users))
        if user not in graph.calls:
            return
        call = graph.calls[user]
        if not call.node.all_input_nodes or not is_linear(call) or sum(n in graph.data for n in call.node.all_input_nodes) != 1:
            return
        yield call


def as_number(graph: LayerGraph, call: Call) -> tuple[float, ...]:
    """The number a mul or div applies, at each width; 1 for any other call."""
    if call.name not in MULTIPLIES:
        return (1.0,) * len(graph.recordings)
    values = [_as_float(value) for name in ("self", "other") for value in call.arguments[name]]
    count = len(graph.recordings)
    numbers = values[:count] if values[0] is not None else values[count:]
    if any(number is None or number == 0 for number in numbers):
        return (1.0,) * count
    return tuple(1 / n if "div" in call.name else n for n in numbers if n is not None)


def _as_float(value: Any) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, fx.Node) and value.meta.get("number") is not None:
        return value.meta["number"]
    if isinstance(value, fx.Node) and value.op == "get_attr" and value.meta.get("constant"):
        tensor = value.meta["val"]
        if tensor.numel() == 1 and type(tensor) is torch.Tensor and not tensor.is_meta:
            return float(tensor)
    return None


CLOSE = 0.02
"""How far a fitted power may be off: 1/(d - 1), of an unbiased covariance, is 1/d."""


def _power(numbers: tuple[float, ...], sizes: Size) -> sympy.Expr:
    """The power of the contracted length that the numbers follow; from one width only ±1/2, ±1 times exactly 1 are recognised."""
    if len(set(sizes)) > 1:
        i, j = sizes.index(min(sizes)), sizes.index(max(sizes))
        power = math.log(numbers[j] / numbers[i]) / math.log(sizes[j] / sizes[i]) if min(numbers) > 0 else 0.0
        nearest = sympy.Rational(round(4 * power), 4)
        return nearest if abs(float(nearest) - power) < CLOSE else sympy.Rational(0)
    for candidate in (sympy.Rational(-1, 2), sympy.Rational(-1)):
        if math.isclose(numbers[0], sizes[0] ** float(candidate), rel_tol=1e-6):
            return candidate
    return sympy.Rational(0)
