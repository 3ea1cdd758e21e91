"""PARAMETRIZATIONS: what published parametrizations prescribe for a block of a weight; and the gauge, which moves multipliers about.

A parametrization is (multiplier, init_std, lr) per weight (Yang & Hu 2021, arXiv 2011.14522: abc). Two of them that differ by a gauge,
multiplier·θ with init_std/θ and a learning rate to match, take the same steps at every finite width (Yang et al. 2022,
arXiv 2203.03466, lemma J.1). What the gauge leaves alone, `invariants`, is what decides whether two parametrizations are equivalent.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import sympy

from scaling import optimizers
from scaling.errors import ScalingError, UnknownName
from scaling.limits import exact, exponent
from scaling.notation import formula
from scaling.optimizers import Map
from scaling.records import Block, Law, Parametrization, ScalingTable, WeightRule

__all__ = [
    "CLASSES",
    "GAUGES",
    "PARAMETRIZATIONS",
    "Invariants",
    "OptimizerClass",
    "class_of",
    "family_of",
    "gauge",
    "invariants",
    "order",
    "parametrization",
    "shifted",
]

ONE = sympy.Integer(1)
HALF: sympy.Expr = sympy.Rational(1, 2)
INFINITY = sympy.oo


# --- optimizer classes --------------------------------------------------------------------------------------------------------------


class OptimizerClass(NamedTuple):
    """What the counting needs of an optimizer: how large its update U of a weight is, and how it answers to a rescaled gradient.

    `norm` is ‖U‖₂ of a map at the gradient of `gradient_norm`, for entries of standard deviation σ, and `says` the same in words.
    `degree` is the p of U(cG) = c^p·U(G). `relative`: U is proportional to ‖W‖ as well.
    """

    says: str
    norm: Callable[[Map, sympy.Expr], sympy.Expr]
    degree: sympy.Expr
    relative: bool = False

    @property
    def shift(self) -> sympy.Expr:
        """The power of 1/θ that the learning rate gets when the multiplier gets θ."""
        return sympy.Integer(0) if self.relative else 1 + self.degree

    def update(self, law: Law, use: Map) -> sympy.Expr:
        """‖m·ΔW‖₂ after a step from a gradient of the size muP has."""
        sigma = law.init_std if law.init_std is not None else optimizers.init_std(use)
        return law.multiplier * law.lr * self.norm(use, sigma)

    def rate(self, use: Map, sigma: sympy.Expr) -> sympy.Expr:
        """The learning rate that solves m·η·‖U‖₂ = (s_y/s_x)·√(fan_out/fan_in), of which a weight in a residual branch has a share."""
        return optimizers.update_norm(use) / self.norm(use, sigma)


def gradient_norm(use: Map) -> sympy.Expr:
    """‖G‖₂ ≍ m·(s_x/s_y)·√(fan_in/fan_out), of which each of `copies` maps sees its share (THEORY 1.4; arXiv 2310.17813, §4)."""
    scale = use.multiplier * use.input_scale / (use.target * use.branch)
    return scale * sympy.sqrt(use.fan_in / use.fan_out) / use.copies * use.gradient


def shampoo(inverse: sympy.Expr) -> OptimizerClass:
    """L^-e·G·R^-e with 2e = `inverse`, which makes ‖U‖₂ = ‖G‖₂^(1 - 2·inverse); 1/2 is Gupta et al. 2018, arXiv 1802.09568."""
    degree = 1 - 2 * inverse
    says = f"U = L^-e·G·R^-e with 2e = {inverse}: ‖U‖₂ ≍ ‖G‖₂^({degree}), ‖G‖₂ ≍ m·(s_x/s_y)·√(fan_in/fan_out)/copies"
    return OptimizerClass(says, lambda use, sigma: gradient_norm(use) ** degree, degree)


GRADIENT = OptimizerClass(
    "U = G, of low rank: ‖U‖₂ ≍ m·(s_x/s_y)·√(fan_in/fan_out)/copies", lambda use, sigma: gradient_norm(use), sympy.Integer(1)
)
SIGN = OptimizerClass(
    "U sign-like, of low rank: ‖U‖₂ ≍ √(fan_in·fan_out)", lambda use, sigma: sympy.sqrt(use.fan_in * use.fan_out), sympy.Integer(0)
)
UNIT = OptimizerClass("U has spectral norm 1", lambda use, sigma: ONE, sympy.Integer(0))
RELATIVE = OptimizerClass(
    "U has the norm of W and is of low rank: ‖U‖₂ ≍ σ·√(fan_in·fan_out)",
    lambda use, sigma: sigma * sympy.sqrt(use.fan_in * use.fan_out),
    sympy.Integer(0),
    relative=True,
)

CLASSES: dict[str, OptimizerClass] = {
    **dict.fromkeys(("sgd", "momentum"), GRADIENT),
    **dict.fromkeys(("adam", "adamw", "sign", "lion"), SIGN),
    **dict.fromkeys(("muon", "msign", "sn", "svc", "adam-msign", "adam-sn"), UNIT),
    "shampoo": shampoo(HALF),
    **dict.fromkeys(("adafactor", "lars", "lamb"), RELATIVE),
}
"""Optimizer -> its class. "adafactor" is the one with parameter scaling (THEORY 1.4); without, it is "adam"."""

ADAPTIVE = {name for name, found in CLASSES.items() if found is SIGN} - {"sign", "lion"}
"""The optimizers that have an ε."""


def class_of(family: str) -> OptimizerClass:
    """The class of an optimizer.

    Raises:
        UnknownName: if it is in no class.
    """
    if family not in CLASSES:
        raise UnknownName("optimizer", family, CLASSES)
    return CLASSES[family]


def family_of(block: Block, family: str) -> str:
    """The optimizer that updates a block: "muon+adam" is Muon where both fans grow and Adam elsewhere.

    Raises:
        UnknownName: if there is no such optimizer.
    """
    matrices, _, rest = family.partition("+")
    for name in (matrices, rest or matrices):
        class_of(name)
    return matrices if not rest or block.role == "hidden" else rest


# --- published parametrizations -----------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a published table: formulas in fan_in and fan_out, where the fan_out of a gain or bias is its dimension."""

    multiplier: str
    init_std: str
    sgd: str
    adam: str


