"""`lint`: the factors of the width that are missing or doubled in a muP implementation, found without training.

The user's own models and optimizers are built at several widths. What is compared with the derived table are gauge invariants,
multiplier·init_std and multiplier^(1+p)·lr with p the degree of the update in the gradient (Yang et al. 2022, arXiv 2203.03466,
lemma J.1), so code written by tables 3, 8 or 9 passes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy
from torch import nn

from scaling.capture import unwrap
from scaling.derive import derive
from scaling.errors import CannotMeasure
from scaling.folding import fold, template
from scaling.limits import WIDTH, exponent
from scaling.notation import formula
from scaling.observed import Group, Init, deviation, groups_of, inits, multipliers, optimizers_in, slope
from scaling.optimizers import DEGREES
from scaling.records import Block, Contraction, Exact, Record, ScalingTable, Source, WeightRule
from scaling.training import seeded
from scaling.uses import WeightUse, uses_of

__all__ = ["Finding", "LintReport", "lint"]

Kind = Literal["init", "mean", "lr", "multiplier", "attention", "weight_decay", "eps", "group", "matrix optimizer", "unused"]
Severity = Literal["error", "warning", "note"]

TOLERANCE = 0.06
"""How far, in powers of d, a learning rate or multiplier may be from its law: room for rounded widths, a quarter of the smallest fault."""
NOISE = 0.12
"""The same for a measured standard deviation, before the sampling error of few entries."""
NEGLIGIBLE = 1e-3
"""ε over the size of a gradient entry, up to which Adam does not feel it (THEORY P44: at 1e-2 it does)."""


class Finding(Record):
    """One fault: what of which weights, its value as a power of d, what it should be, and the factor that is missing."""

    kind: Kind
    severity: Severity
    weights: tuple[str, ...]
    what: str
    found: str
    expected: str
    factor: Exact | None
    where: Source | None
    fix: str

    @property
    def weight(self) -> str:
        """The first of the weights."""
        return self.weights[0] if self.weights else ""

    def __str__(self) -> str:
        mark = {"error": "✗", "warning": "!", "note": "·"}[self.severity]
        lines = [f"{mark} {self.what}: {', '.join(fold(self.weights))}", f"    is {self.found}, should be {self.expected}"]
        return "\n".join([*lines, f"    fix: {self.fix}", *([f"    at {self.where}"] if self.where else [])])


class LintReport(Record):
    """All findings. `passed`: no finding is an error; notes are choices that others made on purpose."""

    model: str
    widths: tuple[int, ...]
    optimizers: tuple[str, ...]
    weights: int
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether there is no error."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that are no mere notes."""
        return tuple(finding for finding in self.findings if finding.severity != "note")

    def to_json(self) -> str:
        """All of it as JSON."""
        return self.model_dump_json(indent=1)

    def __str__(self) -> str:
        verdict = "passed" if self.passed else f"failed: {sum(f.severity == 'error' for f in self.findings)} faults"
        widths = ", ".join(map(str, self.widths))
        last = f"{verdict}; {self.model}, {self.weights} weights, {' and '.join(self.optimizers)}, widths {widths}"
        return "\n".join([*map(str, self.findings), last])

    def __repr__(self) -> str:
        return str(self)


