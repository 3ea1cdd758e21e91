"""Every use of every weight: which of its axes an operator sums over, which survive, which it shares with the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from scaling.axes import Atom, Axes, Dim
from scaling.errors import UnsupportedOperator
from scaling.graph import Call, LayerGraph, Size
from scaling.operators import GATES, MULTIPLIES, Binding, Label, apply, bind, known, rule_of

__all__ = ["Dot", "Span", "WeightUse", "joined_axes", "sum_of", "uses_of"]

DATA_FIRST = {
    *(f"aten.{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)),
    *(f"aten.{kind}_norm" for kind in ("layer", "rms", "batch", "group", "instance", "native_layer", "native_batch", "native_group")),
    *(f"aten.{kind}{form}" for kind in GATES for form in ("", "_cell")),
    "aten.convolution",
    "aten.linear",
    "aten.bilinear",
    "aten.prelu",
}
"""Operators whose first argument is data: a weight there (learned queries) enters the stream of values."""

FACTS = {"in": "summed", "lookup": "looked_up", "out": "emitted"}
"""What a weight's use tells of the dimension of one of its axes."""

PRODUCTS = {"aten.mul", "aten.multiply"}
CATS = {"aten.cat", "aten.concat", "aten.concatenate"}


@dataclass(frozen=True)
class Span:
    """A factor of a weight's axis and its part: "in", "out", "copy", "lookup", or "add" for what is added to the data."""

    size: Size
    part: str


@dataclass(frozen=True, eq=False)
class WeightUse:
    """One weight at one operator. Per axis of the weight: the range [start, stop) that is used, and its factors, outermost first.

    `entrywise`: whether it multiplies a matrix of its own shape, entry by entry, before data is met (a KAN's scales of its splines).
    """

    weight: Call
    call: Call
    operand: fx.Node
    ranges: tuple[tuple[Size, Size], ...]
    spans: tuple[tuple[Span, ...], ...]
    entrywise: bool = False


@dataclass(frozen=True, eq=False)
class Dot:
    """A product of two activations summed over `dim`: q·k."""

    call: Call
    dim: Dim
    left: fx.Node
    right: fx.Node


def joined_axes(graph: LayerGraph) -> tuple[Axes, tuple[str, ...]]:
    """The axes of every value, joined through every operator; and the operators on data that have no rule."""
    axes = Axes(len(graph.recordings), graph.data)
    without: dict[str, None] = {}
    for node, call in graph.calls.items():
        if node.op == "placeholder":
            axes.dims[node] = tuple(axes.fresh(size, "input") for size in call.shape)
        elif node.op == "get_attr":
            axes.dims[node] = tuple(axes.fresh(size, *(() if call.names else ("constant",))) for size in call.shape)
        elif not apply(call, axes):
            without[call.name] = None
    for node in graph.outputs:
        for dim in axes.dims.get(node, ()):
            axes.mark(dim, "output")
    return axes, tuple(without)


def uses_of(graph: LayerGraph, axes: Axes) -> tuple[list[WeightUse], list[Dot]]:
    """All uses of weights and all products of two activations; marks on `axes` what the uses tell of a dimension.

    Raises:
        UnsupportedOperator: where an operator without a rule consumes a weight.
    """
    uses, dots = [], []
    for node, call in graph.calls.items():
        inputs = [n for n in call.tensors if n is not None]
        weights = [n for n in dict.fromkeys(inputs) if n in graph.weight_only]
        if weights and not known(call):
            raise UnsupportedOperator(call.name, _main(graph, weights[0]), str(call.source))
        if node.op == "call_function" and node not in graph.weight_only:
            bound = bind(call, axes)
            operator = rule_of(call)
            if weights and bound is None and operator is not None and operator.moves is None:
                raise UnsupportedOperator(call.name, _main(graph, weights[0]), str(call.source))
            for weight in weights:
                uses += [_use(graph, axes, call, path) for path in graph.made_of(weight).values()]
                _mark(graph, axes, call, weight, bound)
            dots += _dots(graph, axes, call, bound)
    uses += _returned(graph, {use.weight for use in uses})
    for dot in dots:
        axes.mark(dot.dim, "dot")
    axes.settle()
    return _with_a_gradient(graph, uses), [dot for dot in dots if dot.call.node in graph.live]


def _returned(graph: LayerGraph, used: set[Call]) -> Iterator[WeightUse]:
    """Single numbers that the model hands back for the loss to use (CLIP's temperature): whatever it does with one, no axis can grow."""
    for node in graph.outputs:
        for weight, path in graph.made_of(node).items() if node in graph.weight_only else ():
            if weight not in used and all(size == (1,) * len(graph.recordings) for size in weight.shape):
                ranges = tuple((tuple(0 for _ in size), size) for size in weight.shape)
                spans = tuple((Span(size, "add"),) for size in weight.shape)
                yield WeightUse(weight=weight, call=graph.calls[node], operand=path[max(len(path) - 2, 0)], ranges=ranges, spans=spans)