TABLES: dict[str, dict[str, Column]] = {
    "table3": {
        "input": Column("1", "1/sqrt(fan_in)", "fan_out", "1"),
        "hidden": Column("1", "1/sqrt(fan_in)", "1", "1/fan_in"),
        "output": Column("1", "1/fan_in", "1/fan_in", "1/fan_in"),
    },
    "table8": {
        "input": Column("1", "1/sqrt(fan_in)", "fan_out", "1"),
        "hidden": Column("1", "1/sqrt(fan_in)", "1", "1/fan_in"),
        "output": Column("1/fan_in", "1", "fan_in", "1"),
    },
    "table9": {
        "input": Column("sqrt(fan_out)", "1/sqrt(fan_out)", "1", "1/sqrt(fan_out)"),
        "hidden": Column("1", "1/sqrt(fan_in)", "1", "1/fan_in"),
        "output": Column("1/sqrt(fan_in)", "1/sqrt(fan_in)", "1", "1/sqrt(fan_in)"),
    },
    "u-mup": {
        "input": Column("1/sqrt(fan_in)", "1", "fan_out*fan_in", "sqrt(fan_in)"),
        "hidden": Column("1/sqrt(fan_in)", "1", "fan_in", "1/sqrt(fan_in)"),
        "output": Column("1/fan_in", "1", "fan_in", "1"),
    },
    "standard": dict.fromkeys(("input", "hidden", "output"), Column("1", "1/sqrt(fan_in)", "1", "1")),
    "ntk": {
        "input": Column("1/sqrt(fan_in)", "1", "1", "1/sqrt(fan_out)"),
        "hidden": Column("1/sqrt(fan_in)", "1", "1", "1/fan_in"),
        "output": Column("1/sqrt(fan_in)", "1", "1", "1/sqrt(fan_in)"),
    },
    "mean-field": {
        "input": Column("1/sqrt(fan_in)", "1", "fan_out", "1"),
        "hidden": Column("1/fan_in", "1", "fan_out", "1"),
        "output": Column("1/fan_in", "1", "fan_in", "1"),
    },
}
"""Parametrization -> column -> formulas.

Tables 3, 8, 9: Yang et al. 2022, arXiv 2203.03466. u-mup: the muP-equivalent one of arXiv 2407.17465 (its own embedding lr is 1/√fan_out).
standard: torch's fan_in init at one lr. ntk: Yang & Hu 2021, arXiv 2011.14522, table 1; Adam: Yang & Littwin 2023, arXiv 2308.01814, 2.2.
mean-field: sums over width are means at every layer (arXiv 2011.14522, table 1, which has one hidden layer: there, with no hidden
matrix, it is muP).
"""