def lint(
    build: Callable[[int], tuple[nn.Module, Any]],
    args: Any = None,
    widths: Sequence[int] = (64, 128, 256),
    *,
    kwargs: dict[str, Any] | None = None,
    seeds: Sequence[int] = (0, 1),
    **options: Any,
) -> LintReport:
    """Compares a user's own parametrization with the one derived from the model, weight by weight.

    Args:
        build: width -> (model, optimizer), the user's own code; several optimizers as a list, tuple or dict.
        args: the model's inputs, as for `derive`; or a function of the width.
        widths: at least two, wide enough that no axis is of length 1.
        kwargs: the model's keyword inputs.
        seeds: models per width from which the init is measured.
        options: what else `derive` takes (`fixed`, `grows`).

    Raises:
        CannotMeasure: if `build` does not return a model and its optimizer, or the optimizer's update is not known.
        ScalingError: what `derive` raises.
    """
    if len(set(widths)) < 2:
        what = f"widths={list(widths)} has no two widths to compare"
        raise CannotMeasure(what, "pass at least two, as widths=(64, 128, 256)")
    models: dict[int, list[nn.Module]] = {width: [] for width in widths}
    groups: dict[int, dict[str, list[Group]]] = {}
    for width in widths:
        for seed in seeds:
            with seeded(seed):
                model, optimizer = _pair(build, width)
            models[width].append(unwrap(model))
            groups[width] = groups_of(unwrap(model), optimizers_in(optimizer))
    table = derive(lambda width: models[width][0], args, kwargs, widths=widths, **options)
    linter = _Linter(table, tuple(widths), inits(models, table), groups)
    return LintReport(
        model=table.model,
        widths=tuple(widths),
        optimizers=tuple(dict.fromkeys(g.optimizer for found in groups[widths[0]].values() for g in found)),
        weights=len(table),
        findings=_gathered(linter.findings()),
    )


def _pair(build: Callable[[int], Any], width: int) -> tuple[nn.Module, Any]:
    pair = build(width)
    if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], nn.Module):
        return pair
    what = f"build({width}) returned {type(pair).__name__}, not a pair (model, optimizer)"
    raise CannotMeasure(what, "return model, optimizer")


def _gathered(findings: Iterator[Finding]) -> tuple[Finding, ...]:
    """Findings that say the same of several weights, as one; errors first."""
    groups: dict[tuple, list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.kind, one.severity, one.what, one.found, one.expected, one.fix, *map(template, one.weights)), []).append(one)
    merged = [
        first.model_copy(update={"weights": tuple(dict.fromkeys(name for one in ones for name in one.weights))})
        for first, *_ in groups.values()
        for ones in [groups[first.kind, first.severity, first.what, first.found, first.expected, first.fix, *map(template, first.weights)]]
    ]
    return tuple(sorted(merged, key=lambda one: ("error", "warning", "note").index(one.severity)))


# --- what a weight should be --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """One block of a weight at one of its uses: what it should be, and what it is at each width."""

    rule: WeightRule
    block: Block
    source: Source
    ratio: sympy.Expr
    numbers: tuple[float, ...]
    init: Init
    groups: tuple[Group, ...]
    bias: bool

    @property
    def family(self) -> str:
        return self.groups[0].family

    def scale(self, folded: sympy.Expr) -> sympy.Expr:
        """multiplier·init_std as wanted."""
        return self.block.multiplier * self.ratio * self.block.init_std / folded

    def rate(self, folded: sympy.Expr) -> sympy.Expr:
        """multiplier^(1+p)·lr as wanted."""
        shift = 1 + DEGREES[self.family]
        return (self.block.multiplier * self.ratio / folded) ** shift * self.block.lr[self.family]


