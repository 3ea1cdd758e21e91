"""`flow`: how large every tensor of a model is in d: at init, in its change by training, and in its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import sympy
import torch
from torch import Tensor, fx

from scaling.errors import ScalingError, UnknownName
from scaling.folding import fold, template
from scaling.graph import Call
from scaling.limits import exponent
from scaling.orders import CONSTANT, NOTHING, UNKNOWN, ZERO, Exponent, Pieces, State, joined, minus, plus, times, top, zipped
from scaling.parametrizations import CLASSES, class_of, family_of, gradient_norm
from scaling.parametrizations import parametrization as own
from scaling.propagation import HALF, MOVES, Context, Pull, propagate
from scaling.records import Block, Exact, Law, Parametrization, Record, ScalingTable, Source, WeightRule
from scaling.uses import Dot, WeightUse, uses_of

__all__ = ["Flow", "FlowValue", "FlowWeight", "flow", "predicted_slopes"]

STEPS = 8
"""Updates after which sizes that still grow are taken to grow without end; a stable model settles after as many as it has zero inits."""


class FlowValue(Record):
    """The value of one operator, or the logits inside a fused attention.

    Exponents of d; -oo where it is exactly zero, oo where every step makes it grow, None where no rule tells.

    `init` is its RMS at init, `change` the RMS of its change once training has gone on for a few steps and `first` after one; `gradient` is
    the RMS of the loss' gradient after a few steps and `gradient_at_init` before any.
    """

    name: str
    module: str
    operator: str
    source: Source
    init: Exact | None
    first: Exact | None
    change: Exact | None
    gradient_at_init: Exact | None
    gradient: Exact | None

    @property
    def sizes(self) -> tuple[sympy.Expr | None, ...]:
        """Init, first change, change, gradient at init, gradient."""
        return self.init, self.first, self.change, self.gradient_at_init, self.gradient


class FlowWeight(Record):
    """One block of a weight, as it acts (times its multiplier): entries at init, of its change and of its gradient.

    `norm` is the Frobenius norm of the gradient of the stored weight at init, `entries` its RMS: what clipping and Adam's ε meet.
    """

    name: str
    block: int
    init: Exact | None
    change: Exact | None
    entries: Exact | None
    norm: Exact | None


class Flow(Record):
    """The sizes of all values in execution order, and of the weights. `unknown` has the operators that no rule covers, with their lines."""

    model: str
    optimizer: str
    parametrization: str
    steps: int
    settled: bool
    values: tuple[FlowValue, ...]
    weights: tuple[FlowWeight, ...]
    outputs: tuple[str, ...]
    unknown: tuple[str, ...] = ()

    def of(self, module: str) -> FlowValue:
        """The last value that a module's forward (or that of a module inside it) makes: its output. "" is the model.

        Raises:
            UnknownName: if no operator ran in a module of this name.
        """
        if module in {"", "(model)"} and self.outputs:
            return next(value for value in self.values if value.name == self.outputs[0])
        inside = [value for value in self.values if value.module == module or value.module.startswith(f"{module}.")]
        if not inside:
            raise UnknownName("module", module, dict.fromkeys(value.module for value in self.values if value.module))
        return inside[-1]

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module in which an operator ran, with the modules around it; "" is the model."""
        paths: dict[str, None] = {"": None}
        for value in self.values:
            parts = value.module.split(".") if value.module else []
            paths |= {".".join(parts[: i + 1]): None for i in range(len(parts))}
        return tuple(paths)

    @property
    def blows_up(self) -> tuple[FlowValue, ...]:
        """The values that are, or whose change is, larger than Θ(1), in execution order: the first is where trouble starts."""
        return tuple(v for v in self.values if any(x is not None and x > 0 for x in (v.init, v.first, v.change)))

    def to_json(self) -> str:
        """All of it as JSON; exponents as text."""
        return self.model_dump_json(indent=1)

    def __str__(self) -> str:
        return _text(self)

    def __repr__(self) -> str:
        return _text(self)