COLUMNS = {"input": "input", "embedding": "input", "vector": "input", "hidden": "hidden", "output": "output"}
FINITE = Column("1", "1/sqrt(fan_in)", "1", "1")
"""Role -> column; a weight with no growing axis is "scalar-like" (arXiv 2203.03466, App. B): everything is constant."""


def _value(text: str, block: Block) -> sympy.Expr:
    """A column's formula for a block."""
    fans = {"fan_in": block.fan_in, "fan_out": block.copies * block.fan_out}
    return exact(text).subs({sympy.Symbol(name, positive=True): fan for name, fan in fans.items()})


def _published(name: str, block: Block, family: str) -> Law:
    """The law a table of `TABLES` has; a rate for optimizers that the table does not have is solved for."""
    column = TABLES[name][COLUMNS[block.role]] if block.role in COLUMNS else FINITE
    plain = _plain(block, _value(column.multiplier, block))
    sigma = _value(column.init_std, block)
    found = class_of(family)
    if found is GRADIENT or found is SIGN:
        lr = _value(column.sgd if found is GRADIENT else column.adam, block)
    else:
        lr = ONE if name == "standard" else found.rate(plain, sigma)
    eps, clip = optimizers.epsilon(plain), 1 / gradient_norm(plain)
    return Law(multiplier=plain.multiplier, init_std=sigma, lr=lr, eps=eps, weight_decay=1 / lr, clip=clip)


def _plain(block: Block, multiplier: sympy.Expr) -> Block:
    ones = dict.fromkeys(("input_scale", "target", "branch", "gradient", "share"), ONE)
    return block.model_copy(update={**ones, "multiplier": multiplier})


def _folding(name: str, block: Block, family: str) -> Law:
    """A table that is muP: what a contraction or a branch folds into a weight comes on top, by the gauge (THEORY 1.7), then depth."""
    law = _published(name, block, family)
    moved = shifted(law, block.input_scale / (block.target * block.branch), family)
    lr = moved.lr * block.share / block.gradient ** class_of(family).degree
    gradient = {"eps": moved.eps * block.gradient, "clip": moved.clip / block.gradient}
    return moved.model_copy(update={"multiplier": law.multiplier, "lr": lr, "weight_decay": 1 / lr, **gradient})


def spectral(block: Block, family: str) -> Law:
    """The scaling table's own formulas (Su 2025; Yang et al. 2023, arXiv 2310.17813)."""
    lr = block.lr[family] if family in block.lr else class_of(family).rate(block, block.init_std)
    clip = 1 / gradient_norm(block)
    return Law(multiplier=block.multiplier, init_std=block.init_std, lr=lr, eps=block.eps, weight_decay=1 / lr, clip=clip)


def standard(block: Block, family: str) -> Law:
    """Torch's habit: σ = 1/√fan_in, and one lr, ε and λ for all weights."""
    return _published("standard", block, family).model_copy(update={"eps": ONE, "weight_decay": ONE, "clip": ONE})


def ntk(block: Block, family: str) -> Law:
    """The neural tangent kernel's, UP_{1/2} in another gauge."""
    law = _published("ntk", block, family)
    lr = law.lr if class_of(family) in (GRADIENT, SIGN) else _slowed(law.lr, block, family, HALF)
    return law.model_copy(update={"lr": lr, "weight_decay": 1 / lr, "eps": _kernel_epsilon(block, law, HALF)})


def unchanged_gap(block: Block, family: str, s: sympy.Expr) -> Law:
    """UP_s: every layer but the last moves d^-s of what muP moves it; the last starts d^s larger (arXiv 2308.01814, remark 2.8.25).

    UP_0 is muP, UP_{1/2} the kernel limit.
    """
    law = _folding("table3", block, family)
    if block.role == "output":
        lr = law.lr / block.fan_in**s if class_of(family).relative else law.lr
        law = law.model_copy(update={"init_std": law.init_std * block.fan_in**s, "lr": lr, "weight_decay": 1 / lr})
    elif block.role != "scalar":
        lr = _slowed(law.lr, block, family, s)
        law = law.model_copy(update={"lr": lr, "weight_decay": 1 / lr})
    return law.model_copy(update={"eps": law.eps * (block.copies * block.fan_out) ** s})


