"""What a user's own parametrization is, read off models of several widths: the size of the initial weights, and forward multipliers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression

import sympy
import torch
from torch import Tensor, fx, nn

from scaling.contractions import _as_float, as_number, taken_by
from scaling.graph import LayerGraph
from scaling.growth import Growth
from scaling.limits import exponent
from scaling.operators import MULTIPLIES, rule_of
from scaling.propagation import MOVES
from scaling.records import Block, ScalingTable, WeightRule
from scaling.uses import Dot, WeightUse

__all__ = ["Init", "deviations", "entries", "inits", "multipliers", "slope"]


# --- powers of the width ------------------------------------------------------------------------------------------------------------


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """The power of the width that positive values follow: the least-squares slope of their logarithms."""
    return linear_regression([math.log(width) for width in widths], [math.log(value) for value in values]).slope


def deviations(widths: Sequence[int], values: Sequence[float], wanted: sympy.Expr) -> tuple[float, float]:
    """The powers of the width by which positive values depart from a law: from its limit, and from its finite form at these widths.

    Below the size of what stays finite the two may differ: √(1/d · min(1, V/d)) falls like 1/√d until d is the vocabulary V.
    """
    own = slope(widths, values)
    finite = [float(wanted.subs(dict.fromkeys(wanted.free_symbols, width))) for width in widths]
    return own - float(exponent(wanted)), own - slope(widths, finite)


# --- init ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Init:
    """The entries of one block at each width: standard deviation and mean, over seeds; and how many there are at the first width."""

    std: tuple[float, ...]
    mean: tuple[float, ...]
    count: int

    @property
    def zero(self) -> bool:
        """Whether it starts at zero."""
        return not any(self.std) and not any(self.mean)

    @property
    def size(self) -> tuple[float, ...]:
        """The RMS."""
        return tuple(math.hypot(s, m) for s, m in zip(self.std, self.mean, strict=True))


def inits(models: Mapping[int, Sequence[nn.Module]], table: ScalingTable) -> dict[str, tuple[Init, ...]]:
    """Weight -> one `Init` per block of its rule. `models` has one model per seed at each width."""
    found: dict[str, list[list[tuple[float, float, int]]]] = {}
    for width, seeds in models.items():
        for rule in table:
            weights = [_named(model, rule) for model in seeds]
            parts = [[entries(weight, block, width) for weight in weights] for block in rule.blocks]
            found.setdefault(rule.name, []).append([_moments(part) for part in parts])
    return {
        name: tuple(
            Init(tuple(std for std, _, _ in block), tuple(mean for _, mean, _ in block), block[0][2]) for block in zip(*rows, strict=True)
        )
        for name, rows in found.items()
    }


def _named(model: nn.Module, rule: WeightRule) -> Tensor:
    return model.get_parameter(rule.name).detach()


def _moments(parts: Sequence[Tensor]) -> tuple[float, float, int]:
    flat = [part.double().flatten() for part in parts]
    mean = fmean(float(part.mean()) for part in flat)
    std = math.sqrt(fmean(float(part.var(correction=0)) for part in flat))
    return (0.0 if std <= 1e-12 * abs(mean) else std), mean, sum(part.numel() for part in flat)


def entries(weight: Tensor, block: Block, width: int) -> Tensor:
    """The entries of a block, of a weight or of a tensor of its shape."""
    if all(factor.whole for axis in block.axes for factor in axis):
        return weight

    def at(expression: sympy.Expr) -> int:
        return int(expression.subs(dict.fromkeys(expression.free_symbols, width)))

    rows = []
    for factors, length in zip(block.axes, weight.shape, strict=True):
        sizes = [at(factor.size) for factor in factors]
        if math.prod(sizes) != length:
            return weight
        index = torch.arange(length).reshape(sizes or [1])
        rows.append(index[tuple(slice(at(f.start), at(f.stop)) for f in factors)].flatten() if factors else index.flatten())
    return weight if all(len(row) == n for row, n in zip(rows, weight.shape, strict=True)) else weight[torch.meshgrid(*rows, indexing="ij")]


# --- forward multipliers ------------------------------------------------------------------------------------------------------------


def multipliers(graph: LayerGraph, growth: Growth, uses: Sequence[WeightUse], dots: Sequence[Dot]) -> dict[WeightUse, tuple[float, ...]]:
    """Use -> the number on the weight there, at each width: on itself, on what it makes up to the next function, or on what it is given.

    Numbers on the way into or out of a product of two activations (q·k) belong to that product.
    """
    taken = taken_by(graph, growth, list(dots))
    out: dict[WeightUse, tuple[float, ...]] = {}
    for use in uses:
        numbers = [as_number(graph, graph.calls[node]) for node in graph.made_of(use.operand)[use.weight][1:]]
        numbers += [as_number(graph, graph.calls[node]) for node in _after(graph, use.call.node) if node not in taken]
        out[use] = tuple(math.prod(abs(row[i]) for row in numbers) for i in range(len(graph.recordings)))
    made = {node for use in uses for node in _after(graph, use.call.node)}
    for use in uses:
        before = [as_number(graph, graph.calls[node]) for node in _before(graph, use) if node not in taken | made]
        out[use] = tuple(value * math.prod(abs(row[i]) for row in before) for i, value in enumerate(out[use]))
    return out


def _scales(graph: LayerGraph, node: fx.Node) -> bool:
    """Whether a node is a value times or over a number."""
    call = graph.calls[node]
    data = [n for n in call.tensors if n is not None and _as_float(n) is None]
    return call.name in MULTIPLIES and len(data) == 1


def _after(graph: LayerGraph, node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that scale what a use makes, as long as nothing else happens to it; a bias may be added."""
    while True:
        users = [user for user in node.users if user in graph.calls]
        if len(users) != 1:
            return
        node = users[0]
        call = graph.calls[node]
        others = [n for n in node.all_input_nodes if n in graph.data]
        if _scales(graph, node):
            yield node
        elif not (call.name in MOVES or call.name in {"aten.add", "aten.sub"}) or len(others) != 1:
            return


def _before(graph: LayerGraph, use: WeightUse) -> Iterator[fx.Node]:
    """The nodes that scale what a map is given."""
    operator = rule_of(use.call)
    kinds = MULTIPLIES | {"aten.add", "aten.sub", "aten.embedding"}
    slot_added = use.call.get("bias") is use.operand
    if operator is None or operator.moves is not None or use.call.name in kinds or "norm" in use.call.name or slot_added:
        return
    data = [n for n in use.call.tensors if n is not None and n in graph.data]
    node = data[0] if data else None
    while node is not None and node.op == "call_function":
        if _scales(graph, node):
            yield node
        elif graph.calls[node].name not in MOVES or len(node.all_input_nodes) != 1:
            return
        node = next((n for n in node.all_input_nodes if n in graph.data), None)