def flow(table: ScalingTable, optimizer: str | None = None, parametrization: Parametrization | None = None) -> Flow:
    """Carries the sizes of all tensors through the graph that a table was derived from, as powers of the width.

    The loss' gradient is Θ(1) at each output (a mean over outputs, as cross entropy is), inputs are Θ(1), ε is negligible, biases start
    at zero and gains at one.

    Args:
        table: as `derive` returned it.
        optimizer: of `scaling.parametrizations.CLASSES`; "muon+adam", which "muon" is short for, is the first where both fans grow and
            the second elsewhere. Left out it is the parametrization's, or "adam".
        parametrization: multipliers, init and learning rates of every weight; None for the table's own rules.

    Raises:
        NoGraph: if the table was read from JSON.
        UnknownName: for an optimizer that is not known.
        ScalingError: if the parametrization is for another optimizer, or lacks a weight.
    """
    family = _family(optimizer, parametrization)
    given = parametrization or own(table, "spectral", family)
    run = _Run(table, family, given)
    return run.result(family, "" if parametrization is None else given.name, run.train())


def _family(optimizer: str | None, parametrization: Parametrization | None) -> str:
    family = parametrization.family if parametrization is not None else optimizer or "adam"
    classes = [class_of(name) for name in family.split("+")]
    if parametrization is None:
        return f"{family}+adam" if classes == [CLASSES["muon"]] else family
    if optimizer is not None and class_of(optimizer.split("+")[0]) is not classes[0]:
        message = f"the parametrization {parametrization.name!r} is for {family!r}, not for {optimizer!r}: leave optimizer= out"
        raise ScalingError(message)
    return family


def predicted_slopes(flow: Flow) -> dict[str, dict[int, Exact | None]]:
    """Module path -> {0: exponent at init, 1: of the change after one step, 2: of the change after several}; "(model)" is the model."""
    out = {}
    for module in flow.modules:
        value = flow.of(module)
        out[module or "(model)"] = {0: value.init, 1: value.first, 2: value.change}
    return out