class _Linter:
    def __init__(
        self,
        table: ScalingTable,
        widths: tuple[int, ...],
        init: dict[str, tuple[Init, ...]],
        groups: dict[int, dict[str, list[Group]]],
    ) -> None:
        self.table, self.widths, self.init, self.groups = table, widths, init, groups
        trace = table.trace
        dots = [dot for dot in uses_of(trace.graph, trace.growth.axes)[1] if trace.growth.grows(dot.dim)]
        self.numbers = multipliers(trace.graph, trace.uses, dots)
        self.uses: dict[str, list[WeightUse]] = {}
        for use in trace.uses:
            self.uses.setdefault(use.weight.names[0], []).append(use)

    def findings(self) -> Iterator[Finding]:
        yield from self._coverage()
        unfolded: set[str] = set()
        for contraction in self.table.contractions:
            missing = 1 / (contraction.dim * contraction.present)
            if exponent(missing) != 0 and not self._carried(contraction):
                unfolded |= set(contraction.folded)
                yield _attention(contraction, missing)
        for rule in self.table:
            yield from self._of(rule, unfolded=bool(set(rule.names) & unfolded))

    def _coverage(self) -> Iterator[Finding]:
        for name, found in self.groups[self.widths[0]].items():
            if len(found) == 1:
                continue
            several = f"{len(found)} ({', '.join(g.optimizer for g in found)})"
            fix = "put it in one param group" if not found else "leave it in one of them"
            where = self.table[name].uses[0].source if name in self.table and self.table[name].uses else None
            yield Finding(
                kind="group", severity="error", weights=(name,), what="param groups", found=several if found else "in none",
                expected="in exactly one", factor=None, where=where, fix=fix,
            )  # fmt: skip
        for name in self.table.coverage.unreached:
            yield Finding(
                kind="unused", severity="warning", weights=(name,), what="trainable weight", found="not used by the forward",
                expected="used, or frozen", factor=None, where=None, fix="pass inputs that use it, or requires_grad_(False)",
            )  # fmt: skip

    def _parts(self, rule: WeightRule) -> Iterator[_Part]:
        found = [self.groups[width].get(rule.name) or [] for width in self.widths]
        if any(len(groups) != 1 for groups in found):
            return
        uses = self.uses.get(rule.name, [])
        own = rule.uses if len(rule.uses) == len(uses) else rule.uses[:1]
        for k, (use, place) in enumerate(zip(own, uses, strict=False)):
            for i, (block, init) in enumerate(zip(rule.blocks, self.init[rule.name], strict=True)):
                yield _Part(
                    rule=rule,
                    block=block,
                    source=use.source,
                    ratio=use.multiplier / own[0].multiplier if k else sympy.Integer(1),
                    numbers=self.numbers[place],
                    init=init,
                    groups=tuple(groups[0].part(i) for groups in found),
                    bias=place.call.get("bias") is place.operand,
                )

    def _of(self, rule: WeightRule, *, unfolded: bool) -> Iterator[Finding]:
        seen: set[tuple[str, str]] = set()
        for part in self._parts(rule):
            folded = part.block.target if unfolded else sympy.Integer(1)
            for finding in (*self._mean(part), *self._invariants(part, folded)):
                if (finding.kind, finding.found) not in seen:
                    seen.add((finding.kind, finding.found))
                    yield finding

    def _carried(self, contraction: Contraction) -> bool:
        """Whether the user's init and learning rate of the weights upstream have what the forward lacks."""
        parts = [part for name in contraction.folded for part in self._parts(self.table[name]) if part.block.target != 1]
        moved = [self._moved(part, sympy.Integer(1)) for part in parts]
        return bool(parts) and all(
            abs(value) <= TOLERANCE + self._noise(part) for part, pair in zip(parts, moved, strict=True) for value in pair
        )

    def _noise(self, part: _Part) -> float:
        """The sampling error of a fitted standard deviation, four of them."""
        return 0.0 if part.init.zero or not any(part.init.std) else NOISE + 4 / (2 * part.init.count) ** 0.5

    def _moved(self, part: _Part, folded: sympy.Expr) -> tuple[float, float]:
        """The powers of d by which multiplier·init_std and multiplier^(1+p)·lr are too large; `derive` has seen the forward's."""
        scale = 0.0
        if not part.init.zero:
            scale = deviation(self.widths, part.init.size, part.scale(folded)) if all(part.init.size) else 0.0
        rates = [group.lr for group in part.groups]
        return scale, deviation(self.widths, rates, part.rate(folded)) if all(rates) else 0.0

    def _mean(self, part: _Part) -> Iterator[Finding]:
        """A matrix with two growing fans needs mean 0: a mean μ adds μ·√(fan_in·fan_out) to its norm (TP5, App. B)."""
        if part.block.role != "hidden" or part.init.zero:
            return
        rows, columns = (float(fan.subs(WIDTH, self.widths[-1])) for fan in (part.block.fan_out, part.block.fan_in))
        mean, std = abs(part.init.mean[-1]), part.init.std[-1]
        if mean * (rows * columns) ** 0.5 > 0.25 * std * (rows**0.5 + columns**0.5):
            yield Finding(
                kind="mean", severity="error", weights=(part.rule.name,), what=f"mean of the init of a {part.block.role} matrix",
                found=f"{part.init.mean[-1]:.3g} beside a standard deviation of {std:.3g}", expected="0", factor=None, where=part.source,
                fix="initialise around zero: nn.init.normal_ or a uniform from -a to a",
            )  # fmt: skip

    def _invariants(self, part: _Part, folded: sympy.Expr) -> Iterator[Finding]:
        scale, rate = self._moved(part, folded)
        shift = 1 + DEGREES[part.family]
        off_scale, off_rate = abs(scale) > TOLERANCE + self._noise(part), abs(rate) > TOLERANCE
        if part.family == "muon" and part.block.lookup:
            yield _lookup(part)
            off_rate, rate = False, 0.0
        multiplier = 0.0
        if off_scale and off_rate and abs(rate - shift * scale) <= TOLERANCE * shift + self._noise(part):
            multiplier = _nearest(scale)
            yield self._multiplier(part, multiplier, shift)
            off_scale = off_rate = False
        if off_scale:
            yield self._init(part, scale)
        if off_rate:
            yield self._lr(part, rate)
        yield from self._decay(part, _nearest(rate) if off_rate else 0.0)
        yield from self._epsilon(part, multiplier, folded)

    def _multiplier(self, part: _Part, power: float, shift: int) -> Finding:
        own = slope(self.widths, part.numbers) if len(set(part.numbers)) > 1 else 0.0
        instead = f"or its init by {_factor(-power)} and its lr by {_factor(-shift * power)}"
        return _finding(
            part,
            "multiplier",
            f"forward multiplier of {_a(part)}",
            _power(own),
            _power(own - power),
            -power,
            f"multiply what it makes by {_factor(-power)} ({instead})",
        )

    def _init(self, part: _Part, power: float) -> Finding:
        own, nearest = slope(self.widths, part.init.size), _nearest(power)
        fades = part.bias and power < 0
        fix = "start biases at zero, or at a width-independent size; torch's 1/√fan_in fades" if fades else ""
        return _finding(
            part,
            "init",
            f"init_std of {_a(part)}",
            _power(own),
            _power(own - nearest),
            -nearest,
            fix or f"multiply its init_std by {_factor(-nearest)}",
            "note" if fades else "error",
        )

    def _lr(self, part: _Part, power: float) -> Finding:
        own, nearest = slope(self.widths, [group.lr for group in part.groups]), _nearest(power)
        chosen = part.block.role == "embedding" and part.family == "adam" and abs(power + 0.5) <= TOLERANCE
        fix = "none needed: u-muP's choice of an embedding lr (THEORY 2.4, D4)" if chosen else ""
        return _finding(
            part,
            "lr",
            f"learning rate of {_a(part)} under {part.groups[0].optimizer}",
            _power(own),
            _power(own - nearest),
            -nearest,
            fix or f"a param group of its own, with lr multiplied by {_factor(-nearest)}",
            "note" if chosen else "error",
        )

    def _decay(self, part: _Part, rate: float) -> Iterator[Finding]:
        if part.groups[0].l2:
            fix = "use AdamW: Adam divides the decay by the gradient's size, which has another power of d (TP5, B.3)"
            yield _finding(part, "weight_decay", f"weight decay of {_a(part)}", "an L2 term inside Adam", "decoupled", None, fix)
            return
        fractions = [group.weight_decay for group in part.groups]
        if not all(fractions):
            return
        power = slope(self.widths, fractions) - rate
        if abs(power) > TOLERANCE:
            nearest = _nearest(power)
            fix = f"multiply its weight_decay by {_factor(-nearest)}: what its lr is divided by"
            what = f"fraction of {_a(part)} decayed per step, lr·weight_decay" + (", once its lr is mended" if rate else "")
            yield _finding(part, "weight_decay", what, _power(power), _power(0.0), -nearest, fix)

    def _epsilon(self, part: _Part, multiplier: float, folded: sympy.Expr) -> Iterator[Finding]:
        eps = [group.eps for group in part.groups]
        if part.family != "adam" or not all(eps):
            return
        wanted = part.block.eps * folded / (part.block.multiplier * part.ratio)
        entries = [float(wanted.subs(dict.fromkeys(wanted.free_symbols, width))) * width**-multiplier for width in self.widths]
        ratios = [e / g for e, g in zip(eps, entries, strict=True)]
        power = slope(self.widths, ratios)
        if max(ratios) > NEGLIGIBLE and abs(power) > TOLERANCE:
            own, nearest = slope(self.widths, eps), _nearest(power)
            what = f"Adam's ε for {_a(part)}, {eps[-1]:.1g} beside gradients of order {entries[-1]:.1g}"
            fix = f"multiply its eps by {_factor(-nearest)}, or make eps negligible (1e-12)"
            yield _finding(part, "eps", what, _power(own), _power(own - nearest), -nearest, fix)


