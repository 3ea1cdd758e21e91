"""explain: one weight's rules derived in steps, from the operators that use it to the limit d→∞."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import sympy

from scaling import optimizers
from scaling.limits import DEPTH, WIDTH, leading
from scaling.notation import decided, formula, plain
from scaling.records import AxisClass, Block, Contraction, Residual, ScalingTable, Use, WeightRule
from scaling.sheet import operator_name, places, same_rule, slice_text

__all__ = ["Limit", "explain", "limit"]

Kinds = list[list[Block]]
PAGE = 120
PARTS = {"in": "summed over", "out": "survives", "copy": "shared with the input (one map for each)", "lookup": "looked up (counts 1)"}

TP5_TABLE_3: dict[tuple[str, ...], str] = {
    ("0", "1", "0"): "input weights and biases",
    ("-1/2", "0", "-1"): "hidden weights",
    ("-1", "-1", "-1"): "output weights",
    ("0", "0", "0"): "none: a scalar-like weight, whose rules are constant (TP5, App. B)",
}
"""Exponents of (init_std, SGD lr, Adam lr) -> the column of table 3 of Yang et al. 2022, arXiv 2203.03466."""


class Limit(NamedTuple):
    """`value` is the limit of `resolved`/d^`power` as d→∞, `resolved` the expression with each min and max decided for large d."""

    power: sympy.Expr
    value: sympy.Expr
    resolved: sympy.Expr


def limit(expression: sympy.Expr) -> Limit:
    """The limit d→∞ of an expression over its own power of d, by `sympy.limit`.

    >>> power, value, _ = limit(sympy.sqrt(sympy.Min(1, 65 / WIDTH) / WIDTH))
    >>> power, value
    (-1, sqrt(65))
    """
    power = leading(expression)[1]
    resolved: Any = expression.replace(lambda part: isinstance(part, (sympy.Min, sympy.Max)), _decide)
    return Limit(power, sympy.limit(resolved / WIDTH**power, WIDTH, sympy.oo), resolved)


def _decide(choice: Any) -> sympy.Expr:
    """The argument of a Min or Max that it is for large d (sympy.limit does not take them)."""
    best = choice.args[0]
    for argument in choice.args[1:]:
        ratio = sympy.limit(argument / best, WIDTH, sympy.oo)
        if (ratio < 1) == isinstance(choice, sympy.Min) and ratio != 1:
            best = argument
    return best


def explain(table: ScalingTable, name: str) -> str:
    """The derivation of one weight's rules, step by step.

    Args:
        table: the table that has the weight.
        name: the weight's name, or one it is tied to.

    Raises:
        UnknownName: if no weight has this name; the known ones are listed.
    """
    rule = table[name]
    kinds = _kinds(rule)
    steps = [("The axes", list(_axes(table, rule))), ("The uses", list(_uses(table, rule)))]
    if table.residual is not None:
        steps.append(("The depth", list(_depth(table.residual, rule))))
    for title, step in STEPS:
        steps.append((title, list(step(kinds))))
    out = [" = ".join(rule.names), f"shape {_times(rule.dims)} = {_times(rule.shape)}", *rule.notes]
    for number, (title, lines) in enumerate(steps, 1):
        out += ["", f"{number}. {title}", *(_wrap(line) for line in lines)]
    return "\n".join(out)


def _wrap(line: str) -> str:
    return textwrap.fill(line, PAGE, initial_indent="   ", subsequent_indent="       ", break_long_words=False, break_on_hyphens=False)


def _times(dims: Iterable[sympy.Expr | int]) -> str:
    return " × ".join(formula(sympy.sympify(dim)) for dim in dims) or "1"


def _kinds(rule: WeightRule) -> Kinds:
    """The blocks, those of one rule together."""
    kinds: Kinds = []
    for block in rule.blocks:
        alike = next((kind for kind in kinds if same_rule(kind[0], block)), None)
        kinds.append([block]) if alike is None else alike.append(block)
    return kinds


# --- the graph's side ---------------------------------------------------------------------------------------------------------------


def _axes(table: ScalingTable, rule: WeightRule) -> Iterable[str]:
    for axis, (dim, size) in enumerate(zip(rule.dims, rule.shape, strict=True)):
        parts = dict.fromkeys(PARTS[factor.part] for block in rule.blocks for factor in block.axes[axis])
        value = f"{formula(dim)} = {size}, grows" if dim.has(WIDTH) else f"{size}, fixed"
        yield f"axis {axis}: {value}; {' and '.join(parts) or 'of size one'}"
        yield from (f"    {_class(one)}" for one in table.classes if any((name, axis) in one.where for name in rule.names))


def _class(one: AxisClass) -> str:
    certainty = "known" if one.known else "guessed"
    reason = f": {one.reason}" if one.reason else ""
    same = plain(places(one.where))
    return f"{formula(one.dims)} {'grows' if one.grows else 'is fixed'} ({certainty}{reason}); the same dimension as {same}"


def _uses(table: ScalingTable, rule: WeightRule) -> Iterable[str]:
    for use in rule.uses:
        yield f"{operator_name(use.operator)} at {use.source}"
        yield f"    {_map(use)}" + ("; a looked-up axis counts 1 in fan_in" if use.lookup else "")
    if len(rule.blocks) > 1:
        yield f"the weight is {len(rule.blocks)} maps side by side, each with a norm of its own:"
        yield from (f"    {plain(slice_text(block))}: {_map(block)}" for block in rule.blocks)
    yield from _tie(rule)
    for one in table.contractions:
        if set(rule.names) & set(one.folded):
            yield from _fold(one)


def _fold(one: Contraction) -> Iterable[str]:
    """The factor of a q·k product that this weight carries."""
    needs, has, missing = (formula(value) for value in (1 / one.dim, one.present, 1 / (one.dim * one.present)))
    yield f"{operator_name(one.operator)} at {one.source}"
    yield f"    sums products of two trained activations over {formula(one.dim)}; once they align the sum is of that size, not of its root"
    yield f"    it needs the factor {needs} (Yang et al. 2022, arXiv 2203.03466, Def. 4.1); the model has {has}"
    yield f"    the missing {missing} is in the output RMS of this weight, and the forward stays as it is"


def _map(one: Use | Block) -> str:
    named = {"fan_in": one.fan_in, "fan_out": one.fan_out}
    optional = {"copies": one.copies, "multiplier m": one.multiplier, "input RMS s_x": one.input_scale, "output RMS s_y": one.target}
    named |= {name: value for name, value in optional.items() if value != 1}
    return ", ".join(f"{name} = {formula(value)}" for name, value in named.items())


def _tie(rule: WeightRule) -> Iterable[str]:
    """What reconciles the uses of one weight."""
    multiplier = next((use.multiplier for use in rule.uses if use.multiplier != 1), None)
    if multiplier is not None and len(rule.uses) > 1:
        wants = " and ".join(dict.fromkeys(formula(_at_multiplier_one(use)) for use in rule.uses))
        yield f"one weight, {len(rule.uses)} uses, which want ‖W‖₂ = ‖ΔW‖₂ = {wants}"
        yield f"    init and update ask for the same ratio, so that the one multiplier {formula(multiplier)} on the later use serves both"


def _at_multiplier_one(use: Use) -> sympy.Expr:
    return optimizers.spectral_norm(use.model_copy(update={"multiplier": sympy.Integer(1)}))


# --- the rules' side ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Letters:
    """A map in letters, for the general formula; what is 1 for the block at hand has no letter."""

    fan_in: sympy.Expr
    fan_out: sympy.Expr
    copies: sympy.Expr
    multiplier: sympy.Expr
    input_scale: sympy.Expr
    target: sympy.Expr
    branch: sympy.Expr
    gradient: sympy.Expr
    share: sympy.Expr
    entries: sympy.Expr | None


def _letters(block: Block) -> _Letters:
    optional = {"copies": "copies", "multiplier": "m", "input_scale": "s_x", "target": "s_y"}
    optional |= {"branch": "β", "gradient": "g", "share": "c"}
    letters = {
        name: sympy.Symbol(letter, positive=True) if getattr(block, name) != 1 else sympy.Integer(1) for name, letter in optional.items()
    }
    entries = None if block.entries is None else sympy.Symbol("e", positive=True)
    return _Letters(
        entries=entries, fan_in=sympy.Symbol("fan_in", positive=True), fan_out=sympy.Symbol("fan_out", positive=True), **letters
    )


def _derived(symbol: str, rule: Callable[..., sympy.Expr], block: Block) -> str:
    """`σ = general formula = this block's`, the general one written by the rule itself."""
    return " = ".join(dict.fromkeys((symbol, formula(rule(_letters(block))), formula(decided(rule(block))))))


def _each(kinds: Kinds, says: Callable[[Block], str]) -> Iterable[str]:
    """What is to say of each kind of block, with the blocks' slices where there are several kinds."""
    for blocks in kinds:
        which = f"{', '.join(plain(slice_text(block)) for block in blocks)}: " if len(kinds) > 1 else ""
        yield f"    {which}{says(blocks[0])}"


