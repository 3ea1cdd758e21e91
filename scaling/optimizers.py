"""LEARNING_RATES: for every optimizer family, the learning-rate factor that keeps ‖m·ΔW‖₂ at (s_y/s_x)·√(fan_out/fan_in).

The derivation (Su Jianlin 2025, "Higher-order MuP: spectral condition"; Yang et al. 2023, arXiv 2310.17813): a low-rank
gradient of y = m·W·x has ‖G‖₂ ≍ m·(s_x/s_y)·√(fan_in/fan_out). Each optimizer turns G into an update U, and the factor η solves
η·‖U‖₂ = (s_y/s_x)·√(fan_out/fan_in)/m. A new optimizer is one function here.

In residual branches (THEORY 4): `branch` is the part of the branch's multiplier L^-α that the weight carries in its own size,
`gradient` what L^-α makes of its gradient, and `share` the part of a change that each of L branches, which add up, may make.
Outside they are 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import sympy

__all__ = [
    "DEGREES",
    "LEARNING_RATES",
    "attained",
    "epsilon",
    "init_std",
    "spectral_norm",
    "update_norm",
    "weight_decay",
]


class Map(Protocol):
    """One linear map y = m·W·x: what every rule is a function of."""

    @property
    def fan_in(self) -> sympy.Expr: ...
    @property
    def fan_out(self) -> sympy.Expr: ...
    @property
    def copies(self) -> sympy.Expr: ...
    @property
    def multiplier(self) -> sympy.Expr: ...
    @property
    def input_scale(self) -> sympy.Expr: ...
    @property
    def target(self) -> sympy.Expr: ...
    @property
    def branch(self) -> sympy.Expr: ...
    @property
    def entries(self) -> sympy.Expr | None: ...
    @property
    def gradient(self) -> sympy.Expr: ...
    @property
    def share(self) -> sympy.Expr: ...


def _gain(use: Map) -> sympy.Expr:
    return use.target * use.branch / (use.input_scale * use.multiplier)


def spectral_norm(use: Map) -> sympy.Expr:
    """‖W‖₂ and ‖ΔW‖₂ as wanted: (s_y/(s_x·m))·√(fan_out/fan_in) (Yang et al. 2023, arXiv 2310.17813, Condition 1)."""
    return _gain(use) * sympy.sqrt(use.fan_out / use.fan_in)


def update_norm(use: Map) -> sympy.Expr:
    """‖ΔW‖₂ as wanted: ‖W‖₂, of which a weight in one of L residual branches moves its share (THEORY 4.1)."""
    return spectral_norm(use) * use.share


def init_std(use: Map) -> sympy.Expr:
    """σ of Gaussian entries: √(1/fan_in · min(1, fan_out/fan_in)), from ‖W‖₂ ≈ σ(√fan_in + √fan_out).

    Su 2025; Yang et al. 2023, arXiv 2310.17813, §4.

    With fan_in = 1 the minimum is 1: fan_out is a count. Where the model divides the weight by its own norm, any σ is as good as another,
    and the rates go with it: it is that of the `entries` it is left with.
    """
    return _gain(use) * sympy.sqrt(_wide(use) / use.fan_in) if use.entries is None else use.entries


def _wide(use: Map) -> sympy.Expr:
    return sympy.Integer(1) if use.fan_in == 1 else sympy.Min(1, use.fan_out / use.fan_in)


def attained(use: Map) -> tuple[sympy.Expr, sympy.Expr]:
    """The size of the output of a map whose `entries` are given: of independent entries, as at init, and of those aligned with the input.

    Both are ‖W‖₂ ≈ entries·(√fan_in + √fan_out) times the input's norm, spread over fan_out outputs or all in one direction.
    """
    assert use.entries is not None
    independent = use.entries * use.input_scale * sympy.sqrt(use.fan_in)
    return independent, independent / sympy.sqrt(_wide(use))


def sgd(use: Map) -> sympy.Expr:
    """U = G: ‖U‖₂ ≍ √(fan_in/fan_out), and each of `copies` maps sees its share (Yang et al. 2022, arXiv 2203.03466, table 3)."""
    return _gain(use) ** 2 * use.copies * use.fan_out / use.fan_in * use.share / use.gradient


def adam(use: Map) -> sympy.Expr:
    """U sign-like and of low rank: ‖U‖₂ ≍ √(fan_in·fan_out) (Yang et al. 2022, arXiv 2203.03466, table 3)."""
    return _gain(use) / use.fan_in * use.share


def muon(use: Map) -> sympy.Expr:
    """U = msign(G), G/‖G‖₂ or SVC(G): ‖U‖₂ = 1 (Su 2025; Yang et al. 2023, arXiv 2310.17813)."""
    return update_norm(use)


LEARNING_RATES: dict[str, Callable[[Map], sympy.Expr]] = {"sgd": sgd, "adam": adam, "muon": muon}
"""Family -> factor on the nominal learning rate. "adam" covers every sign-like update, "muon" every update of unit spectral norm."""

DEGREES: dict[str, int] = {"sgd": 1, "adam": 0, "muon": 0}
"""Degree p of the update in the gradient: the abc shift by θ divides the learning rate by θ^(1+p).

Yang et al. 2022, arXiv 2203.03466, lemma J.1.
"""


def epsilon(use: Map) -> sympy.Expr:
    """ε follows the size of a gradient entry, m·s_x/(s_y·copies·fan_out) (Yang & Littwin 2023, arXiv 2308.01814, lemma 2.8.11)."""
    return use.gradient / (_gain(use) * use.copies * use.fan_out)


def weight_decay(use: Map, family: str = "adam") -> sympy.Expr:
    """λ of lr-coupled decay (W ← W − η·λ·W) that keeps η·λ, the fraction decayed per step, independent of width: 1/η."""
    return 1 / LEARNING_RATES[family](use)