def _slowed(lr: sympy.Expr, block: Block, family: str, s: sympy.Expr) -> sympy.Expr:
    """The rate of a layer before the last; the readout's larger init has made its gradients d^s larger already."""
    if block.role in {"output", "scalar"}:
        return lr
    return lr * (block.copies * block.fan_out) ** (-s * (1 + class_of(family).degree))


def _kernel_epsilon(block: Block, law: Law, s: sympy.Expr) -> sympy.Expr:
    """ε as the gradient's entries, m·(copies·fan_out)^(s - 1), where the readout starts d^s larger (arXiv 2308.01814, eq. 2.26)."""
    return law.multiplier * (block.copies * block.fan_out) ** (s - 1)


PARAMETRIZATIONS: dict[str, Callable[..., Law]] = {
    "spectral": spectral,
    "table3": lambda block, family: _folding("table3", block, family),
    "table8": lambda block, family: _folding("table8", block, family),
    "table9": lambda block, family: _folding("table9", block, family),
    "u-mup": lambda block, family: _folding("u-mup", block, family),
    "standard": standard,
    "ntk": ntk,
    "mean-field": lambda block, family: _published("mean-field", block, family),
    "up": unchanged_gap,
}
"""Name -> the law it has for a block under an optimizer. A new parametrization is one line here."""


def _law(name: str, block: Any, family: str, options: tuple[tuple[str, sympy.Expr], ...]) -> Law:
    return _cached_law(name, block, family, options)


@cache
def _cached_law(name: str, block: Block, family: str, options: tuple[tuple[str, sympy.Expr], ...]) -> Law:
    return PARAMETRIZATIONS[name](block, family_of(block, family), **dict(options))


def parametrization(table: ScalingTable, name: str, family: str = "adam", *, s: object = None) -> Parametrization:
    """A published parametrization of a table's model: per weight one law for each of the table's blocks.

    Args:
        table: of the model; only the blocks' fans and their limits are used, no name and no type of a module.
        name: of `PARAMETRIZATIONS`.
        family: an optimizer of `CLASSES`; "muon+adam" is the first where both fans grow and the second elsewhere.
        s: of "up": a rational in [0, 1/2].

    Raises:
        UnknownName: for an unknown name or optimizer.
        ScalingError: if s is missing, out of range, or given to another parametrization.

    >>> from scaling.records import Coverage
    >>> parametrization(ScalingTable(size=64, rules=(), coverage=Coverage(trainable=0, reached=0)), "table9", "sgd").laws
    {}
    """
    if name not in PARAMETRIZATIONS:
        raise UnknownName("parametrization", name, PARAMETRIZATIONS)
    options = _options(name, s)
    laws = {rule.name: tuple(_law(name, block, family, options) for block in rule.blocks) for rule in table}
    ties = {} if name in FOLLOW_TIES else {rule.name: _ratios(name, rule, family, options) for rule in table if len(rule.uses) > 1}
    return Parametrization(name=name if s is None else f"UP_{options[0][1]}", family=family, laws=laws, ties=ties)


FOLLOW_TIES = ("spectral", "table3", "table8", "table9", "u-mup")
"""The parametrizations that want of a tied weight what the table wants; the others want at each use what they want of such a map."""


def _ratios(name: str, rule: WeightRule, family: str, options: tuple[tuple[str, sympy.Expr], ...]) -> tuple[sympy.Expr, ...]:
    """The multipliers of a tied weight's uses over the first: 1 for torch's habit, else as m·σ of the parametrization asks."""
    if name == "standard":
        return (ONE,) * len(rule.uses)
    fans = ({"fan_in": use.fan_in, "fan_out": use.fan_out, "copies": use.copies, "lookup": use.lookup} for use in rule.uses)
    laws = [_law(name, rule.blocks[0].model_copy(update=update), family, options) for update in fans]
    scales = [law.multiplier * law.init_std for law in laws if law.init_std is not None]
    return tuple(scale / scales[0] for scale in scales)