def _with_a_gradient(graph: LayerGraph, uses: list[WeightUse]) -> list[WeightUse]:
    """Less the uses of a weight that only ids are made of (the distances to a codebook), if it has others."""
    learned = {use.weight for use in uses if use.call.node in graph.live}
    return [use for use in uses if use.call.node in graph.live or use.weight not in learned]


def _main(graph: LayerGraph, node: fx.Node) -> str:
    return next(iter(graph.made_of(node))).names[0]


def _part(label: Label, binding: Binding, others: list[Binding], output: set[str]) -> str:
    if label.looked_up:
        return "lookup"
    if label.mark == "#":
        return "copy"
    if label.name not in output and label.mark != "~":
        return "in"
    if binding.added:
        return "add"
    shared = any(label.name == other.name for b in others if not b.added for axis in b.axes for other, _ in axis)
    return "copy" if shared else "out"


def _labelled(graph: LayerGraph, call: Call, operand: fx.Node, axes: Axes, bound: tuple | None) -> Iterator[tuple[Dim, str]]:
    """The operand's dimensions with their parts."""
    slot = call.tensors.index(operand)
    if bound is None or (slot == 0 and call.name in DATA_FIRST):
        yield from ((dim, "add") for dim in axes.dims.get(operand, ()))
        return
    bindings, signature, _ = bound
    output = {label.name for axis in signature.output.axes for label in axis} | {
        label.name for b in bindings for axis in b.axes for label, _ in axis if label.name.startswith("*")
    }
    binding = next(b for b in bindings if b.node is operand)
    data = [b for b in bindings if b is not binding and b.node not in graph.weight_only]
    others = data or [b for b in bindings if b is not binding]
    ended = sum_of(graph, call)
    summed = _summed_axes(ended, call) if ended is not None else set()
    for i, axis in enumerate(binding.axes):
        for label, dim in axis:
            part = _part(label, binding, others, output)
            yield dim, "in" if i - len(binding.axes) in summed else part


def sum_of(graph: LayerGraph, call: Call) -> Call | None:
    """The sum that a product, elementwise, goes into and nowhere else: with a weight, (w * x).sum(-1) is a map and w no gain."""
    users = [graph.calls[user] for user in call.node.users if user in graph.calls]
    return users[0] if call.name in PRODUCTS and [user.name for user in users] == ["aten.sum"] else None


def _summed_axes(ended: Call, product: Call) -> set[int]:
    """The axes of a product that a sum is over, counted from the last, which is -1."""
    rank, which = len(product.shape), ended.get("dim")
    return {i % rank - rank for i in (range(rank) if which in (None, []) else [which] if isinstance(which, int) else which)}


def _mark(graph: LayerGraph, axes: Axes, call: Call, operand: fx.Node, bound: tuple | None) -> None:
    elsewhere = {label.name for b in bound[0] if b.node is not operand for axis in b.axes for label, _ in axis} if bound else set()
    elsewhere |= {letter for letter, _ in bound[2].same} if bound else set()
    sums = False
    if bound is not None and not (call.tensors.index(operand) == 0 and call.name in DATA_FIRST):
        binding = next(b for b in bound[0] if b.node is operand)
        output = {label.name for axis in bound[1].output.axes for label in axis}
        for axis in binding.axes:
            for label, dim in axis:
                if label.name not in output and not label.mark:
                    sums = sums or (label.name in elsewhere and axes.resolve(dim) != ())
                    if label.name not in elsewhere:
                        axes.mark(dim, "kernel")
    if call.name in CATS:  # learned tokens before those of an input: their number is one of tokens
        which = (call.get("dim") or 0) % len(axes.dims[operand])
        beside = [axes.dims[n][which] for n in call.tensors if n is not None and n in graph.data and axes.dims.get(n)]
        if any("input" in atom.facts for dim in beside for atom in axes.leaves(dim)):
            axes.mark(axes.dims[operand][which], "input")
    for dim, part in _labelled(graph, call, operand, axes, bound):
        if part == "copy" and sums and len(axes.dims[operand]) > 2:
            axes.mark(dim, "bank")
        axes.mark(dim, FACTS.get(part, "used"))


