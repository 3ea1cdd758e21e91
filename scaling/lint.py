"""`lint`: the factors of the width that are missing or doubled in a muP implementation, found without training.

The user's own models and optimizers are built at several widths. What is compared with the derived table are gauge invariants,
multiplier·init_std and multiplier^(1+p)·lr with p the degree of the update in the gradient (Yang et al. 2022, arXiv 2203.03466,
lemma J.1), so code written by tables 3, 8 or 9 passes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import nn

from scaling.capture import unwrap
from scaling.derive import derive
from scaling.errors import CannotMeasure
from scaling.findings import Finding, Kind, LintReport, Severity
from scaling.folding import template
from scaling.limits import WIDTH, exponent
from scaling.notation import formula
from scaling.observed import Init, deviations, inits, multipliers, slope
from scaling.records import Block, Contraction, ScalingTable, Source, WeightRule
from scaling.response import Response, memberships, optimizers_in, responses
from scaling.training import seeded
from scaling.uses import WeightUse, uses_of

__all__ = ["Finding", "LintReport", "lint"]

TOLERANCE = 0.06
"""How far, in powers of d, a learning rate or multiplier may be from its law: room for rounded widths, a quarter of the smallest fault."""
NOISE = 0.12
"""The same for a measured standard deviation, before the sampling error of few entries."""
NEGLIGIBLE = 1e-3
"""ε over the size of a gradient entry, up to which Adam does not feel it (THEORY P44: at 1e-2 it does)."""


def lint(
    build: Callable[[int], tuple[nn.Module, Any]],
    args: Any = None,
    widths: Sequence[int] = (64, 128, 256),
    *,
    kwargs: dict[str, Any] | None = None,
    seeds: Sequence[int] = (0, 1),
    clip: float | Callable[[int], float] | None = None,
    **options: Any,
) -> LintReport:
    """Compares a user's own parametrization with the one derived from the model, weight by weight.

    What an optimizer does is not looked up: copies of it are stepped on made-up gradients (`scaling.response`), so any will do. Of
    torch's own optimizers the keys `lr_scale` and `lr_mult` of a group count as factors on lr, which the training loop applies.

    Args:
        build: width -> (model, optimizer), the user's own code; several optimizers as a list, tuple or dict. It is called once per
            width and seed, and what it returns is left as it is.
        args: the model's inputs, as for `derive`; or a function of the width.
        widths: at least two, wide enough that no axis is of length 1.
        kwargs: the model's keyword inputs.
        seeds: models per width from which the init is measured.
        clip: the max_norm of `torch.nn.utils.clip_grad_norm_`, if the training loop clips by it; or a function of the width.
        options: what else `derive` takes (`fixed`, `grows`).

    Raises:
        CannotMeasure: if `build` does not return new models of these widths and their optimizers, or an optimizer cannot be stepped.
        ScalingError: what `derive` raises.
    """
    if isinstance(build, nn.Module):
        what = f"build is the {type(build).__name__} itself, not a function of the width"
        raise CannotMeasure(
            what, "pass one that builds it and its optimizer: lint(lambda d: (model, optimizer), args, widths=(64, 128, 256))"
        )
    widths = tuple(dict.fromkeys(widths))
    if len(widths) < 2:
        what = f"widths={list(widths)} has no two widths to compare"
        raise CannotMeasure(what, "pass at least two, as widths=(64, 128, 256)")
    built = {width: [_built(build, width, seed) for seed in seeds] for width in widths}
    models = {width: [model for model, _ in pairs] for width, pairs in built.items()}
    _check(models)
    table = derive(lambda width: models[width][0], args, kwargs, widths=widths, **options)
    groups = memberships(*built[widths[0]][0])
    updates = {width: responses(*pairs[0], table, width) for width, pairs in built.items()}
    thresholds = None if clip is None else tuple(float(clip(width) if callable(clip) else clip) for width in widths)
    linter = _Linter(table, widths, inits(models, table), groups, updates, thresholds)
    return LintReport(
        model=table.model,
        widths=widths,
        optimizers=tuple(dict.fromkeys(type(one).__name__ for one in built[widths[0]][0][1])),
        weights=len(table),
        findings=_gathered(linter.findings()),
    )


def _built(build: Callable[[int], Any], width: int, seed: int) -> tuple[nn.Module, list[Any]]:
    with seeded(seed):
        pair = build(width)
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], nn.Module)):
        kind = f"({', '.join(type(one).__name__ for one in pair)})" if isinstance(pair, tuple) else f"a {type(pair).__name__}"
        what = f"build({width}) returned {kind}, not a pair (model, optimizer)"
        raise CannotMeasure(what, "return model, optimizer; several optimizers as a list")
    model, optimizers = unwrap(pair[0]), optimizers_in(pair[1])
    own = {id(weight) for weight in model.parameters()}
    if not any(id(weight) in own for one in optimizers for group in one.param_groups for weight in group["params"]):
        what = f"build({width}) returned an optimizer that has none of the model's weights"
        raise CannotMeasure(what, "make the optimizer after the model is final: from model.parameters() of the model that is returned")
    if any(weight.is_meta for weight in model.parameters()):
        what = f"build({width}) returned a model on the meta device, whose weights have no values"
        raise CannotMeasure(what, "build it on the CPU: lint reads the initial weights")
    return model, optimizers


def _check(models: dict[int, list[nn.Module]]) -> None:
    every = [model for seeds in models.values() for model in seeds]
    if len({id(model) for model in every}) < len(every):
        raise CannotMeasure("build returned the same model twice", "make a new model and optimizer in every call of build")
    shapes = {width: {name: tuple(weight.shape) for name, weight in seeds[0].named_parameters()} for width, seeds in models.items()}
    (width, first), *rest = shapes.items()
    for other, second in rest:
        if first == second:
            what = f"build({width}) and build({other}) returned models of the same shapes"
            raise CannotMeasure(what, "make the model's width follow build's argument: lint compares the factors of several widths")
        if list(first) != list(second):
            name = next(iter(first.keys() ^ second.keys()), "their order")
            what = f"build({width}) and build({other}) returned models of different weights: {name}"
            raise CannotMeasure(what, "keep the depth and everything else as it is and change the width alone")


def _gathered(findings: Iterator[Finding]) -> tuple[Finding, ...]:
    """Findings that say the same of several weights, as one; errors first. Those of no weight are kept apart by their lines."""
    groups: dict[tuple, list[Finding]] = {}
    for one in findings:
        places = map(template, one.weights) if one.weights else [one.where and (one.where.file, one.where.line)]
        groups.setdefault((one.kind, one.severity, one.what, one.found, one.expected, one.fix, *places), []).append(one)
    merged = [
        ones[0].model_copy(update={"weights": tuple(dict.fromkeys(name for one in ones for name in one.weights))})
        for ones in groups.values()
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
    updates: tuple[Response, ...]
    bias: bool
    later: bool

    @property
    def degree(self) -> sympy.Expr:
        """That of the update in the gradient."""
        return self.updates[0].degree

    @property
    def matrix(self) -> bool:
        """Whether it is updated as a whole, so that lr is meant for its norm."""
        return self.degree == 0 and not self.updates[0].apart

    def scale(self, folded: sympy.Expr) -> sympy.Expr:
        """multiplier·init_std as wanted."""
        return self.block.multiplier * self.ratio * self.block.init_std / folded

    def rate(self, folded: sympy.Expr) -> sympy.Expr:
        """multiplier^(1+p)·lr as wanted: the entries that a gradient of its usual size γ is to move by, over γ^p."""
        p, lr = self.degree, self.block.lr
        law = lr["muon"] if self.matrix else lr["sgd"] if p == 1 else lr["adam"] / self.block.eps**p
        return (self.block.multiplier * self.ratio / folded) ** (1 + p) * law

    def rates(self, widths: Sequence[int]) -> list[float]:
        """The learning rates, times what the optimizer multiplies them by: per entry, or per spectral norm of a matrix."""
        fans = self.block.fan_in * self.block.fan_out if self.matrix else sympy.Integer(1)
        return [one.rate * _at(fans, width) ** 0.5 for one, width in zip(self.updates, widths, strict=True)]

    def gradients(self, widths: Sequence[int], folded: sympy.Expr) -> list[float]:
        """The usual size of a gradient entry, up to one constant for the model."""
        return [_at(self.block.eps * folded / (self.block.multiplier * self.ratio), width) for width in widths]


def _folded(part: _Part, missing: dict[str, sympy.Expr]) -> sympy.Expr:
    """The part of a block's target that makes up for what a product of two activations lacks (weight -> that factor)."""
    rest = next((missing[name] for name in part.rule.names if name in missing), None)
    if rest is None:
        return sympy.Integer(1)
    own, others = exponent(part.block.target), {exponent(block.target) for block in part.rule.blocks}
    if own in (exponent(rest), exponent(rest) / 2):  # alone, or shared by both activations
        return part.block.target
    carries = len(part.rule.blocks) == 1 or own - exponent(rest) in others  # beside a number that all blocks make up for
    return rest if carries else sympy.Integer(1)