def _spectral_condition(kinds: Kinds) -> Iterable[str]:
    yield "‖Wx‖_RMS ≤ √(fan_in/fan_out)·‖W‖₂·‖x‖_RMS, nearly with equality for a Gaussian W and for an update ΔW of low rank"
    yield "what comes out, and its change in a step, stays as large as what comes in if ‖W‖₂ and ‖ΔW‖₂ are of the order √(fan_out/fan_in)"
    yield "(Su 2025, Higher-order MuP; Yang et al. 2023, arXiv 2310.17813, Condition 1)"
    yield from _each(kinds, _norm)


def _norm(block: Block) -> str:
    copies = " in each copy" if block.copies != 1 else ""
    if block.share == 1:
        return _derived("‖W‖₂ = ‖ΔW‖₂", optimizers.spectral_norm, block) + copies
    return f"{_derived('‖W‖₂', optimizers.spectral_norm, block)}, {_derived('‖ΔW‖₂', optimizers.update_norm, block)}{copies}"


def _initial(kinds: Kinds) -> Iterable[str]:
    yield "‖W‖₂ ≈ σ(√fan_in + √fan_out) for Gaussian entries of standard deviation σ, where the larger root decides"
    yield "weights that start at zero or at a constant (most biases and gains) keep it"
    yield from _each(kinds, lambda block: _derived("init_std σ", optimizers.init_std, block))


