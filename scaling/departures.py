"""The first value of a model that a parametrization lets blow up or vanish: where, from which step on, along which path, and the cure.

`scaling.flow` carries the sizes of all values through the graph, under the parametrization and under the one it is compared with; the
first value in execution order that grows with the width, or that moves less than there, is where things go wrong: all before it is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

import sympy
from torch import fx

from scaling.flow import Flow, FlowValue, flow
from scaling.folding import fold
from scaling.graph import Call, LayerGraph
from scaling.limits import WIDTH
from scaling.notation import formula
from scaling.propagation import MOVES
from scaling.records import Exact, Parametrization, Record, ScalingTable, Source, Trace

if TYPE_CHECKING:
    from scaling.verdict import Obligation

__all__ = ["Departure", "Step", "departures", "size_text"]

TIMES = AT_INIT, FIRST, LATER = "at init", "after one step", "after a few steps"


class Step(Record):
    """One operator of a path: the powers of d of its value at init, and of its change by the time of the departure (None: not known)."""

    operator: str
    module: str
    source: Source
    init: Exact | None
    change: Exact | None

    @property
    def name(self) -> str:
        """The operator, and the module that runs it."""
        return self.operator.removeprefix("aten.") + (f" in {self.module}" if self.module else "")

    @property
    def sizes(self) -> str:
        """Of what order it is at init, and its change."""
        return f"{size_text(self.init)}, {size_text(self.change)}"

    @property
    def where(self) -> str:
        """model.py:41."""
        return f"{PurePath(self.source.file).name}:{self.source.line}"


class Departure(Record):
    """The first value in execution order that blows up (`grows`) or vanishes, all before it being as it should.

    `when` it does, its size (at init) or that of its change is of order d**`power`, where it should be d**`expected`. `path` leads from the
    model's input to it, one step for each line of the user's; `cure` is that of the obligation that fails there.
    """

    grows: bool
    when: str
    power: Exact
    expected: Exact
    cure: str
    path: tuple[Step, ...]

    @property
    def value(self) -> Step:
        """The operator whose value it is."""
        return self.path[-1]

    @property
    def headline(self) -> str:
        """What happens first, where, and when."""
        what = "blow up" if self.grows else "vanish"
        moved = "" if self.when == AT_INIT else "change "
        sizes = f"{moved}of order {size_text(self.power)}, should be {size_text(self.expected)}"
        return f"first to {what}, {self.when}: {self.value.name}, {self.value.where}, {sizes}"


def size_text(power: sympy.Expr | None) -> str:
    """The order d**power in a word or two.

    >>> size_text(sympy.Rational(1, 2)), size_text(-sympy.oo)
    ('√d', '0')
    """
    if power is None:
        return "?"
    special: dict[sympy.Expr, str] = {-sympy.oo: "0", sympy.oo: "∞"}
    return special.get(power) or formula(WIDTH**power)


def departures(
    table: ScalingTable, subject: Parametrization, reference: Parametrization, failed: Sequence[Obligation]
) -> tuple[Departure, ...]:
    """The first value that blows up, and the first that vanishes, of which either may be none.

    Args:
        table: of the model; without a graph (read from JSON) nothing can be said.
        subject: laws for every weight of the table.
        reference: what they are compared with.
        failed: the obligations that do not hold, whose cures are quoted.

    Raises:
        NoGraph: if the table was read from JSON.
    """
    own, other = flow(table, None, subject), flow(table, None, reference)
    found = []
    for grows, side in ((True, _larger), (False, _smaller)):
        pairs = ((value, side(value, wanted)) for value, wanted in zip(own.values, other.values, strict=True))
        departed = [(value, one) for value, one in pairs if one is not None]
        if departed:
            value, (when, power, expected) = min(departed, key=lambda pair: TIMES.index(pair[1][0]))
            path, weights = _path(table.trace, own, value, when)
            cure = _cure(value, weights, failed, when, grows=grows)
            found.append(Departure(grows=grows, when=when, power=power, expected=expected, path=path, cure=cure))
    return tuple(found)


Departed = tuple[str, sympy.Expr, sympy.Expr]


def _pairs(value: FlowValue, wanted: FlowValue) -> Iterator[Departed]:
    pairs = ((AT_INIT, value.init, wanted.init), (FIRST, value.first, wanted.first), (LATER, value.change, wanted.change))
    return ((when, has, wants) for when, has, wants in pairs if has is not None and wants is not None)


def _larger(value: FlowValue, wanted: FlowValue) -> Departed | None:
    """A value, or a change of it, that grows with the width and is larger than it should be."""
    return next(((when, has, wants) for when, has, wants in _pairs(value, wanted) if has > wants and has > 0), None)


def _smaller(value: FlowValue, wanted: FlowValue) -> Departed | None:
    """A value that is smaller than it should be and not zero, or that moves less once all layers move."""
    return next(
        (
            (when, has, wants)
            for when, has, wants in _pairs(value, wanted)
            if has < wants and (when == LATER or (when == AT_INIT and has != -sympy.oo))
        ),
        None,
    )


# --- the path -----------------------------------------------------------------------------------------------------------------------


def _path(trace: Trace, own: Flow, value: FlowValue, when: str) -> tuple[tuple[Step, ...], list[tuple[str, ...]]]:
    """The operators from the input to a value, one per line of the user's; and the weights they use, those of the last first."""
    by_name = {one.name: one for one in own.values}
    node = next(node for node in trace.graph.calls if str(node) == value.name.removesuffix(".logits"))
    route = list(_route(trace.graph, node))
    groups: dict[tuple, list[FlowValue]] = {}
    for one in (by_name[str(step)] for step in reversed(route[1:]) if str(step) in by_name):
        if one.operator not in MOVES and _line(one) != _line(value):
            groups.setdefault(_line(one), []).append(one)
    steps = [_step(group, when) for group in (*groups.values(), [value])]
    return tuple(steps), _weights(trace, route)


