"""What a model's own initial weights say: of depth, GPT-2's 0.02/√(2·layers); of width, a gain that starts at √d."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import sympy
from torch import Tensor, nn

from scaling.limits import DEPTH, WIDTH
from scaling.notation import formula
from scaling.records import Residual, WeightRule

__all__ = ["init_only_note", "wide_constants"]

CLOSE = 0.1
"""Relative; the standard deviation of a matrix of 64 × 64 random entries is known to 1 %, of 16 × 16 to 5 %."""


def init_only_note(model: nn.Module, residual: Residual, rules: Iterable[WeightRule], size: int) -> tuple[str, ...]:
    """A note if the last matrix of every branch starts 1/√L of the others in it, which is no branch multiplier.

    It keeps the stream bounded at init and does nothing for the updates, which still grow with L (THEORY 4.4, P37; Radford et al. 2019).
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    fans = {rule.name: rule.blocks[0].fan_in.subs({WIDTH: size, DEPTH: residual.size}) for rule in rules if rule.blocks[0].fan_in != 1}
    sizes = {name: float(weights[name].detach().square().mean().sqrt()) for name in fans if name in weights and not weights[name].is_meta}
    small, ratios = 1 / math.sqrt(residual.size), []
    for branch in residual.branches:
        last = next((name for name in branch.folded if sizes.get(name)), None)
        other = next((name for name in branch.weights if sizes.get(name) and name not in branch.folded), None)
        if last is not None and other is not None:
            ratio = sizes[last] / sizes[other]
            ratios.append((ratio, ratio * math.sqrt(fans[last] / fans[other])))
    plain = all(_is(1, pair) for pair in ratios)
    if residual.size < 2 or not ratios or plain or not all(_is(small, pair) for pair in ratios):
        return ()
    return (
        f"the last matrix of every branch starts 1/√L = 1/√{residual.size} as large as the others (as GPT-2's 0.02/√(2·layers)): that is a "
        "rule for the init alone and no branch multiplier, as updates still add up over L; the init and learning rates here take its place",
    )


def wide_constants(models: Sequence[nn.Module], rules: Iterable[WeightRule], sizes: Sequence[int]) -> tuple[str, ...]:
    """Notes on gains and scalars that start at a constant that follows the width (ScaleNorm's g = √d): to a rule a gain starts at 1."""
    named = [dict(model.named_parameters(remove_duplicate=False)) for model in models]
    notes = []
    for rule in rules if len(models) == len(sizes) and len(set(sizes)) > 1 else ():
        starts = [_constant(weights.get(rule.name)) for weights in named] if len(rule.dims) < 2 else [None]
        values = [start for start in starts if start]
        if len(values) < len(sizes):
            continue
        narrow, wide = sizes.index(min(sizes)), sizes.index(max(sizes))
        power = math.log(values[wide] / values[narrow]) / math.log(sizes[wide] / sizes[narrow])
        nearest = sympy.Rational(round(2 * power), 2)
        if nearest and abs(power - nearest) < 1e-3:
            law = formula(WIDTH**nearest)
            notes.append(
                f"{rule.name} starts at {law}, up to a constant, and its rules are those of a gain that starts at 1: start it there and"
                f" multiply by {law} in the forward, where the layers around it make up for a number"
            )
    return tuple(notes)


def _constant(weight: Tensor | None) -> float | None:
    """The positive number that all entries are."""
    if weight is None or weight.is_meta or not weight.numel():
        return None
    entries = weight.detach()
    first = float(entries.flatten()[0])
    return first if first > 0 and bool((entries == first).all()) else None


def _is(value: float, pair: tuple[float, float]) -> bool:
    """Whether the ratio of two standard deviations, as it is or without their fans, is the value."""
    return any(math.isclose(ratio, value, rel_tol=CLOSE) for ratio in pair)