# --- training, in exponents ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BlockSizes:
    """One block of a weight under its law, in exponents.

    `entry` is the size of an update's entries from a gradient with entries of size `wanted`; a gradient c times as large makes them
    c**degree as large.
    """

    init: Exponent
    multiplier: Exponent
    lr: Exponent
    entry: Exponent
    wanted: Exponent
    degree: Fraction
    elements: Fraction

    def update(self, gradient: Exponent) -> Exponent:
        """What a step changes of the entries as they act, from the stored weight's gradient."""
        if gradient == NOTHING:
            return NOTHING
        return plus(self.multiplier, self.lr, self.entry, times(minus(gradient, self.wanted), self.degree))


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight: the exponents of its blocks, and the block of every entry where they differ."""

    call: Call
    rule: WeightRule
    blocks: tuple[_BlockSizes, ...]
    labels: Tensor | None
    start: str

    def value(self, updates: Sequence[Exponent]) -> Pieces[State]:
        parts = []
        for block, update in zip(self.blocks, updates, strict=True):
            init = NOTHING if self.start == "zero" else block.init
            mean = init if self.start == "one" else NOTHING
            roots = frozenset({(self.rule.name, ())}) if self.start == "random" else frozenset()
            parts.append(State.of(init, mean, update, roots))
        return Pieces.of(joined(parts)) if self.labels is None else Pieces.labelled(parts, self.labels)

    def gradients(self, pieces: Pieces[Exponent] | None) -> list[Exponent]:
        """The gradient of the stored weight, per block."""
        out: list[Exponent] = []
        for i, block in enumerate(self.blocks):
            if pieces is None:
                size: Exponent = NOTHING
            elif pieces.labels is None or self.labels is None:
                size = pieces.whole(lambda parts: top(*parts))
            else:
                size = top(*(pieces.parts[int(k)] for k in pieces.labels[self.labels == i].unique()))
            out.append(plus(size, block.multiplier))
        return out


@dataclass(frozen=True, eq=False)
class _Moment:
    """All sizes after some number of updates."""

    values: dict[fx.Node, Pieces[State]]
    gradients: dict[fx.Node, Pieces[Exponent]]
    updates: dict[fx.Node, tuple[Exponent, ...]]
    settled: bool
    logits: dict[fx.Node, tuple[State, Exponent]]


class _Run:
    def __init__(self, table: ScalingTable, family: str, parametrization: Parametrization) -> None:
        trace = table.trace
        self.table, self.family, self.graph = table, family, trace.graph
        dots: dict[fx.Node, Dot] = {dot.call.node: dot for dot in uses_of(trace.graph, trace.growth.axes)[1]}
        self.context = Context(trace.graph, trace.growth, dots)
        uses: dict[Call, list[WeightUse]] = {}
        for use in trace.uses:
            uses.setdefault(use.weight, []).append(use)
        self.weights = {
            call.node: self._weight(call, table[call.names[0]], uses.get(call, []), parametrization)
            for call in trace.graph.weights
            if call.names[0] in table
        }
        self.multipliers = _tied(self.weights, uses, parametrization)
        self.unknown: dict[str, None] = {}

    def _weight(self, call: Call, rule: WeightRule, uses: list[WeightUse], parametrization: Parametrization) -> _Weight:
        laws = _laws(parametrization, rule)
        sizes = tuple(_sizes(block, law, family_of(block, self.family)) for block, law in zip(rule.blocks, laws, strict=True))
        labels = _labels(rule, self.table.size) if len(set(sizes)) > 1 else None
        return _Weight(call, rule, sizes if labels is not None else sizes[:1], labels, _start(uses))

    def train(self) -> list[_Moment]:
        """The sizes at init, after one update, …, until they settle."""
        updates: dict[fx.Node, tuple[Exponent, ...]] = {node: (NOTHING,) * len(weight.blocks) for node, weight in self.weights.items()}
        moments: list[_Moment] = []
        for step in range(STEPS + 1):
            self.context.trained = step > 0
            values, gradients = self._pass(updates)
            following = {node: self._updated(weight, updates[node], gradients.get(node)) for node, weight in self.weights.items()}
            settled = following == updates
            moments.append(_Moment(values, gradients, dict(updates), settled, dict(self.context.logits)))
            if settled and step > 0:
                break
            updates = following
        return moments if len(moments) > 1 else moments * 2

    def _updated(self, weight: _Weight, before: Sequence[Exponent], gradient: Pieces[Exponent] | None) -> tuple[Exponent, ...]:
        gradients = weight.gradients(gradient)
        return tuple(top(old, block.update(size)) for block, old, size in zip(weight.blocks, before, gradients, strict=True))

    def _pass(self, updates: dict[fx.Node, tuple[Exponent, ...]]) -> tuple[dict[fx.Node, Pieces[State]], dict[fx.Node, Pieces[Exponent]]]:
        values: dict[fx.Node, Pieces[State]] = {}
        pulls: dict[fx.Node, Pull] = {}
        for node, call in self.graph.calls.items():
            if node in self.weights:
                values[node] = self.weights[node].value(updates[node])
            elif call.names:
                values[node] = Pieces.of(UNKNOWN)  # a frozen weight: what is in it is the user's
            elif node.op != "call_function" or not (node in self.graph.data or node in self.graph.weight_only):
                values[node] = Pieces.of(CONSTANT)
            else:
                given = [self._given(node, n, values) for n in call.tensors]
                values[node], pulls[node] = propagate(self.context, call, given)
                if not values[node].whole(joined).known and all(v is None or v.whole(joined).known for v in given):
                    self.unknown[f"{call.name} at {call.source}"] = None
        return values, self._backward(pulls)

    def _given(self, user: fx.Node, node: fx.Node | None, values: dict[fx.Node, Pieces[State]]) -> Pieces[State] | None:
        if node is None:
            return None
        power = self.multipliers.get((user, node), ZERO)
        return values[node] if power == 0 else values[node].each(lambda state: state.scaled(power))

    def _backward(self, pulls: dict[fx.Node, Pull]) -> dict[fx.Node, Pieces[Exponent]]:
        gradients: dict[fx.Node, Pieces[Exponent]] = {}
        for node in self.graph.outputs:
            gradients[node] = Pieces.of(-self.context.orders(node))
        for node in reversed(list(self.graph.calls)):
            if node not in pulls or node not in gradients:
                continue
            call = self.graph.calls[node]
            for source, back in zip(call.tensors, pulls[node](gradients[node]), strict=True):
                if source is None or back is None:
                    continue
                power = self.multipliers.get((node, source), ZERO)
                back = back if power == 0 else back.each(lambda e, power=power: plus(e, power))
                if source in gradients:
                    back = zipped(lambda a, b: top(a, b), gradients[source], back, _shape_of(source))
                gradients[source] = back
        return gradients

    # the result

    def result(self, optimizer: str, name: str, moments: list[_Moment]) -> Flow:
        last = moments[-1]
        values = []
        for node, call in self.graph.calls.items():
            if node.op == "call_function" and node in self.graph.data:
                if node in last.logits:
                    inside = [m.logits[node] for m in moments]
                    sizes = [(state.init, state.change, gradient) for state, gradient in inside]
                    values.append(_value(call, f"{node}.logits", "attention logits", sizes, settled=last.settled))
                states = [m.values[node].whole(joined) for m in moments]
                sizes = [(s.init, s.change, _whole(m.gradients.get(node))) for s, m in zip(states, moments, strict=True)]
                values.append(_value(call, str(node), call.name, sizes, settled=last.settled))
        return Flow(
            model=self.table.model,
            optimizer=optimizer,
            parametrization=name,
            steps=len(moments) - 1,
            settled=last.settled,
            values=tuple(values),
            weights=tuple(self._flow_weights(moments[0], last)),
            outputs=tuple(str(node) for node in self.graph.outputs),
            unknown=tuple(self.unknown),
        )

    def _flow_weights(self, first: _Moment, last: _Moment) -> Iterable[FlowWeight]:
        for node, weight in self.weights.items():
            entries = weight.gradients(first.gradients.get(node))
            for i, (block, update, size) in enumerate(zip(weight.blocks, last.updates[node], entries, strict=True)):
                init = NOTHING if weight.start == "zero" else block.init
                norm = plus(size, block.elements * HALF)
                yield FlowWeight(
                    name=weight.rule.name, block=i, init=_exact(init), change=_exact(update), entries=_exact(size), norm=_exact(norm)
                )


def _value(call: Call, name: str, operator: str, sizes: list[tuple[Exponent, Exponent, Exponent]], *, settled: bool) -> FlowValue:
    """A value from its (init, change, gradient) after 0, 1, … updates."""
    return FlowValue(
        name=name,
        module=call.source.module,
        operator=operator,
        source=call.source,
        init=_exact(sizes[0][0]),
        first=_exact(sizes[1][1]),
        change=_settled(*(change for _, change, _ in sizes[-2:]), settled=settled),
        gradient_at_init=_exact(sizes[0][2]),
        gradient=_settled(*(gradient for *_, gradient in sizes[-2:]), settled=settled),
    )


def _whole(pieces: Pieces[Exponent] | None) -> Exponent:
    return NOTHING if pieces is None else pieces.whole(lambda parts: top(*parts))


def _shape_of(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"] if isinstance(node.meta["val"], Tensor) else node.all_input_nodes[0].meta["val"]
    return tuple(value.shape)


def _exact(value: Exponent) -> sympy.Expr | None:
    if value is None:
        return None
    return sympy.S.NegativeInfinity if not isinstance(value, Fraction) else sympy.Rational(value.numerator, value.denominator)


def _settled(before: Exponent, last: Exponent, *, settled: bool) -> sympy.Expr | None:
    """The last of two exponents; oo if nothing settles and it still grows."""
    grows = not settled and before is not None and last is not None and NOTHING < before < last
    return sympy.oo if grows else _exact(last)


def _order(expression: sympy.Expr) -> Fraction:
    power = exponent(expression)
    return Fraction(int(power.p), int(power.q))


# --- weights ------------------------------------------------------------------------------------------------------------------------


def _laws(parametrization: Parametrization, rule: WeightRule) -> tuple[Law, ...]:
    laws = next((parametrization.laws[name] for name in rule.names if name in parametrization.laws), None)
    if laws is None or len(laws) != len(rule.blocks):
        given = "no law" if laws is None else f"{len(laws)} laws"
        message = f"the parametrization {parametrization.name!r} has {given} for {rule.name!r}, which has {len(rule.blocks)} blocks"
        raise ScalingError(message)
    return laws


def _sizes(block: Block, law: Law, family: str) -> _BlockSizes:
    found = class_of(family)
    stored = block.model_copy(update={"multiplier": law.multiplier})
    entries = sympy.sqrt(block.fan_in * block.fan_out)
    sigma = block.init_std if law.init_std is None else law.init_std
    return _BlockSizes(
        init=NOTHING if law.init_std is None else _order(law.init_std * law.multiplier),
        multiplier=_order(law.multiplier),
        lr=_order(law.lr),
        entry=_order(found.norm(stored, sigma) / entries),
        wanted=_order(gradient_norm(stored) / entries),
        degree=Fraction(str(found.degree)),
        elements=sum((_order(dim) for dim in block.dims), ZERO),
    )


ADDED = {"aten.addmm", "aten.baddbmm"}
"""Operators whose first argument is added to a product."""


def _start(uses: list[WeightUse]) -> str:
    """How a weight begins: a bias at zero, a gain at one, anything else at random."""
    kinds = set()
    for use in uses:
        norm, sums = use.call.name.endswith("_norm"), any(span.part == "in" for axis in use.spans for span in axis)
        if (use.call.name in {"aten.mul", "aten.prelu", "aten.multiply"} and not sums) or (norm and use.call.get("weight") is use.operand):
            kinds.add("one")
        elif use.call.get("bias") is use.operand or (use.call.name in ADDED and use.call.tensors[0] is use.operand):
            kinds.add("zero")
        else:
            kinds.add("random")
    return kinds.pop() if len(kinds) == 1 else "random"


def _labels(rule: WeightRule, size: int) -> Tensor:
    """The block of every entry of a weight, at the table's width."""
    labels = torch.zeros(rule.shape, dtype=torch.int16)
    for i, block in enumerate(rule.blocks):
        rows = []
        for factors in block.axes:
            lengths = [_at(factor.size, size) for factor in factors]
            index = torch.arange(math.prod(lengths)).reshape(lengths or [1])
            if factors:
                index = index[tuple(slice(_at(f.start, size), _at(f.stop, size)) for f in factors)]
            rows.append(index.flatten())
        labels[torch.meshgrid(*rows, indexing="ij")] = i
    return labels