def _options(name: str, s: object) -> tuple[tuple[str, sympy.Expr], ...]:
    if (name == "up") != (s is not None):
        what = "needs s, a rational in [0, 1/2]" if name == "up" else "takes no s"
        message = f"parametrization {name!r} {what}: parametrization(table, 'up', s='1/4')"
        raise ScalingError(message)
    if s is None:
        return ()
    value = exact(s)
    if not (value.is_Rational and 0 <= value <= sympy.Rational(1, 2)):
        message = f"s={s!r} is not a rational in [0, 1/2] (Yang & Littwin 2023, arXiv 2308.01814, remark 2.8.25)"
        raise ScalingError(message)
    return (("s", value),)


# --- the gauge ----------------------------------------------------------------------------------------------------------------------

DECAYS: dict[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    "coupled": lambda theta, rates: rates,
    "independent": lambda theta, rates: ONE,
    "l2": lambda theta, rates: theta**2,
}
"""How the decay enters a step -> the factor on λ, from θ and η_old/η_new: W - η·λ·W; W - λ·W; λ·W added to the gradient."""


def shifted(law: Law, theta: sympy.Expr, family: str | sympy.Rational = "adam", decay: str = "coupled") -> Law:
    """The same dynamics, at every width and step, with the multiplier times θ: the abc shift.

    m·θ, σ/θ, η/θ^(1+p), ε·θ, and λ·η_old/η_new (Yang et al. 2022, arXiv 2203.03466, lemma J.1; Yang & Hu 2021, arXiv 2011.14522, eq. 5).
    The scale that SVC puts on its gradient's singular values goes with 1/θ, like σ.

    Args:
        law: the law before.
        theta: exact, positive.
        family: an optimizer of `CLASSES`, or the degree p itself (Shampoo with total inverse exponent E has p = 1 - 2E).
        decay: "coupled", "independent" or "l2".

    Raises:
        UnknownName: for an unknown optimizer or decay.

    >>> shifted(Law(init_std=ONE, lr=ONE), sympy.Integer(4), "sgd")
    Law(multiplier=4, init_std=1/4, lr=1/16, eps=4, weight_decay=16, clip=1/4)
    """
    if decay not in DECAYS:
        raise UnknownName("kind of weight decay", decay, DECAYS)
    rates = theta ** (class_of(family).shift if isinstance(family, str) else 1 + family)
    return Law(
        multiplier=law.multiplier * theta,
        init_std=None if law.init_std is None else law.init_std / theta,
        lr=law.lr / rates,
        eps=law.eps * theta,
        weight_decay=law.weight_decay * DECAYS[decay](theta, rates),
        clip=law.clip / theta,
    )


class Invariants(NamedTuple):
    """What no gauge changes, as powers of 1/d (multiplier d^-a, init_std d^-b, lr d^-c, ε d^-e, λ d^-l).

    `init` is a + b (∞ where the weight starts at zero), `update` (1 + p)·a + c, or a + b + c for an optimizer whose steps are relative
    to the weight, `epsilon` e - a and `decay` c + l.
    """

    init: sympy.Expr
    update: sympy.Expr
    epsilon: sympy.Expr
    decay: sympy.Expr


def order(value: sympy.Expr | None) -> sympy.Expr:
    """The power of d that a quantity follows; -∞ for zero, or where there is none."""
    return -INFINITY if value is None or value == 0 else exponent(value)


def invariants(law: Law, family: str) -> Invariants:
    """The gauge invariants of a law, exact (Yang & Hu 2021, arXiv 2011.14522, §3; Yang & Littwin 2023, arXiv 2308.01814, §2.2).

    Raises:
        UnknownName: for an unknown optimizer.

    >>> d = sympy.Symbol("d", positive=True)
    >>> invariants(Law(multiplier=1 / d, init_std=ONE, lr=d, eps=1 / d, weight_decay=1 / d), "sgd")
    Invariants(init=1, update=1, epsilon=0, decay=0)
    """
    found = class_of(family)
    a, b, c = -order(law.multiplier), -order(law.init_std), -order(law.lr)
    update = a + b + c if found.relative else (1 + found.degree) * a + c
    return Invariants(a + b, update, -order(law.eps) - a, c - order(law.weight_decay))


GAUGES = ("table3", "table8", "table9", "u-mup")
"""The parametrizations whose multipliers `gauge` knows."""