def _chosen(part: _Part, power: float) -> bool:
    """Whether a learning rate is off as u-muP wants it to be."""
    return part.block.role == "embedding" and part.degree == 0 and not part.matrix and abs(power + 0.5) <= TOLERANCE


def _fitting(powers: tuple[float, float], tolerance: float) -> float:
    """The departure from a law's limit, unless its finite form fits."""
    limit, finite = powers
    return finite if abs(finite) <= min(tolerance, abs(limit)) else limit


def _at(expression: sympy.Expr, width: int) -> float:
    return float(expression.subs(dict.fromkeys(expression.free_symbols, width)))


class _Linter:
    def __init__(
        self,
        table: ScalingTable,
        widths: tuple[int, ...],
        init: dict[str, tuple[Init, ...]],
        groups: dict[str, tuple[str, ...]],
        updates: dict[int, dict[str, tuple[Response, ...]]],
        thresholds: tuple[float, ...] | None,
    ) -> None:
        self.table, self.widths, self.init, self.groups = table, widths, init, groups
        self.updates, self.thresholds = updates, thresholds
        trace = table.trace
        dots = [dot for dot in uses_of(trace.graph, trace.growth.axes)[1] if trace.growth.grows(dot.dim)]
        self.numbers = multipliers(trace.graph, trace.growth, trace.uses, dots)
        self.uses: dict[str, list[WeightUse]] = {}
        for use in trace.uses:
            self.uses.setdefault(use.weight.names[0], []).append(use)

    def findings(self) -> Iterator[Finding]:
        yield from self._coverage()
        unfolded: dict[str, sympy.Expr] = {}
        for contraction in self.table.contractions:
            if exponent(contraction.missing) != 0 and not self._carried(contraction):
                unfolded |= dict.fromkeys(contraction.folded, contraction.carried)
                yield _attention(contraction)
        for rule in self.table:
            yield from self._of(rule, unfolded)
        yield from self._clipping(unfolded)

    def _coverage(self) -> Iterator[Finding]:
        for name, found in self.groups.items():
            if len(found) == 1:
                continue
            several = f"in {len(found)} ({', '.join(found)})" if found else "in none"
            fix = "put it in one param group" if not found else "leave it in one of them"
            where = self.table[name].uses[0].source if name in self.table and self.table[name].uses else None
            yield Finding(
                kind="group", severity="error", weights=(name,), what="param groups of a trainable weight", found=several,
                expected="in exactly one", factor=None, where=where, fix=fix,
            )  # fmt: skip
        for name in self.table.coverage.unreached:
            yield Finding(
                kind="unused", severity="warning", weights=(name,), what="trainable weight", found="not used by the forward",
                expected="used, or frozen", factor=None, where=None, fix="pass inputs that use it, or requires_grad_(False)",
            )  # fmt: skip

    def _parts(self, rule: WeightRule) -> Iterator[_Part]:
        if len(self.groups[rule.name]) != 1:
            return
        found = [self.updates[width][rule.name] for width in self.widths]
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
                    updates=tuple(blocks[i] for blocks in found),
                    bias=place.call.get("bias") is place.operand,
                    later=k > 0,
                )

    def _of(self, rule: WeightRule, unfolded: dict[str, sympy.Expr]) -> Iterator[Finding]:
        seen: set[tuple[str, str]] = set()
        for part in self._parts(rule):
            folded = _folded(part, unfolded)
            found = self._later(part) if part.later else (*self._mean(part), *self._invariants(part, folded))
            for finding in found:
                if (finding.kind, finding.found) not in seen:
                    seen.add((finding.kind, finding.found))
                    yield finding

    def _carried(self, contraction: Contraction) -> bool:
        """Whether the user's init and learning rate of the weights upstream have what the forward lacks."""
        missing = dict.fromkeys(contraction.folded, contraction.carried)
        parts = [part for name in contraction.folded for part in self._parts(self.table[name]) if _folded(part, missing) != 1]
        moved = [self._moved(part, sympy.Integer(1)) for part in parts]
        return bool(parts) and all(
            abs(power) <= TOLERANCE + self._noise(part)
            for part, (scale, rate) in zip(parts, moved, strict=True)
            for power in (min(scale, key=abs), rate)
        )

    def _noise(self, part: _Part) -> float:
        """The sampling error of a fitted standard deviation, four of them."""
        return 0.0 if part.init.zero or not any(part.init.std) else NOISE + 4 / (2 * part.init.count) ** 0.5

    def _moved(self, part: _Part, folded: sympy.Expr) -> tuple[tuple[float, float], float]:
        """The powers of d by which multiplier·init_std and multiplier^(1+p)·lr are too large; `derive` has seen the forward's.

        The first from its limit and from its finite form; the second from whichever fits, the limit if neither does.
        """
        scale, rate = (0.0, 0.0), (0.0, 0.0)
        if all(part.init.size):
            scale = deviations(self.widths, part.init.size, part.scale(folded))
        rates = part.rates(self.widths)
        if all(rates):
            rate = deviations(self.widths, rates, part.rate(folded))
        if part.block.entries is not None:  # the model divides its norm out: any init will do, to which the learning rate is in proportion
            return (0.0, 0.0), _fitting(rate, TOLERANCE) - (1 + float(part.degree)) * _fitting(scale, TOLERANCE)
        return scale, _fitting(rate, TOLERANCE)

    def _mean(self, part: _Part) -> Iterator[Finding]:
        """A matrix with two growing fans needs mean 0: a mean μ adds μ·√(fan_in·fan_out) to its norm (TP5, App. B)."""
        if part.block.role != "hidden" or part.init.zero:
            return
        mean, std = part.init.mean[-1], part.init.std[-1]
        fans = [(_at(part.block.fan_out, width) ** 0.5, _at(part.block.fan_in, width) ** 0.5) for width in self.widths]
        share = [abs(m) * a * b / (s * (a + b) + abs(m)) for m, s, (a, b) in zip(part.init.mean, part.init.std, fans, strict=True)]
        if share[-1] > 0.25 and all(share) and slope(self.widths, share) > 0.25:  # the identity's is a constant
            yield Finding(
                kind="mean", severity="error", weights=(part.rule.name,), what=f"mean of the init of a {part.block.role} matrix",
                found=f"{mean:.3g} beside a standard deviation of {std:.3g}", expected="0", factor=None, where=part.source,
                fix="initialise around zero: nn.init.normal_ or a uniform from -a to a",
            )  # fmt: skip

    def _invariants(self, part: _Part, folded: sympy.Expr) -> Iterator[Finding]:
        (limit, finite), rate = self._moved(part, folded)
        shift, noise = 1 + float(part.degree), TOLERANCE + self._noise(part)
        off_rate = abs(rate) > TOLERANCE
        if not any(one.rate for one in part.updates):
            yield _still(part)
            return
        if part.matrix and part.block.lookup:
            yield _lookup(part)
            off_rate, rate = False, 0.0
        multiplier = 0.0
        if off_rate and abs(limit) > noise and abs(rate - shift * limit) <= TOLERANCE * shift + self._noise(part):
            multiplier = _nearest(limit)
            instead = f"its init by {_factor(-multiplier)} and its lr by {_factor(-shift * multiplier)}"
            fix = f"multiply what it makes here by {_factor(-multiplier)}, or {instead}"
            yield self._multiplier(part, f"forward multiplier of {_a(part)}", multiplier, fix)
            off_rate = False
        elif abs(scale := _fitting((limit, finite), noise)) > noise:
            yield self._init(part, scale)
        if off_rate:
            yield self._lr(part, rate)
        yield from self._decay(part, _nearest(rate) if off_rate and not _chosen(part, rate) else 0.0)
        yield from self._epsilon(part, multiplier, folded)

    def _later(self, part: _Part) -> Iterator[Finding]:
        """A tied weight's later use: init and lr are judged at, and bound by, the first one; what is left is what derive multiplies by."""
        power = float(exponent(part.ratio))
        if abs(power) > TOLERANCE:
            what, fix = "forward multiplier of a tied weight, at its later use,", f"multiply what it makes here by {_factor(power)}"
            yield self._multiplier(part, what, -power, fix)

    def _multiplier(self, part: _Part, what: str, power: float, fix: str) -> Finding:
        own = slope(self.widths, part.numbers) if len(set(part.numbers)) > 1 else 0.0
        return _finding(part, "multiplier", what, _power(own), _power(own - power), -power, fix)

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
        own, nearest = slope(self.widths, part.rates(self.widths)), _nearest(power)
        chosen = _chosen(part, power)
        fix = "none needed: u-muP's choice of an embedding lr (Blake et al. 2024, arXiv 2407.17465)" if chosen else ""
        return _finding(
            part,
            "lr",
            f"learning rate{' times scale factor' * part.matrix} of {_a(part)} under {part.updates[0].optimizer}",
            _power(own),
            _power(own - nearest),
            -nearest,
            fix or f"a param group of its own, with lr multiplied by {_factor(-nearest)}",
            "note" if chosen else "error",
        )

    def _decay(self, part: _Part, rate: float) -> Iterator[Finding]:
        if any(one.l2 for one in part.updates):
            fix = "use AdamW: Adam divides the decay by the gradient's size, which has another power of d (TP5, B.3)"
            found = f"an L2 term inside {part.updates[0].optimizer}"
            yield _finding(part, "weight_decay", f"weight decay of {_a(part)}", found, "decoupled", None, fix)
            return
        fractions = [one.decay for one in part.updates]
        if not all(fraction > 0 for fraction in fractions):
            return
        coupled = part.updates[0].coupled
        own, mended = slope(self.widths, fractions), rate if coupled else 0.0
        power = own - mended
        if abs(power) > TOLERANCE:
            nearest = _nearest(power)
            why = "what its lr is divided by" if coupled else "here lr does not multiply it, so it stays as it is at all widths"
            what = f"fraction of {_a(part)} decayed per step, {'lr·weight_decay' if coupled else 'weight_decay without lr'}"
            what += ", once its lr is mended," if mended else ""
            fix = f"multiply its weight_decay by {_factor(-nearest)}: {why}"
            severity = "note" if abs(own) <= TOLERANCE else "error"  # right as it is, but it has to follow the lr
            yield _finding(part, "weight_decay", what, _power(power), _power(0.0), -nearest, fix, severity)

    def _epsilon(self, part: _Part, multiplier: float, folded: sympy.Expr) -> Iterator[Finding]:
        eps = [one.eps for one in part.updates]
        if part.degree != 0 or part.matrix or not all(eps):
            return
        entries = [g * width**-multiplier for g, width in zip(part.gradients(self.widths, folded), self.widths, strict=True)]
        ratios = [e / g for e, g in zip(eps, entries, strict=True)]
        power = slope(self.widths, ratios)
        if max(ratios) > NEGLIGIBLE and abs(power) > TOLERANCE:
            own, nearest = slope(self.widths, eps), _nearest(power)
            what = f"{part.updates[0].optimizer}'s ε for {_a(part)}, {eps[-1]:.1g} beside gradients of order {entries[-1]:.1g}"
            fix = f"multiply its eps by {_factor(-nearest)}, or make eps negligible (1e-12)"
            yield _finding(part, "eps", what, _power(own), _power(own - nearest), -nearest, fix)

    def _clipping(self, unfolded: dict[str, sympy.Expr]) -> Iterator[Finding]:
        """Of the gradient's global norm, Σ‖G‖_F², the terms of the highest power of d decide (THEORY 1.5, D2)."""
        if self.thresholds is None or not all(self.thresholds):
            return
        norms: list[tuple[float, _Part]] = []
        for rule in self.table:
            for part in self._parts(rule):
                folded = _folded(part, unfolded)
                count = sympy.sqrt(part.block.fan_in * part.block.fan_out * part.block.copies)
                entry = part.block.eps * folded / (part.block.multiplier * part.ratio)
                norms.append((float(exponent(entry * count)), part))
        if not norms:
            return
        most = max(power for power, _ in norms)
        power = most - slope(self.widths, self.thresholds)
        if abs(power) <= TOLERANCE:
            return
        largest = [part for own, part in norms if own == most]
        names = tuple(dict.fromkeys(part.rule.name for part in largest))
        adaptive = all(part.degree == 0 for _, part in norms)
        if most > 0:
            fix = "move their init and lr factor into a forward multiplier, which shrinks their gradients (table 8), or clip them apart"
        else:
            fix = f"multiply max_norm by {_factor(_nearest(power))}: as it is, it clips {'more and more' if power > 0 else 'less and less'}"
        yield Finding(
            kind="clip", severity="warning" if adaptive else "error", weights=names,
            what="max_norm of clip_grad_norm_, beside a norm of all gradients that these weights decide,",
            found=_power(slope(self.widths, self.thresholds)), expected=f"{_power(most)}, as the norm is",
            factor=WIDTH ** sympy.Rational(str(_nearest(power))),
            where=largest[0].source, fix=fix,
        )  # fmt: skip


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
    return _finding(part, "matrix optimizer", "a lookup in a matrix optimizer", "updated as one matrix", "updated row by row", None, fix)


def _still(part: _Part) -> Finding:
    fix = "give it a learning rate, or requires_grad_(False); where a scheduler's warm-up has set it to 0, make the scheduler after lint"
    return _finding(
        part, "lr", f"learning rate of a trainable weight under {part.updates[0].optimizer}", "0", "above 0", None, fix, "warning"
    )


def _attention(contraction: Contraction) -> Finding:
    size, missing = contraction.dim, contraction.missing
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
        fix=f"multiply by {formula(missing)}, up to a constant (scaled_dot_product_attention takes scale=, else scale q): "
        "trained q and k align (TP5, definition 4.1)",
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
