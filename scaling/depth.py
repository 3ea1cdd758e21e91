"""Depth: what L residual branches ask of the weights in them, L^-α on each branch, folded into the branch's last maps (THEORY 4).

Branches are independent at init, so that β = L^-α keeps the stream bounded for α ≥ 1/2 (Bordelon et al. 2024, arXiv 2405.15712, result 3);
updates add up, so that each of L branches may change its output by 1/(L·β); and a gradient in a branch carries β. For α = 1 these are
the factors of Dey et al. 2025, arXiv 2505.01618, table 1; for α = 1/2 those of Yang et al. 2023, arXiv 2310.02244.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import sympy
from torch import fx, nn

from scaling.branches import Found, folds_of, present_in, settled
from scaling.contractions import Fold
from scaling.errors import ScalingError
from scaling.folding import template
from scaling.graph import Call, LayerGraph
from scaling.limits import DEPTH
from scaling.records import Residual, WeightRule
from scaling.residual import OUTSIDE, Addition, Flow, Stream, streams_of
from scaling.uses import WeightUse

__all__ = ["Deep", "NoResidualBranches", "UnstableDepth", "alpha_of", "deepen"]

ONE, HALF = sympy.Integer(1), sympy.Rational(1, 2)
PLAIN = 4
"""Maps in a row without a residual addition that any model may have (a stem, a wide branch); a longer row may have two for every branch."""


class NoResidualBranches(ScalingError):
    """The layers that repeat are not added to a stream, and no learning rate transfers over their number (THEORY 4.4)."""

    def __init__(self, model: str, why: str, where: str) -> None:
        self.model, self.where = model, where
        super().__init__(
            f"{model or 'the model'} has no depth rule: {why}\n  at {where}\n"
            "  the rules of depth are for h + f(h): add residual connections, or derive without depth=, at a fixed number of layers"
        )


class UnstableDepth(ScalingError, ValueError):
    """A branch multiplier L^-α under which the stream grows with depth, or nothing is learned."""

    def __init__(self, alpha: object, why: str, cure: str = "depth=True is α = 1, depth='1/2' is α = 1/2") -> None:
        self.alpha = alpha
        super().__init__(f"the branch multiplier L^-α with α = {alpha}: {why}\n  {cure}")


def alpha_of(depth: object) -> sympy.Rational:
    """The α that `derive(depth=)` means: 1 for True, else the number itself.

    Raises:
        UnstableDepth: outside of [1/2, 1], or if it is no rational number.

    >>> alpha_of(True), alpha_of("1/2"), alpha_of(0.5)
    (1, 1/2, 1/2)
    """
    try:
        alpha = sympy.Rational(1) if depth is True else sympy.Rational(str(depth))
    except (TypeError, ValueError) as error:
        raise UnstableDepth(repr(depth), "that is no rational number") from error
    if not isinstance(alpha, sympy.Rational):
        raise UnstableDepth(repr(depth), "that is no rational number")
    if alpha < HALF:
        grown = HALF - alpha
        why = f"L independent branches add up to L^({grown}) at init, and their updates, which are aligned, to L^({1 - alpha})"
        raise UnstableDepth(alpha, f"the stream is unstable for α < 1/2; {why}")
    if alpha > 1:
        raise UnstableDepth(alpha, f"branches vanish; their weights would have to move by L^({alpha - 1}) of their size in a step")
    return alpha


@dataclass(frozen=True, eq=False)
class Deep:
    """What depth adds to a table: `residual` for the table, `folds` for `rules_of`, and the factors of every weight."""

    residual: Residual
    folds: tuple[Fold, ...]
    factors: dict[str, dict[str, sympy.Expr]]

    def rule(self, rule: WeightRule) -> WeightRule:
        """The rule with the factors of its weight."""
        factors = self.factors.get(rule.name, {})
        if not factors:
            return rule
        blocks = tuple(block.model_copy(update=factors) for block in rule.blocks)
        return rule.model_copy(update={"blocks": blocks, "uses": tuple(use.model_copy(update=factors) for use in rule.uses)})


def deepen(graph: LayerGraph, uses: list[WeightUse], alpha: sympy.Rational, model: nn.Module) -> Deep:
    """The depth of a model: its residual branches, and what they ask of every weight.

    Raises:
        NoResidualBranches: if nothing is added to a stream, or a longer chain of maps has no residual connections.
        UnstableDepth: for α < 1 where branches share their weights.
    """
    flow = Flow(graph, uses)
    streams = streams_of(flow)
    size = streams[0].size if streams else 0
    _refuse_a_plain_stack(flow, uses, size)
    additions = [one for stream in streams for one in stream.additions]
    reach, bits = flow.reach(additions)
    of = {one: stream for stream in streams for one in stream.additions}
    lengths = {one: DEPTH * stream.size / size for one, stream in of.items()}
    found = [Found(flow, one, node, bit, lengths[one] ** -alpha) for bit, (one, node) in bits.items()]
    places = _places(uses, reach, found)
    shared = _shared(flow, places)
    _refuse_shared_randomness(alpha, found, uses, reach, shared)
    branches = settled([replace(one, present=present_in(found, size)) for one in found], uses)
    factors = _in_branches(flow, places, branches, of, shared)
    on_stream = _on_stream(flow, uses, streams, reach)
    return Deep(
        residual=Residual(
            size=size,
            alpha=alpha,
            branches=tuple(one.record(uses, reach, model) for one in branches),
            shared=tuple(weight.names[0] for weight in shared),
            on_stream=tuple(on_stream),
            notes=tuple(_scaled_streams(additions, flow)),
        ),
        folds=tuple(folds_of(branches)),
        factors=factors | on_stream,
    )


# --- what is refused ----------------------------------------------------------------------------------------------------------------


def _refuse_a_plain_stack(flow: Flow, uses: list[WeightUse], size: int) -> None:
    """Refuses where the longest row of maps without an addition is longer than the chain of additions."""
    sums = {one.node for one in _additions(flow)}
    matrices = {use.call.node for use in uses if {"in", "out"} <= {span.part for spans in use.spans for span in spans}}
    rows: dict[fx.Node, tuple[int, fx.Node | None]] = {}
    for node in flow.nodes:
        length, first = max((rows[source] for source in node.all_input_nodes), key=lambda row: row[0], default=(0, None))
        if node in matrices:
            length, first = length + 1, first or node
        rows[node] = (0, None) if node in sums else (length, first)
    length, first = max(rows.values(), key=lambda row: row[0], default=(0, None))
    if size == 0 or length > max(2 * size, PLAIN):
        where = str(flow.graph.calls[first].source) if first is not None else "its forward"
        state = f"the longest chain of residual branches has {size}" if size else "no value is added to what it is computed from"
        why = f"{length} layers follow each other from here without a residual connection, and {state}"
        raise NoResidualBranches(flow.graph.recordings[0].model, why, where)


def _additions(flow: Flow) -> list[Addition]:
    return [one for stream in streams_of(flow) for one in stream.additions]


def _refuse_shared_randomness(
    alpha: sympy.Rational, branches: list[Found], uses: list[WeightUse], reach: dict[fx.Node, int], shared: dict[Call, int]
) -> None:
    """The same random map in every branch adds up like its updates do: α = 1 (THEORY P39)."""
    for one in branches if alpha < 1 else ():
        own = {
            use.weight: use for use in uses if reach[use.call.node] & one.bit and any(s.part == "in" for spans in use.spans for s in spans)
        }
        if own and all(weight in shared for weight in own):
            names = ", ".join(weight.names[0] for weight in own)
            why = (
                f"every branch uses the same {names}, at {next(iter(own.values())).call.source}: their outputs are aligned at init already"
            )
            raise UnstableDepth(alpha, f"{why}, and add up to L^({1 - alpha})", "derive with depth=True, α = 1")


def _scaled_streams(additions: list[Addition], flow: Flow) -> Iterator[str]:
    """Notes of a number on the stream itself: after L additions it is there L times (THEORY P36)."""
    scaled = {str(one.calls[-1].source): number for one in additions if (number := flow.factor(one.trunk)) not in (0, 1)}
    for where, number in scaled.items():
        yield (
            f"the stream itself is multiplied by {number:g} before the addition at {where}: that is no branch multiplier, "
            "as every further addition multiplies it again; put the factor on the branch alone"
        )


# --- weights ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Place:
    """One use of a weight: its operator, and the additions through the branches of which alone it acts; () outside of branches."""

    node: fx.Node
    additions: tuple[Addition, ...]


def _places(uses: list[WeightUse], reach: dict[fx.Node, int], branches: list[Found]) -> dict[Call, list[_Place]]:
    out: dict[Call, list[_Place]] = {}
    for use in uses:
        bits = reach[use.call.node]
        hit = () if bits & OUTSIDE else dict.fromkeys(one.addition for one in branches if bits & one.bit)
        out.setdefault(use.weight, []).append(_Place(use.call.node, tuple(hit)))
    return {weight: places for weight, places in out.items() if all(place.additions for place in places)}


def _shared(flow: Flow, places: dict[Call, list[_Place]]) -> dict[Call, int]:
    """The weights that act through the more additions the deeper the model is -> through how many.

    They are looped over more often than there are others like them, or make one value that all branches read. A value that is computed
    from a stream (keys that a few layers share, the encoder's last) is not such a one.
    """
    counts = {weight: sum(len(place.additions) for place in found) for weight, found in places.items()}
    alike = Counter((template(weight.names[0]), count) for weight, count in counts.items())
    sums = flow.bits({one.node for found in places.values() for place in found for one in place.additions})
    return {
        weight: count
        for weight, count in counts.items()
        if count > 1
        and alike[template(weight.names[0]), count] < count
        and not any(len(place.additions) > 1 and flow.before[place.node] & sums for place in places[weight])
    }


def _in_branches(
    flow: Flow, places: dict[Call, list[_Place]], branches: list[Found], of: dict[Addition, Stream], shared: dict[Call, int]
) -> dict[str, dict[str, sympy.Expr]]:
    """Weight -> its `gradient` and `share`: β times the uses that add up, and 1/(L·β)."""
    out, size = {}, max(stream.size for stream in of.values())
    scales = {one.addition: one.scale for one in branches}
    for weight, found in places.items():
        hit = [one for place in found for one in place.additions]
        before = {of[one] for place in found if len(place.additions) > 1 for one in of if flow.before[place.node] & flow.bit[one.node]}
        if before and of[hit[0]] not in before:
            continue  # what another stream hands over to all branches of this one
        times = DEPTH * sympy.Rational(shared[weight], size) if weight in shared else sympy.Integer(len(hit))
        beta, length = scales[hit[0]], DEPTH * sympy.Rational(of[hit[0]].size, size)
        out[weight.names[0]] = {"gradient": beta * times, "share": 1 / (length * beta)}
    return out


def _on_stream(flow: Flow, uses: list[WeightUse], streams: Sequence[Stream], reach: dict[fx.Node, int]) -> dict[str, dict[str, sympy.Expr]]:
    """Weights that the stream itself passes after every addition (post-norm) -> their `gradient` and `share`.

    Their updates add up over L as those of branches do, while a gradient is as large as outside, once for every use: the share is 1/L.
    """
    out = {}
    for stream in streams:
        ends, size = flow.bits(one.node for one in stream.additions), sympy.Rational(stream.size, streams[0].size)
        after: dict[Addition, list[Call]] = {}
        for use in uses:
            node = use.call.node
            if reach[node] & OUTSIDE and use.weight.node.meta["trainable"]:
                earlier = [one for one in stream.additions if _passes(flow, one.node, node, ends)]
                for one in earlier[-1:]:
                    after.setdefault(one, []).append(use.weight)
        if len(stream.additions) > 1 and len(after) >= len(stream.additions) - 1:
            last = stream.additions[-1]
            kinds = {template(weight.names[0]) for one, weights in after.items() if one is not last for weight in weights}
            counts = Counter(weight for weights in after.values() for weight in weights if template(weight.names[0]) in kinds)
            for weight, count in counts.items():
                gradient = DEPTH * size * sympy.Rational(count, len(stream.additions)) if count > 1 else ONE
                out[weight.names[0]] = {"gradient": gradient, "share": 1 / (DEPTH * size)}
    return out


def _passes(flow: Flow, start: fx.Node, node: fx.Node, ends: int) -> bool:
    """Whether the value at `start` gets to `node` before the next addition."""
    return bool(flow.between(start, node)) and not flow.between(start, node) & ends & ~flow.bit[node]