def _rates(kinds: Kinds) -> Iterable[str]:
    yield "the rate η makes η·‖U‖₂ = ‖ΔW‖₂ of an optimizer's update U; the gradient G has low rank, with ‖G‖₂ ≍ 1/‖ΔW‖₂"
    for family, rate in optimizers.LEARNING_RATES.items():
        yield f"{family}: {_summary(rate)}"
        yield from _each(kinds, partial(_rate, family))
    yield f"Adam's ε: {_summary(optimizers.epsilon)}"
    yield from _each(kinds, lambda block: _derived("factor", optimizers.epsilon, block))
    yield f"weight decay: {_summary(optimizers.weight_decay)}"
    yield from _each(kinds, lambda block: _derived("factor", optimizers.weight_decay, block))


def _rate(family: str, block: Block) -> str:
    rate = optimizers.LEARNING_RATES[family]
    norm = formula(optimizers.update_norm(block) / rate(block))
    unused = "; only with matrices='all', as fan_in and fan_out do not both grow" if family == "muon" and block.role != "hidden" else ""
    return f"‖U‖₂ ≍ {norm}, {_derived(f'η_{family}', rate, block)}{unused}"


def _summary(rule: Callable) -> str:
    return " ".join((rule.__doc__ or "").split("\n\n")[0].split())


def _limits(kinds: Kinds) -> Iterable[str]:
    for symbol, quantity in {"σ": "init_std", **{f"η_{family}": family for family in optimizers.LEARNING_RATES}}.items():
        yield from (
            line.strip()
            for line in _each(kinds, lambda block, symbol=symbol, quantity=quantity: _limit_line(symbol, decided(block.quantity(quantity))))
        )
    yield "powers of d in (σ, η_sgd, η_adam), and the column that has them in Yang et al. 2022, arXiv 2203.03466, table 3:"
    yield from _each(kinds, _column)


def _limit_line(symbol: str, expression: sympy.Expr) -> str:
    power, value, resolved = limit(expression)
    scaled = f"{symbol}/{formula(WIDTH**power)}" if power > 0 else f"{formula(WIDTH**-power)}·{symbol}" if power < 0 else symbol
    decided_as = f", as {formula(expression)} is {formula(resolved)} for large d" if resolved != expression else ""
    return f"lim {scaled} = {formula(value)}{decided_as}: {symbol} " + (
        f"∝ {formula(WIDTH**power)}" if power else "tends to a constant" if resolved.has(WIDTH) else "does not depend on d"
    )


def _column(block: Block) -> str:
    powers = tuple(str(block.exponent(name)) for name in ("init_std", "sgd", "adam"))
    unusual = "none, as the multiplier or the RMS of its input or output is not 1"
    return f"({', '.join(powers)}): {TP5_TABLE_3.get(powers, unusual)}; role {block.role!r}"


def _depth(residual: Residual, rule: WeightRule) -> Iterable[str]:
    """What a weight in a residual branch, or on a stream that repeats, is asked for (THEORY 4.1)."""
    block, beta = rule.blocks[0], DEPTH**-residual.alpha
    branch = next((one for one in residual.branches if rule.name in one.weights), None)
    if branch is None and block.share == 1:
        yield "outside of the residual branches: no factor of L (Dey et al. 2025, arXiv 2505.01618, table 1)"
        return
    yield f"L = {residual.size} residual branches join the stream, each times {formula(beta)}: being independent at init, they"
    yield "    stay bounded for α ≥ 1/2; their changes in a step are aligned and add up, so that each changes its output by c = 1/(L·L^-α)"
    if branch is not None:
        yield f"this weight acts through the branch added at {branch.source}"
    carried = f"β = {formula(block.branch)} is in its own size" if block.branch != 1 else "what comes behind it carries the multiplier"
    yield f"    {carried}; its gradient has g = {formula(block.gradient)}; its change has c = {formula(block.share)}"
    if rule.name in residual.shared:
        yield f"    every repeat uses this one weight: {formula(block.gradient / beta)} gradients add up, which g counts"
    yield "(Bordelon et al. 2024, arXiv 2405.15712; Dey et al. 2025, arXiv 2505.01618, table 1; Yang et al. 2023, arXiv 2310.02244)"


STEPS: tuple[tuple[str, Callable[[Kinds], Iterable[str]]], ...] = (
    ("The spectral condition", _spectral_condition),
    ("The initial entries", _initial),
    ("The learning rates", _rates),
    ("The limit d→∞", _limits),
)
"""What follows from the uses."""