def _line(value: FlowValue) -> tuple:
    return value.operator, value.source.file, value.source.line


def _step(values: list[FlowValue], when: str) -> Step:
    """The values that one line makes in all repeats of a block, the sizes being those of the last."""
    modules, last = ", ".join(fold(one.module for one in values)), values[-1]
    change = last.first if when == FIRST else last.change
    return Step(operator=last.operator, module=modules, source=last.source, init=last.init, change=change)


def _route(graph: LayerGraph, node: fx.Node) -> Iterator[fx.Node]:
    """From a value back to the input, along the first operand that depends on it: through the residual stream, not the branches."""
    while True:
        yield node
        below = [n for n in graph.calls[node].tensors if n is not None and n in graph.data and n.op == "call_function"]
        if not below:
            return
        node = below[0]


def _weights(trace: Trace, route: list[fx.Node]) -> list[tuple[str, ...]]:
    """The names of the weights used on the route and in what it depends on, the nearest first."""
    uses: dict[fx.Node, list[Call]] = {}
    for use in trace.uses:
        uses.setdefault(use.call.node, []).append(use.weight)
    order = {node: i for i, node in enumerate(trace.graph.calls)}
    seen, waiting, out = set(route), list(route), []
    while waiting:
        waiting.sort(key=order.__getitem__)
        node = waiting.pop()
        out += [weight.names for weight in uses.get(node, [])]
        for below in trace.graph.calls[node].tensors:
            if below is not None and below in trace.graph.data and below not in seen:
                seen.add(below)
                waiting.append(below)
    return out


def _cure(value: FlowValue, weights: list[tuple[str, ...]], failed: Sequence[Obligation], when: str, *, grows: bool) -> str:
    """The cure of what fails nearest to a value: of its own product of activations, or of the last weight before it."""
    where = f"{PurePath(value.source.file).name}:{value.source.line}"
    sized = [one for one in failed if one.cure and one.name.removeprefix("same ") not in {"epsilon", "decay", "clip"}]
    near = [[one for one in sized if one.name == "contraction" and one.where == where]]
    near += [[one for one in sized if set(names) & set(one.names)] for names in weights]
    near.append(sized)  # above it, where its gradient comes from
    for group in ([one for one in group if (one.excess > 0) == grows] for group in near):
        if group:
            one = max(group, key=lambda one: (("init" in one.name) == (when == AT_INIT), abs(one.excess)))
            return f"{one.weight}: {one.cure}" + (f", {one.where}" if one.where else "")
    return ""
