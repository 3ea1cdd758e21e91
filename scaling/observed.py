"""What a user's own parametrization is, read off models and optimizers of several widths: init, learning rates, forward multipliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from scaling.contractions import _as_float, as_number, taken_by
from scaling.errors import CannotMeasure
from scaling.graph import LayerGraph
from scaling.limits import exponent
from scaling.operators import rule_of
from scaling.propagation import MOVES
from scaling.records import Block, ScalingTable, WeightRule
from scaling.uses import Dot, WeightUse

__all__ = ["UPDATES", "Group", "Init", "deviation", "groups_of", "inits", "multipliers", "optimizers_in", "slope"]


# --- powers of the width ------------------------------------------------------------------------------------------------------------


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """The power of the width that positive values follow: the least-squares slope of their logarithms."""
    return linear_regression([math.log(width) for width in widths], [math.log(value) for value in values]).slope


def deviation(widths: Sequence[int], values: Sequence[float], wanted: sympy.Expr) -> float:
    """The power of the width by which values depart from a law: from its limit or from its finite form, whichever is nearer."""
    own = slope(widths, values)
    finite = [float(wanted.subs(dict.fromkeys(wanted.free_symbols, width))) for width in widths]
    return min((own - float(exponent(wanted)), own - slope(widths, finite)), key=abs)


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
            parts = [[_part(weight, block, width) for weight in weights] for block in rule.blocks]
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


def _part(weight: Tensor, block: Block, width: int) -> Tensor:
    """The entries of a block."""

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


# --- optimizers ---------------------------------------------------------------------------------------------------------------------

Scale = Callable[[Sequence[int], Mapping[str, Any]], float]


def _no_scale(shape: Sequence[int], group: Mapping[str, Any]) -> float:
    return 1.0


MUON_SCALES: dict[str | None, Callable[[float, float], float]] = {
    None: lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
    "none": lambda rows, columns: 1.0,
}
"""`adjust_lr_fn` of torch.optim.Muon, and the names other implementations have -> the factor on UVᵀ (THEORY 1.4). None is "original"."""


def _muon_scale(shape: Sequence[int], group: Mapping[str, Any]) -> float:
    name = group.get("adjust_lr_fn", group.get("scale"))
    if name not in MUON_SCALES:
        what = f"Muon's scale mode {name!r} is not known"
        raise CannotMeasure(what, f"known are {', '.join(map(str, MUON_SCALES))}")
    return MUON_SCALES[name](shape[0], math.prod(shape[1:]))


UPDATES: dict[str, tuple[str, Scale]] = {
    **dict.fromkeys(("SGD", "ASGD"), ("sgd", _no_scale)),
    **dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Lion", "SignSGD"), ("adam", _no_scale)),
    "Muon": ("muon", _muon_scale),
}
"""Name of an optimizer class, or of one it inherits from -> family, and the factor its update has by the weight's shape."""


@dataclass(frozen=True)
class Group:
    """How one weight is updated at one width. `weight_decay` is the fraction lr·λ decayed per step; `l2`: the decay goes through Adam.

    `parts` has one group for each block of the weight where the optimizer tells them apart.
    """

    family: str
    optimizer: str
    lr: float
    weight_decay: float
    eps: float
    l2: bool
    parts: tuple[Group, ...] = ()

    def part(self, block: int) -> Group:
        """How one block is updated."""
        return self.parts[block] if block < len(self.parts) else self


def optimizers_in(given: object) -> list[torch.optim.Optimizer]:
    """The optimizers that `build` returned: one, or several in a list, tuple or dict."""
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, (list, tuple)):
        return [one for part in given for one in optimizers_in(part)]
    if not hasattr(given, "param_groups"):
        what = f"build returned a {type(given).__name__} in place of an optimizer"
        raise CannotMeasure(what, "return model, optimizer")
    return [given]  # pyright: ignore[reportReturnType]


