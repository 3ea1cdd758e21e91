"""Coefficients of the msign iteration: made by Remez exchange and composition, kept as data.

Every level is a list of odd quintics x ← a·x + b·x³ + c·x⁵ whose composition takes [lower, 1] close to 1. Each quintic is the best
approximation of 1 on the interval its predecessor leaves, which is optimal among compositions (Amsel et al. 2025, arXiv 2505.16932,
Thm 3.1; Grishina et al. 2025, arXiv 2506.10935). `tests/test_coefficients.py` makes the data again and compares.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mpmath

__all__ = ["MARGIN", "SCHEDULES", "Schedule", "compose", "remez_odd"]

MARGIN = 1.02
"""Before the iteration X is divided by MARGIN·‖X‖_F, so that rounding never lifts a singular value out of the interval."""

Number = Any
"""An mpmath number; mpmath has no types."""

Quintic = tuple[float, float, float]


class Schedule(NamedTuple):
    """The steps of one accuracy level.

    Attributes:
        lower: the smallest σ/‖X‖_F that the level takes to `image`.
        image: where [lower, 1] goes, MARGIN included.
        restarts: steps before which the Gram form computes X·Xᵀ anew.
        steps: (a, b, c) of each quintic.
    """

    lower: float
    image: tuple[float, float]
    restarts: tuple[int, ...]
    steps: tuple[Quintic, ...]


def remez_odd(lower: float, upper: float, degree: int = 5) -> tuple[list[Number], Number]:
    """The odd polynomial of `degree` closest to 1 on [lower, upper] in the maximum norm, by the exchange algorithm.

    Args:
        lower: start of the interval, above 0.
        upper: its end.
        degree: odd.

    Returns:
        Coefficients of x, x³, x⁵, …, and the error, which is reached with alternating sign at (degree + 3)/2 points (Chebyshev).
    """
    with mpmath.workdps(40):
        lower, upper = mpmath.mpf(lower), mpmath.mpf(upper)
        size = (degree + 1) // 2
        points = [lower + (upper - lower) * (1 - mpmath.cos(mpmath.pi * i / size)) / 2 for i in range(size + 1)]
        while True:
            system = mpmath.matrix([[x ** (2 * j + 1) for j in range(size)] + [(-1) ** i] for i, x in enumerate(points)])
            *polynomial, error = mpmath.lu_solve(system, mpmath.matrix([1] * (size + 1)))
            derivative = [(2 * j + 1) * c for j, c in enumerate(polynomial)]
            squares = mpmath.polyroots(derivative[::-1], maxsteps=500, extraprec=200)
            extrema = [lower, *sorted(mpmath.sqrt(mpmath.re(t)) for t in squares), upper]
            if max(abs(new - old) for new, old in zip(extrema, points, strict=True)) < mpmath.mpf(10) ** -25:
                return polynomial, abs(error)
            points = extrema


def compose(lower: float, steps: int, *, cushion: float = 0.0, safety: float = 1.0) -> list[Quintic]:
    """Quintics whose composition is the greedy, hence best, approximation of 1 on [lower, 1].

    Args:
        lower: start of the interval.
        steps: how many quintics.
        cushion: each quintic is fitted on [max(l, cushion·u), u] and centred on [l, u] again (2505.16932, §4.4).
        safety: all but the last quintic are p(x/safety) instead of p(x): room for rounding above 1 (ibid.).

    >>> [[round(c, 4) for c in step] for step in compose(1e-3, 2, cushion=0.02407327424182761)]
    [[8.2872, -23.5959, 17.3004], [4.1071, -2.9478, 0.5448]]
    """
    with mpmath.workdps(40):
        low, high, out = mpmath.mpf(lower), mpmath.mpf(1), []
        for step in range(steps):
            fitted, _ = remez_odd(max(low, cushion * high), high)
            centre = 2 / (_value(fitted, low) + _value(fitted, high)) if cushion * high > low else 1
            fitted = [c * centre for c in fitted]
            low = _value(fitted, low)
            high = 2 - low
            room = mpmath.mpf(safety) if step < steps - 1 else 1
            a, b, c = (float(c / room ** (2 * j + 1)) for j, c in enumerate(fitted))
            out.append((a, b, c))
    return out


def _value(polynomial: list[Number], x: Number) -> Number:
    return mpmath.fsum(c * x ** (2 * j + 1) for j, c in enumerate(polynomial))


SCHEDULES: dict[str, Schedule] = {
    "fast": Schedule(
        lower=0.01,
        image=(0.96633, 1.01253),
        restarts=(2,),
        steps=(
            (7.934675012302213, -22.25805905046351, 15.801517152794792),
            (3.5652799551559236, -2.5649323663305488, 0.48596650423797677),
            (2.6091176331148036, -1.8631168648225658, 0.4099486248511571),
            (1.9561716388844537, -1.3375077459440723, 0.38385270132987975),
        ),
    ),
    "default": Schedule(
        lower=0.003,
        image=(0.97772, 1.00494),
        restarts=(2,),
        steps=(
            (8.219287855807027, -23.33746622525889, 16.62657464895917),
            (3.964137680098459, -2.837714184063382, 0.5158247011165699),
            (3.4368339384744053, -2.475154574426598, 0.47616026227121194),
            (2.4412901367100543, -1.7284783781809707, 0.39565465283820717),
            (1.9177762487314514, -1.2967501911246466, 0.3797048753985863),
        ),
    ),
    "high": Schedule(
        lower=0.001,
        image=(0.98984, 1.00092),
        restarts=(3,),
        steps=(
            (8.304243925341243, -23.659899573563212, 16.873108874933845),
            (4.1008178267587665, -2.9293984872798178, 0.5258733596918398),
            (3.8841738029035286, -2.783680245870158, 0.5099048152292848),
            (3.2221433500274115, -2.3225608311766233, 0.459529494934574),
            (2.229166661209842, -1.549800197424133, 0.3769569458065244),
            (1.8887161973518292, -1.265157225338601, 0.3765189255574907),
        ),
    ),
    "exact": Schedule(
        lower=0.0001,
        image=(0.99811, 1.00002),
        restarts=(2, 4, 6),
        steps=(
            (8.343024806457134, -23.807118105810464, 16.985684241031496),
            (4.166248508747919, -2.973004809720837, 0.530653898512894),
            (4.142276657625337, -2.957049357981258, 0.5289046358177966),
            (4.043959497053331, -2.891358200094601, 0.521703621669939),
            (3.684323858630292, -2.647241532671528, 0.49496758299192306),
            (2.8001740600898124, -2.010968851700591, 0.42579380767941444),
            (1.9809807997805644, -1.3227577915608462, 0.35384538497520085),
            (1.8758751004808887, -1.2509719904811063, 0.3750972123419799),
        ),
    ),
}
"""Accuracy level -> its quintics: `compose(lower, len(steps), safety=1.02)`."""