def gauge(table: ScalingTable, to: str | Mapping[str, object]) -> ScalingTable:
    """The same dynamics with the forward multipliers elsewhere: every weight's rules are shifted to match.

    The uses of a tied weight keep the ratio of their multipliers (so "table9" makes an embedding tied to the readout √d and 1/√d).
    Gains, biases and tables that are added are left as they are by the named gauges: no module applies them linearly, and every gauge
    is as good. So is a weight whose blocks would need different multipliers; its notes say so. No gauge moves a weight that the model
    divides by its own norm: its init makes up for no multiplier.

    Args:
        table: the table; it is not changed.
        to: a name of `GAUGES`, or `{weight pattern: multiplier}` with the multiplier that the (first use of the) weight shall have, in d;
            of two patterns that match a weight the later one counts, and weights that no pattern matches stay as they are.

    Returns:
        A new table, equivalent for every optimizer.

    Raises:
        UnknownName: for an unknown name, or a pattern that matches no weight.
        ScalingError: for a multiplier that is not positive.
    """
    if isinstance(to, str):
        if to not in GAUGES:
            raise UnknownName("gauge", to, GAUGES)
        rules = [_named(rule, to) for rule in table]
    else:
        rules = _chosen(table, {pattern: _positive(pattern, value) for pattern, value in to.items()})
    kept = {name: getattr(table, name) for name in ScalingTable.model_fields if name != "rules"}
    new = ScalingTable(rules=tuple(rules), **kept)
    new._trace = table._trace
    return new


def _positive(pattern: str, value: object) -> sympy.Expr:
    multiplier = exact(value)
    if not multiplier.is_positive:
        message = f"the multiplier {value!r} for {pattern!r} is not positive\n  write it in d: table.gauge({{{pattern!r}: '1/d'}})"
        raise ScalingError(message)
    return multiplier


def _chosen(table: ScalingTable, multipliers: dict[str, sympy.Expr]) -> list[WeightRule]:
    wanted: dict[str, sympy.Expr] = {}
    for pattern, multiplier in multipliers.items():
        matched = [rule.name for rule in table if any(fnmatch.fnmatchcase(name, pattern) for name in rule.names)]
        if not matched:
            raise UnknownName("weight pattern", pattern, [rule.name for rule in table])
        wanted |= dict.fromkeys(matched, multiplier)
    return [_moved(rule, wanted[rule.name]) if rule.name in wanted else rule for rule in table]


def _named(rule: WeightRule, to: str) -> WeightRule:
    if not all(_applied_by_a_module(rule, block) for block in rule.blocks):
        return rule
    wanted = list(dict.fromkeys(_law(to, block, "adam", ()).multiplier for block in rule.blocks))
    if len(wanted) == 1:
        return _moved(rule, wanted[0])
    note = f"keeps its multiplier: in the gauge {to} its blocks would need {' and '.join(map(formula, wanted))}, and one weight has one"
    return rule.model_copy(update={"notes": (*rule.notes, note)})


def _applied_by_a_module(rule: WeightRule, block: Block) -> bool:
    """Whether the weight is a linear map of something: it sums, or it is looked up."""
    return block.fan_in != 1 or (block.lookup and not any(use.operator in ADDED for use in rule.uses))


ADDED = {"aten.add", "aten.sub"}
"""A table that is added, such as learned positions, counts as looked up, but nothing looks it up."""


def _moved(rule: WeightRule, multiplier: sympy.Expr) -> WeightRule:
    """The rule with the given multiplier at its first use; the rest of it follows by the formulas, which all divide by m."""
    theta = multiplier / rule.blocks[0].multiplier
    if theta == 1 or any(block.entries is not None for block in rule.blocks):
        return rule
    blocks = tuple(block.model_copy(update={"multiplier": block.multiplier * theta}) for block in rule.blocks)
    uses = tuple(use.model_copy(update={"multiplier": use.multiplier * theta}) for use in rule.uses)
    notes = [note for note in rule.notes if not note.startswith("tied: its use at")]
    if len(uses) > 1:
        notes += [f"tied: its use at {use.source} is multiplied by {use.multiplier}" for use in uses if use.multiplier != 1]
    return rule.model_copy(update={"blocks": blocks, "uses": uses, "notes": tuple(dict.fromkeys(notes))})
