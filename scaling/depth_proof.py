"""What a parametrization has to hold to in depth: the stream stays bounded, and changes that add up over L do not depend on L (THEORY 4.1).

Every obligation is decided in the powers of L alone, for any law: β, the multiplier a branch really has, is what its forward and its last
maps make of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath

import sympy

from scaling import optimizers
from scaling.folding import fold, template
from scaling.limits import DEPTH, leading
from scaling.notation import formula
from scaling.parametrizations import ADAPTIVE, class_of, family_of
from scaling.records import Branch, Law, Residual, ScalingTable, WeightRule
from scaling.verdict import STATEMENTS, Obligation

__all__ = ["depth_obligations", "in_depth_too"]

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)
Laws = Mapping[str, tuple[Law, ...]]


def depth_obligations(table: ScalingTable, laws: Laws, family: str) -> Iterator[Obligation]:
    """The obligations of depth of a table's model under the laws: of its branches, and of every weight in and outside of them."""
    if table.residual is None:
        return
    branches: dict[object, list[Branch]] = {}
    for branch in table.residual.branches:
        carried = tuple(laws[name] for name in branch.folded)
        key = (branch.source.line, branch.scale, branch.present, tuple(map(template, branch.folded)), carried)
        branches.setdefault(key, []).append(branch)
    for group in branches.values():
        yield _stream(table, laws, group)
    weights: dict[object, list[WeightRule]] = {}
    for rule in table:
        behind = _behind(rule, table, laws)
        weights.setdefault((tuple(map(template, rule.names)), laws[rule.name], behind, _times(rule, table.residual)), []).append(rule)
    for rules in weights.values():
        yield from _weight(table, laws, rules, family)


def in_depth_too(one: Obligation) -> Obligation:
    """An obligation of two sides that has to hold in L as well as in d."""
    if one.lhs is None or one.rhs is None or one.lhs == 0 or one.rhs == 0 or not one.proven:
        return one
    power = leading(one.lhs / one.rhs, DEPTH)[1]
    if power == 0:
        return one
    cure = f"its sides differ by {formula(DEPTH**power)} in depth"
    return one.model_copy(update={"proven": False, "by": f"ratio ~ {formula(DEPTH**power)} as L → ∞", "cure": cure})


# --- the stream at init -------------------------------------------------------------------------------------------------------------


def _stream(table: ScalingTable, laws: Laws, group: list[Branch]) -> Obligation:
    """β is at most 1/√L, or 1/L where every branch has the same random weights."""
    first = group[0]
    aligned = table.residual is not None and all(name in table.residual.shared for name in first.weights)
    bound = 1 / (DEPTH if aligned else sympy.sqrt(DEPTH))
    label = ", ".join(fold(name for branch in group for name in branch.folded[:1])) or first.source.code
    return _decided("stream", f"branches ending in {label}", _beta(first, laws), bound, first, (), "the branch multiplier")


def _beta(branch: Branch, laws: Laws) -> sympy.Expr:
    """The multiplier a branch really has at init, as a power of L: in its forward, and in its last maps."""
    beta = branch.present * branch.forward
    for name in branch.folded:
        found = [law for law in laws[name] if law.init_std not in (None, 0)]
        if found:
            assert found[0].init_std is not None
            return beta * DEPTH ** leading(found[0].multiplier * found[0].init_std, DEPTH)[1]
    return beta if not branch.folded else branch.scale


# --- the change of every weight -----------------------------------------------------------------------------------------------------


def _behind(rule: WeightRule, table: ScalingTable, laws: Laws) -> sympy.Expr:
    """The multiplier that a branch has behind a weight: what its gradient carries."""
    residual = table.residual
    branch = next((one for one in residual.branches if rule.name in one.weights), None) if residual is not None else None
    if branch is None:
        return ONE
    return branch.present * branch.forward if rule.name in branch.folded else _beta(branch, laws)


def _times(rule: WeightRule, residual: Residual | None) -> tuple[sympy.Expr, sympy.Expr]:
    """How many uses of a weight and how many repeats of its kind add up: (1, 1), (1, L) in a branch, (L, L) where shared."""
    block = rule.blocks[0]
    if residual is None or (block.share == 1 and block.gradient == 1 and rule.name not in residual.weights):
        return ONE, ONE
    return (DEPTH if rule.name in residual.shared else ONE), DEPTH


def _weight(table: ScalingTable, laws: Laws, rules: list[WeightRule], family: str) -> Iterator[Obligation]:
    rule, label = rules[0], ", ".join(fold(rule.name for rule in rules))
    names = tuple(rule.name for rule in rules)
    behind, (uses, repeats) = _behind(rule, table, laws), _times(rule, table.residual)
    branch = next((one for one in table.residual.branches if rule.name in one.weights), None) if table.residual is not None else None
    block, law = rule.blocks[0], laws[rule.name][0]
    found = class_of(family_of(block, family))
    own = block.model_copy(update={"multiplier": law.multiplier, "branch": ONE, "share": ONE, "gradient": behind * uses})
    wanted = optimizers.spectral_norm(own) * law.multiplier / (repeats * behind)
    yield _decided("changes", label, found.update(law, own), wanted, branch, names, f"{family} lr")
    if family_of(block, family) in ADAPTIVE:
        yield _decided("deep eps", label, law.eps, optimizers.epsilon(own), branch, names, "ε")
    yield _decided("deep decay", label, law.lr * law.weight_decay, ONE, branch, names, "weight decay")


EFFECTS = {
    "stream": "the stream grows as {} at init; L^-1 on every branch cures it",
    "changes": "the changes of the stream follow {}",
    "deep eps": "it follows {} of the gradient, which carries the multiplier of the branch",
    "deep decay": "the fraction decayed per step follows {}",
}


def _decided(
    name: str, weight: str, lhs: sympy.Expr, rhs: sympy.Expr, branch: Branch | None, names: tuple[str, ...], what: str
) -> Obligation:
    """An obligation on lhs/rhs in L: proven iff no power of it is left, or for the stream none that grows; 0 is no step to judge."""
    power = leading(lhs / rhs, DEPTH)[1] if lhs != 0 else ZERO
    proven = bool(power <= 0 if name == "stream" else power == 0)
    left = formula(DEPTH**power)
    too = f"{what} is {formula(DEPTH ** abs(power))} too {'large' if power > 0 else 'small'}"
    return Obligation(
        name=name,
        weight=weight,
        statement=STATEMENTS[name].text,
        lhs=lhs,
        rhs=rhs,
        proven=proven,
        by=f"ratio ~ {left}" if power != 0 else "ratio without L",
        excess=power,
        names=names,
        where=f"{PurePath(branch.source.file).name}:{branch.source.line}" if branch is not None else "",
        cure="" if proven else f"{too}: {EFFECTS[name].format(left)}",
    )
