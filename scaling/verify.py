"""verify: is this parametrization muP, or that other one? Every obligation of the proof, decided exactly.

Nothing is read off a table of names. Against muP the law of every map is put into the spectral condition itself (Yang et al. 2023,
arXiv 2310.17813, condition 1): what its init and its optimizer's update make of ‖m·W‖₂ and ‖m·ΔW‖₂ has to be of the order
(s_y/s_x)·√(fan_out/fan_in) as d → ∞. Against another parametrization the gauge invariants have to agree (THEORY 3.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath

import sympy

from scaling import optimizers
from scaling.departures import Departure, departures
from scaling.depth_proof import depth_obligations, in_depth_too
from scaling.errors import ScalingError, UnknownName
from scaling.folding import fold, template
from scaling.limits import WIDTH, exact, leading
from scaling.notation import formula, plain
from scaling.parametrizations import CLASSES, PARAMETRIZATIONS, OptimizerClass, class_of, family_of, gradient_norm, order, parametrization
from scaling.records import Block, Contraction, Law, Parametrization, ScalingTable, Source, Use, WeightRule
from scaling.regimes import Excess, Regime, regime_of
from scaling.sheet import operator_name, same_rule, slice_text
from scaling.verdict import STATEMENTS, Obligation, Verdict

__all__ = ["verify"]

ZERO, ONE, HALF, INFINITY = sympy.Integer(0), sympy.Integer(1), sympy.Rational(1, 2), sympy.oo

WITH_EPSILON = {"adam", "adamw", "adam-msign", "adam-sn"}
"""Optimizers that divide by √v + ε."""

CLIPPING = {"svc"}
"""Optimizers that clip the singular values of λ·G."""


def verify(
    subject: ScalingTable | Parametrization,
    against: str | ScalingTable | Parametrization = "mup",
    optimizer: str | None = None,
    table: ScalingTable | None = None,
) -> Verdict:
    """Proves that a parametrization is equivalent to muP or to another one, or says where it is not.

    Args:
        subject: a scaling table (any gauge of one), or a parametrization of a table's model.
        against: "mup", a name of `PARAMETRIZATIONS`, another parametrization, or another table of the same model.
        optimizer: of `CLASSES`; one that maps matrices, such as "muon", leaves all but hidden weights to Adam; "muon+sgd" names
            both. By default that of the parametrizations given, and "adam" for tables.
        table: where no table is given otherwise: of the model. The uses of tied weights keep the ratios of its multipliers.

    Returns:
        The verdict, true iff equivalent: every obligation of the proof, and the regime of the subject.

    Raises:
        UnknownName: for an unknown name.
        ScalingError: if there is no table, if subject and against are for different optimizers, or have no law for a weight.

    >>> from scaling.records import Coverage
    >>> bool(verify(ScalingTable(size=64, rules=(), coverage=Coverage(trainable=0, reached=0))))
    True
    """
    own = table or next((one for one in (subject, against) if isinstance(one, ScalingTable)), None)
    if own is None:
        message = "a parametrization alone has no graph to prove anything of: verify(parametrization, table=derive(model))"
        raise ScalingError(message)
    family = _family(optimizer, subject, against)
    laws = _laws(subject, own, family)
    reference = None if against == "mup" else _named(against, own, family)
    other = None if reference is None else _laws(reference, own, family)
    cases = list(_cases(own, subject, laws, reference, other, family))
    products = [_product(group, own, laws, family) for group in _alike(own.contractions)]
    regime = _regime(own, cases, [excess for _, excess in products])
    obligations = [one for case in cases for one in (map(in_depth_too, _same(case)) if other is not None else _spectral(case, regime.r))]
    obligations += [one for one, _ in products if other is None]
    obligations += depth_obligations(own, laws, family) if other is None else ()
    obligations += [_unreached(name) for name in own.coverage.unreached]
    failed = [one for one in obligations if not one.proven]
    return Verdict(
        model=own.model,
        parametrization=subject.name if isinstance(subject, Parametrization) else "the scaling table",
        against=against if isinstance(against, str) else against.name if isinstance(against, Parametrization) else "the other table",
        optimizer=family,
        verdict=regime.verdict,
        r=regime.r,
        weights=len(own),
        obligations=tuple(obligations),
        departures=_departures(own, subject, laws, reference, other, family, failed),
    )


def _departures(
    table: ScalingTable, subject: object, laws: dict, against: object, other: dict | None, family: str, failed: list[Obligation]
) -> tuple[Departure, ...]:
    """Where a failure shows first in the model; nothing if the table has no graph, having been read from JSON."""
    if not failed or not table.traced:
        return ()

    def one(given: object, laws: dict) -> Parametrization:
        ties = {rule.name: tuple(_ratios(given, rule)) for rule in table if len(rule.uses) > 1}
        return Parametrization(name="", family=family, laws=laws, ties=ties)

    wanted = one(against, other) if other is not None else parametrization(table, "spectral", family)
    return departures(table, one(subject, laws), wanted, failed)


# --- what is compared ---------------------------------------------------------------------------------------------------------------


def _family(optimizer: str | None, *given: object) -> str:
    families = {one.family for one in given if isinstance(one, Parametrization)}
    if optimizer is not None:
        for name in optimizer.split("+"):
            class_of(name)
        maps = "+" not in optimizer and class_of(optimizer) is CLASSES["muon"]
        families |= {f"{optimizer}+adam" if maps and optimizer not in families else optimizer}
    if len(families) > 1:
        message = (
            f"these are for different optimizers: {', '.join(sorted(families))}\n  make both for one: parametrization(table, name, family)"
        )
        raise ScalingError(message)
    return next(iter(families), "adam")


def _named(against: str | ScalingTable | Parametrization, table: ScalingTable, family: str) -> ScalingTable | Parametrization:
    if not isinstance(against, str):
        return against
    if against not in PARAMETRIZATIONS:
        raise UnknownName("parametrization", against, ["mup", *PARAMETRIZATIONS])
    return parametrization(table, against, family)


def _laws(one: ScalingTable | Parametrization, table: ScalingTable, family: str) -> dict[str, tuple[Law, ...]]:
    """The laws of every weight of the table, by its name there."""
    given = one.laws if isinstance(one, Parametrization) else parametrization(one, "spectral", family).laws
    out = {}
    for rule in table:
        laws = next((given[name] for name in rule.names if name in given), ())
        if len(laws) != len(rule.blocks):
            message = (
                f"weight '{rule.name}' has {len(rule.blocks)} blocks and {len(laws)} laws\n"
                f"  give one law for each of table['{rule.name}'].blocks, in their order"
            )
            raise ScalingError(message)
        out[rule.name] = laws
    return out


@dataclass(frozen=True, eq=False)
class _Case:
    """A map of one weight, or of all weights of repeated blocks that are alike, with its law and the law it is compared with.

    `block` is the map with the law's multiplier; `later` says that it is a further use of a tied weight, `tie` and `other_tie` are then
    the ratios of its multiplier to that of the first use.
    """

    weight: str
    names: tuple[str, ...]
    block: Block
    law: Law
    family: str
    source: Source | None
    other: Law | None = None
    later: bool = False
    tie: sympy.Expr = ONE
    other_tie: sympy.Expr = ONE

    @property
    def optimizer(self) -> OptimizerClass:
        return class_of(self.family)

    @property
    def where(self) -> str:
        return f"{PurePath(self.source.file).name}:{self.source.line}" if self.source else ""


def _cases(table: ScalingTable, subject: object, laws: dict, against: object, other: dict | None, family: str) -> Iterator[_Case]:
    """The cases in model order; weights of repeated blocks that share all that is to be proved are one case."""
    groups: dict[object, list[WeightRule]] = {}
    for rule in table:
        others = other[rule.name] if other is not None else None
        shapes = tuple(block.model_copy(update={"axes": ()}) for block in rule.blocks)
        uses = tuple((use.operator, use.fan_in, use.fan_out, use.copies, use.lookup, use.multiplier) for use in rule.uses)
        key = (tuple(map(template, rule.names)), laws[rule.name], others, shapes, uses)
        groups.setdefault(key, []).append(rule)
    for rules in groups.values():
        first = rules[0]
        names = tuple(rule.name for rule in rules)
        others = other[first.name] if other is not None else (None,) * len(first.blocks)
        label = ", ".join(fold(names))
        for case in _maps(first, label, names, laws[first.name], others, family):
            yield case
            yield from _ties(case, first, _ratios(subject, first), _ratios(against, first))


def _maps(rule: WeightRule, label: str, names: tuple[str, ...], laws: tuple, others: tuple, family: str) -> Iterator[_Case]:
    """The blocks of a weight, those of one rule and law together."""
    done: list[_Case] = []
    for block, law, other in zip(rule.blocks, laws, others, strict=True):
        own = block.model_copy(update={"multiplier": law.multiplier})
        if any(same_rule(case.block, own) and (case.law, case.other) == (law, other) for case in done):
            continue
        source = rule.uses[0].source if rule.uses else None
        done.append(_Case(label, names, own, law, family_of(block, family), source, other))
    for case in done:
        part = f"{label} {plain(slice_text(case.block))}" if len(done) > 1 else label
        yield replace(case, weight=part)


def _ratios(one: object, rule: WeightRule) -> list[sympy.Expr]:
    """The multiplier of every use over that of the first."""
    if isinstance(one, Parametrization):
        given = next((one.ties[name] for name in rule.names if name in one.ties), ())
        if len(given) == len(rule.uses):
            return list(given)
    own = next((other for other in one if set(other.names) & set(rule.names)), rule) if isinstance(one, ScalingTable) else rule
    uses = own.uses if len(own.uses) == len(rule.uses) else rule.uses
    return [use.multiplier / uses[0].multiplier for use in uses]


def _ties(case: _Case, rule: WeightRule, ratios: list[sympy.Expr], others: list[sympy.Expr]) -> Iterator[_Case]:
    """The further uses of a tied weight that are other maps than its blocks, or have another multiplier."""
    if case.block.axes != rule.blocks[0].axes:
        return
    for use, ratio, other in zip(rule.uses[1:], ratios[1:], others[1:], strict=True):
        if ratio == other == 1 and any(_fans(use) == _fans(block) for block in rule.blocks):
            continue
        update = {"fan_in": use.fan_in, "fan_out": use.fan_out, "copies": use.copies, "lookup": use.lookup, "target": use.target}
        law = case.law.model_copy(update={"multiplier": case.law.multiplier * ratio})
        block = case.block.model_copy(update={**update, "multiplier": law.multiplier})
        label = f"{case.weight}, tied, at {operator_name(use.operator)}"
        yield replace(case, weight=label, block=block, law=law, source=use.source, later=True, tie=ratio, other_tie=other)


def _fans(use: Use | Block) -> tuple:
    return use.fan_in, use.fan_out, use.copies, use.lookup


# --- obligations --------------------------------------------------------------------------------------------------------------------


def _decided(case: _Case, name: str, lhs: sympy.Expr, rhs: sympy.Expr, cure: str = "") -> Obligation:
    """An obligation lhs ≍ rhs: proven iff the ratio tends to a constant."""
    lhs, rhs = exact(str(lhs)), exact(str(rhs))  # as JSON will give them back
    if lhs == 0 or rhs == 0:
        excess, by = (ZERO, "both are 0") if lhs == rhs else (-INFINITY if lhs == 0 else INFINITY, "one side is 0")
    else:
        constant, excess = leading(lhs / rhs)
        by = f"ratio → {formula(constant)}" if excess == 0 else f"ratio ~ {formula(constant * WIDTH**excess)}"
    return _obligation(case, name, lhs, rhs, excess, by, cure if excess != 0 else "")


def _obligation(
    case: _Case, name: str, lhs: sympy.Expr | None, rhs: sympy.Expr | None, excess: sympy.Expr, by: str, cure: str = ""
) -> Obligation:
    return Obligation(
        name=name,
        weight=case.weight,
        statement=STATEMENTS[name].text,
        lhs=lhs,
        rhs=rhs,
        proven=bool(excess == 0),
        by=by,
        excess=excess,
        names=case.names,
        where=case.where,
        cure=cure,
    )


def _init_norm(case: _Case) -> sympy.Expr:
    """‖m·W‖₂ of Gaussian entries: m·σ·(√fan_in + √fan_out)."""
    assert case.law.init_std is not None
    return case.law.multiplier * case.law.init_std * (sympy.sqrt(case.block.fan_in) + sympy.sqrt(case.block.fan_out))


def _target(block: Block) -> sympy.Expr:
    """(s_y/s_x)·√(fan_out/fan_in)."""
    return optimizers.spectral_norm(block) * block.multiplier


def _spectral(case: _Case, r: sympy.Expr) -> Iterator[Obligation]:
    """What muP asks of a map (THEORY 3.4, 1-5); r is of the regime, for the wording of cures."""
    excess = _excess(case)
    cures = dict(_cures(case, excess, r))
    target, law, block = _target(case.block), case.law, case.block
    if law.init_std is None or law.init_std == 0:
        by = "starts at zero, which satisfies every variance rule (Yang et al. 2022, arXiv 2203.03466, App. D.2)"
        yield _obligation(case, "init", None, None, ZERO, by)
    else:
        yield _decided(case, "init", _init_norm(case), target, cures.get("init", ""))
    yield _decided(case, "update", case.optimizer.update(law, block), target * block.share, cures.get("update", ""))
    if case.later:
        return
    if block.role == "hidden":
        yield _obligation(case, "mean", ZERO, ZERO, ZERO, "by definition: the law draws W from N(0, σ²)")
    if case.family in WITH_EPSILON:
        yield _decided(case, "epsilon", law.eps, optimizers.epsilon(block), cures.get("epsilon", ""))
    if case.family in CLIPPING:
        yield _decided(case, "clip", law.clip * gradient_norm(block), ONE, cures.get("clip", ""))
    yield _decided(case, "decay", law.lr * law.weight_decay, ONE, cures.get("decay", ""))


def _same(case: _Case) -> Iterator[Obligation]:
    """What equivalence to another parametrization asks: the gauge invariants agree (THEORY 3.4)."""
    law, other = case.law, case.other
    assert other is not None
    if case.later:
        yield _decided(case, "same tie", case.tie, case.other_tie, _missing("multiplier", case.tie, case.other_tie))
        return
    if law.init_std is None or other.init_std is None:
        zero = law.init_std is other.init_std
        by = "both start at zero" if zero else "one starts at zero, the other does not"
        yield _obligation(case, "same init", None, None, ZERO if zero else INFINITY, by, "" if zero else by)
    else:
        sides = law.multiplier * law.init_std, other.multiplier * other.init_std
        yield _decided(case, "same init", *sides, _missing("multiplier·init_std", *sides))
    if case.optimizer.relative:
        sigma = law.init_std or ONE, other.init_std or ONE
        sides = law.multiplier * sigma[0] * law.lr, other.multiplier * sigma[1] * other.lr
        yield _decided(case, "same relative update", *sides, _missing("multiplier·init_std·lr", *sides))
    else:
        power = case.optimizer.shift
        sides = law.multiplier**power * law.lr, other.multiplier**power * other.lr
        yield _decided(case, "same update", *sides, _missing("lr·multiplier^(1+p)", *sides))
    if case.family in WITH_EPSILON:
        sides = law.eps / law.multiplier, other.eps / other.multiplier
        yield _decided(case, "same epsilon", *sides, _missing("ε/multiplier", *sides))
    if case.family in CLIPPING:
        sides = law.multiplier * law.clip, other.multiplier * other.clip
        yield _decided(case, "same clip", *sides, _missing("multiplier·clip", *sides))
    sides = law.lr * law.weight_decay, other.lr * other.weight_decay
    yield _decided(case, "same decay", *sides, _missing("lr·weight decay", *sides))


def _missing(what: str, has: sympy.Expr, wanted: sympy.Expr) -> str:
    if has == 0 or wanted == 0:
        return f"{what} is {formula(has)}, the other's is {formula(wanted)}"
    return f"{what} is {_too(leading(has / wanted)[1])}: it follows {_follows(has)}, the other's {_follows(wanted)}"


# --- the regime ---------------------------------------------------------------------------------------------------------------------


def _excess(case: _Case) -> Excess:
    """By how much a map exceeds muP at init and in a step; -∞ where it starts at zero."""
    target = _target(case.block)
    init = -INFINITY if order(case.law.init_std) == -INFINITY else leading(_init_norm(case) / target)[1]
    update = case.optimizer.update(case.law, case.block)
    return Excess(init, order(update / target), case.optimizer.degree)


def _regime(table: ScalingTable, cases: list[_Case], products: list[sympy.Expr]) -> Regime:
    """The regime of the subject. Every map from a growing to a finite number of coordinates counts as a readout.

    A gain or bias may start anywhere below its size in muP, and a layer before the last may start at zero (in a residual branch):
    neither keeps activations from being of order 1. A weight that a product's factor is folded into may hand on more than its share: what
    counts is how much of its own size it moves, and how large the product is.
    """
    inner, readouts, finite, factors = [], [], [], []
    beside = _beside_readouts(table)
    for case in cases:
        excess = _excess(case)
        if case.block.target != 1:
            factors.append(excess._replace(init=ZERO, update=excess.update - max(excess.init, ZERO)))
        elif case.block.role == "output":
            readouts.append(excess)
        elif case.block.role == "scalar" and (excess.update <= 0 or set(case.names) & beside):
            finite.append(excess)
        elif excess.init == -INFINITY or (case.block.role in {"vector", "scalar"} and excess.init < 0):
            inner.append(excess._replace(init=ZERO))
        else:
            inner.append(excess)
    return regime_of(inner, readouts, products, finite, factors)


def _beside_readouts(table: ScalingTable) -> set[str]:
    """The weights that have an axis in common with the outputs of a readout: its bias."""
    outputs = {
        (rule.name, axis)
        for rule in table
        if rule.blocks[0].role == "output"
        for axis, factors in enumerate(rule.blocks[0].axes)
        if any(factor.part == "out" for factor in factors)
    }
    return {name for one in table.classes if outputs & set(one.where) for name, _ in one.where}


# --- cures --------------------------------------------------------------------------------------------------------------------------


def _cures(case: _Case, excess: Excess, r: sympy.Expr) -> Iterator[tuple[str, str]]:
    """For each obligation that fails: what is missing and what it does."""
    block, law, (init, update, _) = case.block, case.law, excess
    moves = init > -INFINITY and update > -INFINITY and not case.optimizer.relative
    if moves and init != 0 and update == case.optimizer.shift * init:
        name = "readout multiplier" if block.role == "output" else "multiplier"
        factor, state = WIDTH ** -abs(init), "missing" if init > 0 else "too much"
        line = f"{name} {_follows(factor)} {state}: {_effect(case, init, update, r)}"
        yield from (("init", line), ("update", line))
    else:
        if init not in {0, -INFINITY}:
            wanted = _follows(law.init_std * WIDTH**-init)
            yield "init", f"init_std is {_too(init)}, it should follow {wanted}: {_effect(case, init, None, r)}"
        if update == -INFINITY:
            yield "update", "lr is 0: it never moves"
        elif update != 0:
            wanted = _follows(law.lr * WIDTH**-update)
            yield "update", f"{case.family} lr is {_too(update)}, it should follow {wanted}: {_effect(case, None, update, r)}"
    if law.eps != 0:
        small = leading(law.eps / optimizers.epsilon(block))[1]
        effect = (
            "drowns the gradient, and steps shrink" if small > 0 else "falls behind the gradient, which is harmless until it underflows"
        )
        yield "epsilon", f"ε is {_too(small)}, it should follow {_follows(optimizers.epsilon(block))}: as d grows it {effect}"
    if law.clip != 0:
        large = leading(law.clip * gradient_norm(block))[1]
        effect = "every singular value is clipped, which is msign" if large > 0 else "none is clipped, and steps shrink with the gradient"
        yield "clip", f"SVC's λ is {_too(large)}, it should follow {_follows(1 / gradient_norm(block))}: as d grows {effect}"
    decayed = law.lr * law.weight_decay
    if decayed != 0:
        power = leading(decayed)[1]
        effect = f"the fraction decayed per step follows {_follows(decayed)}"
        yield "decay", f"weight decay is {_too(power)}, it should follow {_follows(1 / law.lr)} as 1/lr does: {effect}"


def _effect(case: _Case, init: sympy.Expr | None, update: sympy.Expr | None, r: sympy.Expr) -> str:
    """What the excesses (None: not at fault) do to what comes out of the map: at init a sum of random terms, afterwards an aligned one."""
    output = case.block.role == "output"
    what = "logits" if output else "its outputs"
    start = ZERO if init is None else init
    if output:
        start = max(start - HALF, ZERO)  # muP's own logits vanish as d^(-1/2) at init
    through = init - max(r, ZERO) if init is not None and output else None
    step = max((power for power in (update, through) if power is not None), default=ZERO)
    if start == step != 0:
        return f"{what} {_grow(step)} at init and after one step"
    said = [f"{_grow(start)} at init"] if start != 0 else []
    said += [f"{_grow(step)} after one step" if step > 0 else f"move by {_power(step)} in a step"] if step != 0 else []
    return f"{what} {' and '.join(said) or 'are not of the size they have in muP'}"


def _grow(power: sympy.Expr) -> str:
    return f"{'grow' if power > 0 else 'vanish'} as {_power(power)}"


def _power(power: sympy.Expr) -> str:
    """A power of d as d^(1/2), d, d^(-1)."""
    return "d" if power == 1 else f"d^{power}" if power.is_Integer and power > 0 else f"d^({power})"


def _too(power: sympy.Expr) -> str:
    return f"{_power(abs(power))} too {'large' if power > 0 else 'small'}"


def _follows(value: sympy.Expr) -> str:
    return formula(WIDTH ** leading(value)[1])


# --- what is not a weight -----------------------------------------------------------------------------------------------------------


def _alike(contractions: Iterable[Contraction]) -> list[list[Contraction]]:
    groups: dict[object, list[Contraction]] = {}
    for one in contractions:
        key = (one.operator, one.source.file, one.source.line, one.dim, one.present, tuple(map(template, one.folded)))
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _product(group: list[Contraction], table: ScalingTable, laws: dict[str, tuple[Law, ...]], family: str) -> tuple[Obligation, sympy.Expr]:
    """A product of two trained activations over a growing axis has the factor 1/dim, in the forward or in a weight upstream.

    Yang et al. 2022, arXiv 2203.03466, definition 4.1. Returns the obligation, and how much larger than in muP the product is.
    """
    first = group[0]
    name = f"{operator_name(first.operator)} over {formula(first.dim)}"
    carrier = _carrier(first, table, laws, family)
    at_init = carrier is not None and order(carrier.law.init_std) > -INFINITY
    carried = _init_norm(carrier) / _target(_unfolded(carrier.block)) if carrier is not None and at_init else ONE
    if carrier is not None and not at_init:
        carried = carrier.block.target
    factors = 2 if first.both else 1
    lhs, rhs = first.present * carried**factors, 1 / first.dim
    constant, excess = leading(lhs / rhs)
    place = f"in the init and learning rate of {first.folded[0]}" if first.folded else "multiply by it in the forward"
    missing = f"the factor {formula(first.carried)} is missing ({place})"
    obligation = Obligation(
        name="contraction",
        weight=name,
        statement=STATEMENTS["contraction"].text,
        lhs=lhs,
        rhs=rhs,
        proven=bool(excess == 0),
        by=f"ratio → {formula(constant)}" if excess == 0 else f"ratio ~ {formula(constant * WIDTH**excess)}",
        excess=excess,
        names=tuple(dict.fromkeys(weight for one in group for weight in one.folded)),
        where=f"{PurePath(first.source.file).name}:{first.source.line}",
        cure=f"{missing}: its sums are {_too(excess)} once the two align" if excess != 0 else "",
    )
    if carrier is None:
        return obligation, excess
    begins, moves, _ = _excess(carrier)
    return obligation, leading(first.present * carrier.block.target**factors * first.dim)[1] + factors * max(begins, moves)


def _carrier(contraction: Contraction, table: ScalingTable, laws: dict[str, tuple[Law, ...]], family: str) -> _Case | None:
    """The map that carries what the forward does not."""
    for name in contraction.folded:
        for block, law in zip(table[name].blocks, laws[table[name].name], strict=True):
            if block.target != 1:
                own = block.model_copy(update={"multiplier": law.multiplier})
                return _Case(name, (name,), own, law, family_of(block, family), None)
    return None


def _unfolded(block: Block) -> Block:
    return block.model_copy(update={"target": ONE})


def _unreached(name: str) -> Obligation:
    cure = "no rule reaches it: pass inputs to derive() that make the model use it, or freeze it"
    statement = STATEMENTS["coverage"].text
    return Obligation(
        name="coverage",
        weight=name,
        statement=statement,
        lhs=None,
        rhs=None,
        proven=False,
        by="no use in the graph",
        names=(name,),
        cure=cure,
    )
