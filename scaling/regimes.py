"""The regime a parametrization trains in, by the theorems of Tensor Programs IV and IVb: muP, feature learning, kernel, unstable, trivial.

The theorems are stated here in excesses over muP: the power of d by which a layer's init, and its change in a step, are larger than
muP has them. In these every layer before the last looks alike, whatever its shape, and a model is one list of layers before the last,
one of last layers, and one of products of two activations (q·k), which are last layers without a weight.

Yang & Hu 2021, arXiv 2011.14522, theorems 3.3, 3.4, 5.6 (SGD); Yang & Littwin 2023, arXiv 2308.01814, 2.25-2.28 (entrywise optimizers).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import sympy

from scaling import optimizers
from scaling.errors import ScalingError
from scaling.limits import WIDTH, exact
from scaling.parametrizations import OptimizerClass, class_of, order
from scaling.records import Block

__all__ = ["REGIMES", "Excess", "Regime", "classify", "maximal_rates", "regime_of"]

INFINITY = sympy.oo
HALF = sympy.Rational(1, 2)
ZERO = sympy.Integer(0)

REGIMES: dict[str, str] = {
    "mup": "muP: stable, every weight is updated maximally and the readout initialised maximally",
    "mup_zero_readout": "muP with a readout that starts at zero: stable, every weight is updated maximally",
    "feature_not_maximal": "stable and learns features, but not every weight is at the size muP has it",
    "kernel": "stable, but features do not move as the width grows: the kernel (operator) regime",
    "unstable_logits": "features are stable, but what is read out of them, the logits, diverges with width",
    "unstable": "activations, or their change in a step, do not stay of order 1 as the width grows",
    "trivial": "stable, but the function does not move as the width grows",
}
"""Verdict -> what it says."""


class Excess(NamedTuple):
    """The powers of d by which a layer exceeds muP at init (-∞: starts at zero) and by its own update from a gradient of muP's size.

    `degree` is that of the optimizer in the gradient, by which a gradient larger than muP's enlarges the update.
    """

    init: sympy.Expr
    update: sympy.Expr
    degree: sympy.Expr = ZERO


class Regime(NamedTuple):
    """A verdict of `REGIMES`, and r: features move d^-r of what muP moves them in a step. `layers` is r for each layer before the last."""

    verdict: str
    r: sympy.Expr
    layers: tuple[sympy.Expr, ...]


def regime_of(
    inner: Sequence[Excess],
    readouts: Sequence[Excess],
    products: Sequence[sympy.Expr] = (),
    finite: Sequence[Excess] = (),
    factors: Sequence[Excess] = (),
) -> Regime:
    """The regime of a model.

    Args:
        inner: the layers before the last.
        readouts: the maps from a growing to a finite number of coordinates.
        products: of each product of two activations summed over a growing axis, the power of d that it is larger than in muP.
        finite: weights with no growing axis that are added to what is read out; they move the function, but no feature.
        factors: layers before the last whose gradient comes through such a product (q of q·k), by how much of their own size they move.

    Returns:
        The regime. r = min_l (-update_l - degree_l·g) over the layers before the last, with g the larger of the readouts' excesses at
        init and by update: the gradient comes through the readouts.
    """
    gradient = max((excess for out in readouts for excess in (out.init, out.update)), default=ZERO)
    layers = tuple(_moves(layer, gradient) for layer in inner)
    r = min(layers, default=ZERO)
    # features that move d^-r less are d^-r less aligned with the gradient that a product sums them against
    layers += tuple(_moves(layer, gradient - max(ZERO, min(HALF, r))) for layer in factors)
    r = min(layers, default=ZERO)
    if any(layer.init != 0 for layer in inner) or r < 0:
        return Regime("unstable", r, layers)
    return Regime(_stable(readouts, products, finite, r, layers), r, layers)


def _moves(layer: Excess, gradient: sympy.Expr) -> sympy.Expr:
    """The power of 1/d by which a layer moves less than in muP."""
    return -layer.update - (layer.degree * gradient if layer.degree != 0 else 0)


def _stable(
    readouts: Sequence[Excess], products: Sequence[sympy.Expr], finite: Sequence[Excess], r: sympy.Expr, layers: tuple[sympy.Expr, ...]
) -> str:
    """The verdict where activations and their changes are stable."""
    outputs = [*readouts, *finite]
    if any(excess > min(HALF, r) for excess in (*(out.init for out in readouts), *products)):
        return "unstable_logits"
    if any(out.update > 0 for out in outputs) or any(out.init > 0 for out in finite):
        return "unstable_logits"
    if readouts and not any(out.init == r or out.update == 0 for out in readouts):
        return "trivial"
    if r > 0:
        return "kernel"
    if any(excess != 0 for excess in (*layers, *products, *(out.update for out in outputs))):
        return "feature_not_maximal"
    if any(out.init not in {0, -INFINITY} for out in readouts):
        return "feature_not_maximal"
    return "mup" if all(out.init == 0 for out in readouts) else "mup_zero_readout"


# --- abc lists: a chain of layers ---------------------------------------------------------------------------------------------------


def _layers(count: int) -> tuple[Block, ...]:
    """Input, hidden…, output: d of everything that grows, 1 of everything else."""
    if count < 2:
        message = f"abc lists name at least an input and an output layer: [a_1, …, a_L+1], got {count} of them"
        raise ScalingError(message)
    inputs, hidden, output = ((1, WIDTH), (WIDTH, WIDTH), (WIDTH, 1))
    fans = [inputs, *[hidden] * (count - 2), output]
    return tuple(Block(fan_in=exact(i), fan_out=exact(o), axes=()) for i, o in fans)


@cache
def _wanted(count: int, found: OptimizerClass) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """(a + b, (1 + p)·a + c) that muP has at every layer, from the spectral condition; for relative steps the second is a + b + c."""
    out = []
    for layer in _layers(count):
        sigma = optimizers.init_std(layer)
        init, rate = -order(sigma), -order(found.rate(layer, sigma))
        out.append((init, rate + init if found.relative else rate))
    return out


def classify(a: Sequence[object], b: Sequence[object], c: Sequence[object], optimizer: str = "sgd") -> Regime:
    """The regime of a chain of layers W^l = d^-a_l·w^l, w^l ~ N(0, d^-2b_l), learning rate d^-c_l.

    Args:
        a: of the layers [input, hidden…, output]: rationals, or their text ("1/2").
        b: likewise; "oo" or `sympy.oo` for a layer that starts at zero.
        c: likewise.
        optimizer: of `CLASSES`.

    Raises:
        ScalingError: if the lists differ in length, or are shorter than two.
        UnknownName: for an unknown optimizer.

    >>> classify([0, "1/2", "1/2"], [0, 0, 0], [0, 0, 0], "sgd")[:2]
    ('kernel', 1/2)
    """
    found = class_of(optimizer)
    if not len(a) == len(b) == len(c):
        message = f"a, b and c have {len(a)}, {len(b)} and {len(c)} layers; each has one entry per layer, [input, hidden…, output]"
        raise ScalingError(message)
    layers = []
    for (init, update), ai, bi, ci in zip(_wanted(len(a), found), map(_power, a), map(_power, b), map(_power, c), strict=True):
        moved = ai + bi + ci if found.relative else (1 + found.degree) * ai + ci
        layers.append(Excess(init - (ai + bi), update - moved, found.degree))
    return regime_of(layers[:-1], layers[-1:])


def _power(value: object) -> sympy.Expr:
    return INFINITY if value in ("oo", "inf", INFINITY) else exact(value)


def maximal_rates(a: Sequence[object], b: Sequence[object], optimizer: str = "adam") -> tuple[sympy.Expr, ...]:
    """The c of the largest stable learning rates d^-c for given multipliers and inits, if updates are fully aligned.

    Every layer then moves as much as muP moves it, whatever the readout's init (Everett et al. 2024, arXiv 2407.05872, full alignment).

    Raises:
        ScalingError: if the lists differ in length, or are shorter than two.
        UnknownName: for an unknown optimizer.

    >>> maximal_rates([0, 0, 0], [0, "1/2", "1/2"], "sgd")
    (-1/2, 1/2, 1)
    """
    found = class_of(optimizer)
    _, wanted = _wanted(len(a), found)[-1]
    last = wanted - ((1 + found.degree) * _power(a[-1]) + (_power(b[-1]) if found.relative else 0))
    slack = classify(a, b, [*[0] * (len(a) - 1), last], optimizer).layers
    return (*(-r for r in slack), last)
