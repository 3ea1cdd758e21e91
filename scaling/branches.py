"""Residual branches and the weights that carry their multiplier: the last maps of a branch, whose scale is the branch's (THEORY 1.6)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import sympy
from torch import fx, nn

from scaling.contractions import Carrier, Fold, Selection, taken
from scaling.graph import Call
from scaling.limits import DEPTH
from scaling.operators import rule_of
from scaling.records import Branch
from scaling.residual import ADDS, NORMS, OUTSIDE, POOLS, Addition, Flow
from scaling.uses import WeightUse, is_linear

__all__ = ["Found", "folds_of", "present_in", "settled"]

ONE, HALF = sympy.Integer(1), sympy.Rational(1, 2)

POSITIVE = {"aten.relu", "aten.leaky_relu"} | {name for name in POOLS if "pad" not in name}
"""Functions with f(θx) = θ·f(x) for θ > 0."""


Carriers = dict[tuple[Call, Selection | None], Call]
"""(weight, the part of it) -> the call that applies it."""


@dataclass(frozen=True, eq=False)
class Found:
    """A branch of an addition: `scale` is L^-α, `present` what the forward has of it, `carriers` the weights that take the rest."""

    flow: Flow
    addition: Addition
    node: fx.Node
    bit: int
    scale: sympy.Expr
    present: sympy.Expr = ONE
    forward: bool = False

    @property
    def rest(self) -> sympy.Expr:
        """What the forward lacks."""
        return self.scale / self.present

    @property
    def carriers(self) -> Carriers | None:
        """The weights whose scale is the branch's; None if there are none."""
        return _carriers(self.flow, self.node, None, self.bit)

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that carry the multiplier."""
        return () if self.forward or self.rest == 1 else tuple(dict.fromkeys(weight.names[0] for weight, _ in self.carriers or {}))

    @property
    def number(self) -> float:
        """The number that the forward multiplies the branch by, behind its last map."""
        calls = [call for call in self.addition.calls if self.node in call.node.all_input_nodes]
        alphas = [float(call.get("alpha", 1)) for call in calls if call.tensors[1] is self.node]
        return self.flow.factor(self.node) * math.prod(alphas)

    def record(self, uses: list[WeightUse], reach: dict[fx.Node, int], model: nn.Module) -> Branch:
        """The branch as the table keeps it."""
        weights = dict.fromkeys(use.weight.names[0] for use in uses if self._acts(reach[use.call.node]))
        return Branch(
            source=self.addition.calls[-1].source,
            scale=self.scale,
            present=self.present,
            folded=self.names,
            forward=self.rest if self.forward else ONE,
            at=_module(self.flow, self.node, model) if self.forward else "",
            weights=tuple(weights),
        )

    def _acts(self, reach: int) -> bool:
        return bool(reach & self.bit) and not reach & OUTSIDE


def _carriers(flow: Flow, node: fx.Node, part: Selection | None, bit: int) -> Carriers | None:
    """The trainable weights that scale `node` when all of them are scaled; None if something on the way does not keep scales."""
    call = flow.graph.calls[node]
    if node.op != "call_function":
        return None
    weights = [n for n in dict.fromkeys(call.tensors) if n is not None and n in flow.graph.weight_only]
    data = flow.data(call)
    if weights and call.name not in ADDS:
        found = [_weight(flow, weight) for weight in weights]
        if any(weight is None for weight in found) or not _linear_in_weights(call, weights):
            return None
        return {(weight, part): call for weight in found if weight is not None}
    out: Carriers = {}
    for weight in weights:
        added = _weight(flow, weight)
        if added is None:
            return None
        out[added, part] = call
    several = len(data) > 1 and call.name not in {*ADDS, "aten.cat", "aten.stack"}
    if several:
        return next((one for n in _factors(call, data) if (one := _carriers(flow, n, part, bit))), None)
    rule = rule_of(call)
    if rule is None or not (is_linear(call) or call.name in POSITIVE | {"aten.dropout"}) or not data:
        return None
    for n in data:
        found = _carriers(flow, n, taken(call) or part, bit)
        if found is None:
            return None
        out |= found
    return out or None


def _factors(call: Call, data: list[fx.Node]) -> list[fx.Node]:
    """The operands of a product that scale it: the values in attention, any one of two factors elsewhere."""
    if call.name == "aten.scaled_dot_product_attention":
        return [n for n in call.tensors[2:3] if n is not None]
    rule = rule_of(call)
    product = call.name in {"aten.mul", "aten.matmul", "aten.bmm", "aten.mm", "aten.einsum"}
    return list(reversed(data)) if rule is not None and product else []


def _weight(flow: Flow, node: fx.Node) -> Call | None:
    """The trainable weight that a value is, up to moves."""
    made = flow.graph.made_of(node)
    weight, path = next(iter(made.items()))
    moves = (rule_of(flow.graph.calls[n]) for n in path[1:])
    plain = all(rule is not None and rule.moves is not None and rule.linear for rule in moves)
    return weight if len(made) == 1 and plain and weight.node.meta["trainable"] else None


def _linear_in_weights(call: Call, weights: list[fx.Node]) -> bool:
    """Whether scaling all the weights of a call scales what comes out: maps, gains with their biases, lookups."""
    rule = rule_of(call)
    if call.name in NORMS:  # a gain, and maybe a bias
        position = {"aten.layer_norm": 2, "aten.rms_norm": 2}.get(call.name, 1)
        return call.node.args[position] in weights if len(call.node.args) > position else False
    bends = {
        "aten.prelu",
        "aten.pow",
        *(f"aten.{name}{form}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for form in ("", "_cell")),
    }
    return rule is not None and rule.signature is not None and call.name not in bends


def settled(branches: list[Found], uses: list[WeightUse]) -> list[Found]:
    """Which branches have to be multiplied in the forward: those whose last maps have other uses, that would be scaled as well."""
    known: dict[Call, set[fx.Node]] = {}
    for use in uses:
        known.setdefault(use.weight, set()).add(use.call.node)
    while True:
        carried: dict[Call, dict[fx.Node, sympy.Expr]] = {}
        for one in branches:
            for (weight, _), call in (one.carriers or {}).items() if not one.forward else ():
                carried.setdefault(weight, {})[call.node] = one.rest
        bad = {weight for weight, calls in carried.items() if set(calls) != known[weight] or len(set(calls.values())) > 1}
        new = [
            replace(
                one, forward=one.rest != 1 and (one.forward or one.carriers is None or any(weight in bad for weight, _ in one.carriers))
            )
            for one in branches
        ]
        if [one.forward for one in new] == [one.forward for one in branches]:
            return new
        branches = new


def folds_of(branches: list[Found]) -> Iterator[Fold]:
    """What the branches ask of the weights that carry their multipliers, once each."""
    done = set()
    for one in branches:
        for (weight, part), call in (one.carriers or {}).items() if not one.forward and one.rest != 1 else ():
            if (weight, part) not in done:
                done.add((weight, part))
                yield Fold(Carrier(weight, call, part), one.rest, "branch")


def _module(flow: Flow, node: fx.Node, model: nn.Module) -> str:
    """The module, without modules of its own, that makes the branch's last value and nothing else; "" if there is none."""
    for source in (node, *(flow.data(call)[0] for call in flow.steps(node))):
        path = flow.graph.calls[source].source.module
        module = dict(model.named_modules()).get(path)
        inner = [n for n, call in flow.graph.calls.items() if call.source.module == path and n in flow.graph.data]
        last = all(user not in inner for user in source.users)
        if path and module is not None and not any(True for _ in module.children()) and last and len(source.users) == 1:
            return path
    return ""


def present_in(branches: list[Found], size: int) -> sympy.Expr:
    """What the forward has of L^-α already, if every branch has the number L^-1/2 or 1/L, of branches or of blocks of 2 to 4."""
    numbers = {round(one.number, 12) for one in branches}
    for blocks in (1, 2, 3, 4):
        for power in (HALF, ONE):
            length = Fraction(size, blocks)
            if length > 1 and len(numbers) == 1 and math.isclose(numbers.copy().pop(), float(length) ** -float(power), rel_tol=1e-6):
                return (DEPTH / blocks) ** -power
    return ONE