def _at(expression: sympy.Expr, size: int) -> int:
    return int(expression.subs(dict.fromkeys(expression.free_symbols, size)))


def _tied(
    weights: dict[fx.Node, _Weight], uses: dict[Call, list[WeightUse]], parametrization: Parametrization
) -> dict[tuple[fx.Node, fx.Node], Exponent]:
    """The multiplier that each use of a tied weight has over the first: (operator, operand) -> power of d."""
    out: dict[tuple[fx.Node, fx.Node], Exponent] = {}
    for weight in weights.values():
        rule = weight.rule
        ratios = next((parametrization.ties[name] for name in rule.names if name in parametrization.ties), None)
        if ratios is None or len(ratios) != len(rule.uses):
            ratios = tuple(use.multiplier / rule.uses[0].multiplier for use in rule.uses)
        for use, ratio in zip(rule.uses, ratios, strict=True):
            for place in uses[weight.call]:
                if ratio != 1 and place.call.name == use.operator and place.call.source == use.source:
                    out[place.call.node, place.operand] = _order(ratio)
    return out


# --- text ---------------------------------------------------------------------------------------------------------------------------


def _text(result: Flow) -> str:
    """A line per module output and per operator that does more than move values; repeated layers on one line."""
    groups: dict[tuple, list[FlowValue]] = {}
    counts: dict[str, int] = {}
    for value in result.values:
        if value.operator in MOVES:
            continue
        counts[value.module] = counts.get(value.module, 0) + 1
        key = (template(value.module), counts[value.module], value.operator, value.sizes)
        groups.setdefault(key, []).append(value)
    rows = [["module", "operator", "at init", "Δ, step 1", "Δ, later", "gradient", "line"]]
    for values in groups.values():
        first = values[0]
        init, start, change, _, gradient = map(_power, first.sizes)
        names = fold(value.module or "(model)" for value in values)
        line = f"{first.source.file.rsplit('/', 1)[-1]}:{first.source.line}"
        rows += [[name, first.operator.removeprefix("aten."), init, start, change, gradient, line] for name in names]
    name = f" under {result.parametrization!r}" if result.parametrization else ""
    unknown = "".join(f"\nno rule: {text}" for text in result.unknown)
    legend = "powers of d; 0 is Θ(1), – exactly zero, ∞ grows with every step, ? not known"
    return f"{_columns(rows)}\n{result.model}{name}, {result.optimizer}: {legend}{unknown}"


def _power(value: sympy.Expr | None) -> str:
    if value is None:
        return "?"
    if value == sympy.oo:
        return "∞"
    return "–" if value == -sympy.oo else ("+" if value > 0 else "") + str(value)


def _columns(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)