def groups_of(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, list[Group]]:
    """Trainable weight -> the param groups that have it; every one is there, with [] where none has it.

    Raises:
        CannotMeasure: for an optimizer whose class is not in `UPDATES`.
    """
    by_id = {id(weight): name for name, weight in model.named_parameters() if weight.requires_grad}
    found: dict[str, list[Group]] = {name: [] for name in by_id.values()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if id(weight) in by_id:
                    found[by_id[id(weight)]].append(_group(optimizer, group, weight))
    return found


def _group(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], weight: Tensor) -> Group:
    family, scale = _update(optimizer, group)
    decoupled = bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))
    decay = float(group.get("weight_decay", 0.0)) * float(group.get("wd_scale", 1.0))
    kind = type(optimizer).__name__
    blocks = [{**group, **block, "blocks": None} for block in group.get("blocks") or ()]
    return Group(
        family=family,
        optimizer=kind,
        lr=float(group["lr"]) * float(group.get("lr_scale", 1.0)) * scale(tuple(weight.shape), group),
        weight_decay=decay * float(group["lr"]) * float(group.get("lr_scale", 1.0)),
        eps=float(group.get("eps", 0.0)) * float(group.get("eps_scale", 1.0)) if family == "adam" else 0.0,
        l2=decay > 0 and not decoupled and kind in {"Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad"},
        parts=tuple(_group(optimizer, block, weight) for block in blocks),
    )


def _update(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> tuple[str, Scale]:
    if "map" in group and "update" in group:  # compiler.SpectralOptimizer: the map and the update say it
        return ("muon" if group["map"] else {"adam": "adam", "sign": "adam"}.get(group["update"], "sgd")), _no_scale
    for one in type(optimizer).__mro__:
        if one.__name__ in UPDATES:
            return UPDATES[one.__name__]
    kind = type(optimizer).__name__
    what = f"what {kind} updates a weight by is not known"
    raise CannotMeasure(what, f"say it: scaling.observed.UPDATES[{kind!r}] = UPDATES['Adam'], if its entries are ±1")


# --- forward multipliers ------------------------------------------------------------------------------------------------------------


def multipliers(graph: LayerGraph, uses: Sequence[WeightUse], dots: Sequence[Dot]) -> dict[WeightUse, tuple[float, ...]]:
    """Use -> the number on the weight there, at each width: on itself, on what it makes up to the next function, or on what it is given.

    Numbers on the way into or out of a product of two activations (q·k) belong to that product.
    """
    taken = taken_by(graph, list(dots))
    out: dict[WeightUse, tuple[float, ...]] = {}
    for use in uses:
        numbers = [as_number(graph, graph.calls[node]) for node in _chain(graph, use.operand)]
        numbers += [as_number(graph, graph.calls[node]) for node in _after(graph, use.call.node) if node not in taken]
        out[use] = tuple(math.prod(abs(row[i]) for row in numbers) for i in range(len(graph.recordings)))
    made = {node for use in uses for node in _after(graph, use.call.node)}
    for use in uses:
        before = [as_number(graph, graph.calls[node]) for node in _before(graph, use) if node not in taken | made]
        out[use] = tuple(value * math.prod(abs(row[i]) for row in before) for i, value in enumerate(out[use]))
    return out


def _chain(graph: LayerGraph, node: fx.Node) -> Iterator[fx.Node]:
    """The operators on the weight alone."""
    while not graph.calls[node].names:
        yield node
        node = next(n for n in node.all_input_nodes if n in graph.weight_only)


def _scales(graph: LayerGraph, node: fx.Node) -> bool:
    """Whether a node is a value times or over a number."""
    call = graph.calls[node]
    data = [n for n in call.tensors if n is not None and _as_float(n) is None]
    return call.name in {"aten.mul", "aten.div"} and len(data) == 1


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
    kinds = {"aten.add", "aten.sub", "aten.mul", "aten.div", "aten.embedding"}
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
