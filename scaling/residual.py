"""Residual additions h + f(h), found in the graph: which term is the stream, which are branches, what repeats with depth.

A term is the stream if the other one is computed from it, or from what it was before, through a weight that sums; names and types of
modules are not looked at. A concatenation is no addition (THEORY P40).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import fx

from scaling.contractions import as_number
from scaling.graph import Call, LayerGraph
from scaling.operators import rule_of
from scaling.uses import WeightUse, is_linear

__all__ = ["OUTSIDE", "Addition", "Flow", "Stream", "streams_of"]

ADDS = {"aten.add", "aten.sub"}
POOLS = {f"aten.{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)} | {
    f"aten.{name}" for name in ("pad", "constant_pad_nd", "reflection_pad2d", "dropout", "feature_dropout", "alpha_dropout")
}
"""What a skip may do to the stream besides moving it: it hands on the entries, or averages or maxima of them."""

NORMS = {f"aten.{kind}_norm" for kind in ("layer", "rms", "batch", "group", "instance")}
MERGES = {"aten.sum", "aten.mean", "aten.cumsum", "aten.cumprod", "aten.cat", "aten.stack", "aten.fill", "aten.zero"}

OUTSIDE = 1
"""The bit of `Flow.reach` that says: not only through residual branches."""


@dataclass(frozen=True, eq=False)
class Addition:
    """h + f₁(h) + …: `calls` are the adds that write it (the last has the value), `trunk` the term h, `branches` the terms f(h).

    `origin` is the value of the stream that the branches are computed from: the trunk, without what only moves it.
    """

    calls: tuple[Call, ...]
    trunk: fx.Node
    origin: fx.Node
    branches: tuple[fx.Node, ...]

    @property
    def node(self) -> fx.Node:
        """The value."""
        return self.calls[-1].node


@dataclass(frozen=True, eq=False)
class Stream:
    """Additions that follow each other on one stream of values; `size` branches in the longest chain of them."""

    additions: tuple[Addition, ...]
    size: int


class Flow:
    """Which values of a graph follow from which: sets of nodes as bits of an int."""

    def __init__(self, graph: LayerGraph, uses: Sequence[WeightUse]) -> None:
        self.graph, self.nodes = graph, list(graph.calls)
        self.bit = {node: 1 << i for i, node in enumerate(self.nodes)}
        self.summing = self.bits(use.call.node for use in uses if any(span.part == "in" for spans in use.spans for span in spans))
        """Operators with a weight that sums."""

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        """The set of the nodes."""
        out = 0
        for node in nodes:
            out |= self.bit[node]
        return out

    @cached_property
    def before(self) -> dict[fx.Node, int]:
        """Node -> it and all it is computed from."""
        return self.ancestors(frozenset())

    def ancestors(self, cut: frozenset[tuple[fx.Node, fx.Node]]) -> dict[fx.Node, int]:
        """Node -> it and all it is computed from, along any edges but these."""
        out: dict[fx.Node, int] = {}
        for node in self.nodes:
            out[node] = self.bit[node]
            for source in node.all_input_nodes:
                if (source, node) not in cut:
                    out[node] |= out[source]
        return out

    @cached_property
    def after(self) -> dict[fx.Node, int]:
        """Node -> it and all that is computed from it."""
        out = dict(self.bit)
        for node in reversed(self.nodes):
            for source in node.all_input_nodes:
                out[source] |= out[node]
        return out

    def between(self, start: fx.Node, end: fx.Node) -> int:
        """What lies on a path from start to end, without start."""
        return self.after[start] & self.before[end] & ~self.bit[start]

    def data(self, call: Call) -> list[fx.Node]:
        """The tensor arguments that are data."""
        return [n for n in dict.fromkeys(call.tensors) if n is not None and n in self.graph.data]

    def terms(self, call: Call) -> list[fx.Node]:
        """The tensor arguments that are data, or made of weights."""
        return [n for n in dict.fromkeys(call.tensors) if n is not None and n in self.graph.data | self.graph.weight_only]

    def steps(self, node: fx.Node) -> Iterator[Call]:
        """The calls that only move, average or scale by a number one value, from here up."""
        while (call := self.graph.calls[node]).node.op == "call_function" and self._moves(call):
            yield call
            node = self.data(call)[0]

    def _moves(self, call: Call) -> bool:
        rule, data = rule_of(call), self.data(call)
        if rule is None or len(data) != 1 or any(n in self.graph.weight_only for n in call.node.all_input_nodes):
            return False
        moved = rule.moves is not None and rule.linear and call.name not in MERGES
        return moved or call.name in POOLS or any(number != 1 for number in as_number(self.graph, call))

    def core(self, node: fx.Node) -> fx.Node:
        """The value before all that only moves, averages or scales it."""
        if node in self.graph.weight_only:
            return next(iter(self.graph.made_of(node))).node
        for call in self.steps(node):
            node = self.data(call)[0]
        return node

    def factor(self, node: fx.Node) -> float:
        """The number that the moves from its core to the node multiply by."""
        return prod(as_number(self.graph, call)[0] for call in self.steps(node))

    def reach(self, additions: Sequence[Addition]) -> tuple[dict[fx.Node, int], dict[int, tuple[Addition, fx.Node]]]:
        """Node -> the branches through which alone it acts, bits that the second value names; or with OUTSIDE among them.

        A value that is handed out before the last addition (a cache, the scores of a router) acts through its branches all the same.
        """
        ends = self.bits(
            one.node for one in additions if not any(one is not other and self.between(one.node, other.node) for other in additions)
        )
        last = {node for node in self.graph.outputs if self.before[node] & ends}
        bits: dict[int, tuple[Addition, fx.Node]] = {}
        edges: dict[tuple[fx.Node, fx.Node], int] = {}
        for addition in additions:
            own = {call.node for call in addition.calls}
            for branch in addition.branches:
                bit = OUTSIDE << (len(bits) + 1)
                bits[bit] = addition, branch
                edges |= {(branch, node): bit for node in own if branch in node.all_input_nodes}
            edges |= {(source, node): OUTSIDE for node in own for source in node.all_input_nodes if (source, node) not in edges}
        out = dict.fromkeys(self.nodes, 0)
        for node in reversed(self.nodes):
            if out[node] == 0 and node in last:
                out[node] = OUTSIDE
            for source in node.all_input_nodes:
                out[source] |= edges.get((source, node), out[node])
        return out, bits


def streams_of(flow: Flow) -> list[Stream]:
    """The streams whose additions are what repeats with depth, longest first.

    An addition around a longer chain of others (a skip around the whole body) does not count, nor do those inside a branch of what counts.
    """
    kept = _repeated(flow, _with_projections(flow, _identities(flow)))
    cut = frozenset((branch, call.node) for one in kept for call in one.calls for branch in one.branches)
    above = flow.ancestors(cut)
    groups: list[list[Addition]] = []
    lengths: dict[Addition, int] = {}
    for one in kept:
        earlier = [other for other in lengths if above[one.node] & flow.bit[other.node]]
        lengths[one] = len(one.branches) + max((lengths[other] for other in earlier), default=0)
        joined = [group for group in groups if any(other in group for other in earlier)]
        groups = [group for group in groups if group not in joined] + [[*(other for group in joined for other in group), one]]
    streams = [Stream(tuple(group), max(lengths[one] for one in group)) for group in groups]
    return sorted(streams, key=lambda stream: -stream.size)


# --- candidates -------------------------------------------------------------------------------------------------------------------------


def _sums(flow: Flow) -> Iterator[tuple[tuple[Call, ...], list[fx.Node]]]:
    """Sums of at least two terms: the adds that write one, and its terms. A stream may begin with a weight (learned queries)."""
    adds = {node: call for node, call in flow.graph.calls.items() if call.name in ADDS and len(flow.data(call)) == 2}
    first = {
        node: call
        for node, call in flow.graph.calls.items()
        if call.name in ADDS and len(flow.terms(call)) == 2 and node in flow.graph.data
    }
    for node, call in first.items():
        users = list(node.users)
        if len(users) == 1 and users[0] in adds and adds[users[0]].shape == call.shape:
            continue  # a part of a longer sum
        yield _terms(flow, adds, call)


def _terms(flow: Flow, adds: dict[fx.Node, Call], call: Call) -> tuple[tuple[Call, ...], list[fx.Node]]:
    calls, terms = [call], []
    for node in flow.terms(call):
        if node in adds and len(node.users) == 1 and adds[node].shape == call.shape:
            inner, more = _terms(flow, adds, adds[node])
            calls, terms = [*inner, *calls], [*terms, *more]
        else:
            terms.append(node)
    return tuple(calls), terms


def _identities(flow: Flow) -> list[Addition]:
    """The sums one term of which is what another is computed from."""
    found: dict[fx.Node, Addition] = {}
    for calls, terms in _sums(flow):
        best: tuple[int, Addition] | None = None
        for trunk in terms:
            if flow.graph.calls[trunk].shape != calls[-1].shape:
                continue
            for origin in _origins(flow, found, trunk):
                branches = tuple(term for term in terms if term is not trunk and flow.between(origin, term) & flow.summing)
                if branches:
                    if best is None or flow.bit[origin] < best[0]:
                        best = flow.bit[origin], Addition(calls, trunk, origin, branches)
                    break
        if best is not None:
            found[best[1].node] = best[1]
    return list(found.values())


def _origins(flow: Flow, found: dict[fx.Node, Addition], trunk: fx.Node) -> Iterator[fx.Node]:
    """The stream at this term, then what it was before each of its additions."""
    node = flow.core(trunk)
    yield node
    while node in found:
        node = flow.core(found[node].trunk)
        yield node


def _with_projections(flow: Flow, found: list[Addition]) -> list[Addition]:
    """With the sums whose stream passes linear maps (a strided block of a residual network) next to those without."""
    sums = [(calls, terms) for calls, terms in _sums(flow) if calls[-1].node not in {one.node for one in found}]
    out = {one.node: one for one in found}
    while found and (new := [one for calls, terms in sums if (one := _projected(flow, list(out.values()), calls, terms)) is not None]):
        out |= {one.node: one for one in new}
        sums = [(calls, terms) for calls, terms in sums if calls[-1].node not in out]
    return sorted(out.values(), key=lambda one: flow.bit[one.node])


def _projected(flow: Flow, found: list[Addition], calls: tuple[Call, ...], terms: list[fx.Node]) -> Addition | None:
    node = calls[-1].node
    for trunk in terms:
        origin, others = trunk, [term for term in terms if term is not trunk]
        while not all(flow.before[term] & flow.bit[origin] for term in others):
            call = flow.graph.calls[origin]
            data = flow.data(call)
            linear = is_linear(call) or call.name in NORMS or call.name in POOLS or flow.bit[origin] & flow.summing
            if len(data) != 1 or not linear:
                break
            origin = data[0]
        else:
            branches = tuple(term for term in others if _bent(flow, origin, term))
            sides = any(_follows(flow, one.trunk, node) or _follows(flow, origin, one.node) for one in found)
            if branches and sides and flow.between(origin, trunk) & flow.summing:
                return Addition(calls, trunk, origin, branches)
    return None


def _bent(flow: Flow, origin: fx.Node, term: fx.Node) -> bool:
    """Whether a term is no linear function of the origin, and has a weight that sums."""
    path = flow.between(origin, term)
    bends = (node for node in flow.nodes if flow.bit[node] & path and not flow.bit[node] & flow.summing)
    calls = [flow.graph.calls[node] for node in bends]
    return bool(path & flow.summing) and any(not is_linear(c) and c.name not in NORMS | POOLS for c in calls)


def _follows(flow: Flow, node: fx.Node, value: fx.Node) -> bool:
    """Whether `node` is `value` up to elementwise functions, norms and moves."""
    while node is not value:
        call = flow.graph.calls[node]
        data = flow.data(call)
        if len(data) != 1 or flow.bit[node] & flow.summing:
            return False
        node = data[0]
    return True


def _repeated(flow: Flow, additions: list[Addition]) -> list[Addition]:
    """The additions of the level that repeats: not those inside a branch of another, unless the inside is the longer chain."""
    inside = {
        one: [other for other in additions if any(flow.between(one.origin, branch) & flow.bit[other.node] for branch in one.branches)]
        for one in additions
    }
    while True:
        nested = {other for one in additions for other in inside[one]}
        top = [one for one in additions if one not in nested]
        around = [one for one in top if len(_outermost(inside, [a for a in inside[one] if a in additions])) > len(top)]
        if not around:
            return top
        additions = [one for one in additions if one not in around]


def _outermost(inside: dict[Addition, list[Addition]], additions: list[Addition]) -> list[Addition]:
    return [one for one in additions if not any(one in inside[other] for other in additions)]