def _use(graph: LayerGraph, axes: Axes, call: Call, chain: tuple[fx.Node, ...]) -> WeightUse:
    """Follows a weight's own axes, as if nothing else existed, along the chain of nodes to the operator."""
    operand = chain[-1]
    weight = graph.calls[chain[0]]
    alone = Axes(axes.widths)
    for node in (chain[0], *(n for c in (*chain[1:], call.node) for n in c.all_input_nodes if n not in chain)):
        alone.dims[node] = tuple(alone.fresh(size) for size in graph.calls[node].shape)
    base = alone.dims[chain[0]]
    for node in chain[1:]:
        apply(graph.calls[node], alone)
    parts: dict[int, str] = {}
    for dim, part in _labelled(graph, call, operand, alone, bind(call, alone)):
        for atom in alone.leaves(dim):
            parts[id(atom)] = part
    ranges, spans = [], []
    for dim in base:
        (start, stop), inner = _used_range(alone, dim, parts)
        ranges.append((start, stop))
        spans.append(tuple((atom, parts.get(id(atom))) for atom in inner))
    if not any(part for span in spans for _, part in span):
        spans = _of_the_same_dimension(graph, axes, call, chain, spans)
    found = {part for span in spans for _, part in span}
    inner_part = "copy" if {"in", "out"} <= found else "out" if "in" in found else "in"
    spans = [tuple(Span(atom.size, part or _dropped(atom, inner_part)) for atom, part in span) for span in spans]
    scales = _scales_another(graph, weight, chain)
    if scales and "out" not in found:  # W·diag(s): every input has its gain
        spans = [tuple(Span(span.size, "copy" if span.part == "in" else span.part) for span in axis) for axis in spans]
    return WeightUse(
        weight=weight, call=call, operand=operand, ranges=tuple(ranges), spans=tuple(spans), entrywise=scales and {"in", "out"} <= found
    )


def _scales_another(graph: LayerGraph, weight: Call, chain: tuple[fx.Node, ...]) -> bool:
    """Whether on the way to data a weight multiplies another, which is the map."""
    return any(
        graph.calls[product].name in MULTIPLIES
        and any(n is not factor and n in graph.weight_only and weight not in graph.made_of(n) for n in product.all_input_nodes)
        and not graph.made_of(factor).keys() & set(graph.mains(product))
        for factor, product in pairwise(chain)
    )


def _of_the_same_dimension(graph: LayerGraph, axes: Axes, call: Call, chain: tuple[fx.Node, ...], spans: list) -> list:
    """The parts of axes that are all lost on the way (an inverse): those of the operand's axes of equal dimension."""
    left = [(axes.resolve(dim), part) for dim, part in _labelled(graph, call, chain[-1], axes, bind(call, axes))]
    out = []
    for dim, span in zip(axes.dims[chain[0]], spans, strict=True):
        found = next((pair for pair in left if pair[0] == axes.resolve(dim)), None)
        if found is not None:
            left.remove(found)
            span = tuple((atom, found[1]) for atom, _ in span)
        out.append(span)
    return out


def _dropped(atom: Atom, inner: str) -> str:
    """A factor that is gone before data is met: looked up by ids, one map per index, or between two weights.

    There it is the other side of what is left of a map (the rank of B·A), or counts maps that are mixed to one (a basis of matrices).
    """
    return "lookup" if "looked_up" in atom.facts else "copy" if "indexed" in atom.facts else inner


def _used_range(axes: Axes, dim: Dim, parts: dict[int, str]) -> tuple[tuple[Size, Size], Dim]:
    """The slice of an axis that reaches the operator, and its factors."""
    resolved = axes.resolve(dim)
    if len(resolved) == 1 and resolved[0].segments:
        reached = [s for s in resolved[0].segments if any(id(atom) in parts for atom in axes.leaves(s.dim))]
        if len(reached) == 1:
            return (reached[0].start, reached[0].stop), axes.resolve(reached[0].dim)
    return (axes.zero, axes.size(dim)), tuple(resolved)


def _dots(graph: LayerGraph, axes: Axes, call: Call, bound: tuple | None) -> Iterator[Dot]:
    if call.name == "aten.sum":
        yield from _summed_product(graph, axes, call)
    if bound is None:
        return
    bindings, signature, _ = bound
    data = [b for b in bindings if not b.added and b.node in graph.data]
    output = {label.name for axis in signature.output.axes for label in axis}
    for i, left in enumerate(data):
        for right in data[i + 1 :]:
            letters = {label.name: dim for axis in left.axes for label, dim in axis}
            for axis in right.axes:
                for label, dim in axis:
                    is_keys = call.name == "aten.scaled_dot_product_attention" and label.name != "e"
                    if label.name in letters and label.name not in output and not label.name.startswith(("*", "_")) and not is_keys:
                        yield Dot(call=call, dim=dim, left=left.node, right=right.node)


def _summed_product(graph: LayerGraph, axes: Axes, call: Call) -> Iterator[Dot]:
    """(a * b).sum(dim) is a·b, where both have the axis and neither is the other: a sum of squares is a norm's."""
    product = call.tensors[0]
    if product is None or product not in graph.data or graph.calls[product].name not in PRODUCTS:
        return
    factors = [n for n in graph.calls[product].tensors if n is not None and n in graph.data]
    if len(factors) != 2 or factors[0] is factors[1]:
        return
    left, right = factors
    shapes = [n.meta["val"].shape for n in (product, left, right)]
    for back in sorted(_summed_axes(call, graph.calls[product])):
        if all(len(shape) >= -back and shape[back] == shapes[0][back] for shape in shapes):
            yield Dot(call=call, dim=axes.dims[product][back], left=left, right=right)


def is_linear(call: Call) -> bool:
    """Whether scaling the data operands of a call scales its output."""
    operator = rule_of(call)
    return operator is not None and operator.linear