def _finding(
    part: _Part, kind: Kind, what: str, found: str, expected: str, power: float | None, fix: str, severity: Severity = "error"
) -> Finding:
    return Finding(
        kind=kind,
        severity=severity,
        weights=(part.rule.name,),
        what=what,
        found=found,
        expected=expected,
        factor=None if power is None else WIDTH ** sympy.Rational(str(power)),
        where=part.source,
        fix=fix,
    )


def _lookup(part: _Part) -> Finding:
    fix = "give embeddings to AdamW: their rows are separate vectors"
    return _finding(
        part, "matrix optimizer", "a lookup in a matrix optimizer", "updated as one matrix UVᵀ", "updated row by row", None, fix
    )


def _attention(contraction: Contraction, missing: sympy.Expr) -> Finding:
    size = contraction.dim
    name = "attention scale" if "attention" in contraction.operator else "factor on a product of two activations"
    return Finding(
        kind="attention",
        severity="error",
        weights=contraction.folded,
        what=f"{name} over an axis of length {formula(size)}",
        found=formula(contraction.present),
        expected=formula(1 / size),
        factor=WIDTH ** exponent(missing),
        where=contraction.source,
        fix=f"scale by {formula(1 / size)}, times a constant: trained q and k align (TP5, definition 4.1)",
    )


def _a(part: _Part) -> str:
    return f"a bias ({part.block.role})" if part.bias else f"{'an' if part.block.role[0] in 'aeiou' else 'a'} {part.block.role} weight"


def _nearest(power: float) -> float:
    """The multiple of 1/4 that a fitted power is, or the power itself to two digits."""
    nearest = round(4 * power) / 4
    return nearest if abs(nearest - power) <= 0.13 and nearest else round(power, 2)


def _power(power: float) -> str:
    nearest = round(4 * power) / 4
    value = nearest if abs(nearest - power) <= 0.13 else round(power, 2)
    return _factor(value) if value else "constant in d"


def _factor(power: float) -> str:
    """A power of d as people write it.

    >>> _factor(-1.0), _factor(0.5)
    ('1/d', '√d')
    """
    exact = sympy.Rational(str(power))
    known = {1: "d", -1: "1/d", sympy.Rational(1, 2): "√d", sympy.Rational(-1, 2): "1/√d", 0: "1"}
    return known.get(exact, f"d^({exact})")
