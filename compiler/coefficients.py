"""Coefficients of the msign iteration: made by Remez exchange, composition and search, kept as data.

Every level is a few odd polynomials whose composition takes [lower, 1] close to 1, each a best approximation of 1 on the interval its
predecessor leaves. Either quintics x ← a·x + b·x³ + c·x⁵, for which that is optimal among compositions (Amsel et al. 2025, arXiv
2505.16932, Thm 3.1; Grishina et al. 2025, arXiv 2506.10935), or polynomials of degree 2ᴺ⁺¹ + 1 by N products (`compiler.programs`): two
of N = 5 do what five quintics do, with 10 products of symmetric matrices instead of 14. The tests make the data again and compare.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mpmath

from compiler.programs import UNIT, Product

__all__ = ["MARGIN", "SCHEDULES", "Schedule", "compose", "quintics", "remez_odd"]

MARGIN = 1.02
"""Before the iteration X is divided by MARGIN·s, s = (Σ σ⁴)^¼ = √‖X·Xᵀ‖_F: its Schatten 4-norm, between σ₁ and ‖X‖_F, is at hand."""

ROOM = 0.98
"""Where the image of the first of two programs ends. In half precision rounding lifts some singular values beyond: by one percent where
it averages out, by 17 % in the worst of the matrices that hill climbing has found (four rows hold nearly all of each). R = X·Xᵀ is off
by up to ε = 2⁻¹¹·‖R‖_F, and of σ becomes σ·q(σ² - ε) instead of σ·q(σ²): that is up to 1.25 times the largest image there should be, for
σ about √ε, where the "default" and "high" q are near their maximum of 50. `Schedule.held` says what the second program makes of it."""

Number = Any
"""An mpmath number; mpmath has no types."""

Quintic = tuple[float, float, float]


class Schedule(NamedTuple):
    """The polynomials of one accuracy level.

    Attributes:
        lower: the smallest σ/s that the level takes to `image`.
        upper: the largest; above 1 to allow for rounding, and such that σ = s, where nearly all of a matrix near rank 1 is, goes to the
            upper end of the image.
        held: what a singular value may be after the first program and still not leave `image` upwards; one beyond 1 may fall below
            it, to 0.27. That bounds the result whatever half precision does to the first program.
        image: where [lower, upper] goes, MARGIN included.
        unit: R is unit·X·Xᵀ in the chunks.
        chunks: the products of each polynomial q of R, by the rule of `compiler.programs`; X becomes q(R)·X.
    """

    lower: float
    upper: float
    held: float
    image: tuple[float, float]
    unit: float
    chunks: tuple[tuple[Product, ...], ...]


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


def quintics(*steps: Quintic) -> tuple[tuple[Product, ...], ...]:
    """Each quintic as a chunk of one product: a·X + b·X³ + c·X⁵ = (c·R² + b·R + a·I)·X."""
    return tuple(((c, b, 0.0, a),) for a, b, c in steps)


SCHEDULES: dict[str, Schedule] = {
    "fast": Schedule(
        lower=0.008688,
        upper=1.06335,
        held=1.12,
        image=(0.99142, 1.00858),
        unit=UNIT,
        chunks=(
            (
                (0.010928191197792585, -3.345215656278112, 0.0, 0.0),
                (0.012831137213860571, 3.63281097648018, 0.022406513691774887, 0.0),
                (0.010207918352246482, 3.297523707623528, -0.18913860034872956, 0.0),
                (0.0006063435616604442, 0.23172212015825888, -0.0038457922248936196, 23.37253024758464),
            ),
            (
                (-0.005549581717439397, 2.3838564719697692, -0.0, -0.0),
                (0.0026474069195968775, -1.3093613801525863, -0.3675958635937609, 0.0),
                (-0.012572394615460053, -3.9862937338402444, -0.4661527154071178, -0.0),
                (5.652947329613087e-05, -0.03389430085971572, -0.018650860447410954, 8.172557612869163),
            ),
        ),
    ),
    "default": Schedule(
        lower=0.003314,
        upper=1.0608,
        held=1.2,
        image=(0.99428, 1.00572),
        unit=UNIT,
        chunks=(
            (
                (-0.012535031451258439, 3.5827185499906533, 0.0, 0.0),
                (-0.012212286421684891, 3.537899956739361, -0.004770558295341569, 0.0),
                (-0.012188562926437035, 3.540018732906487, -0.021003278600142103, 0.0),
                (0.009356023330465238, -3.189862617839398, 0.267111742476125, 0.0),
                (0.001196653198687189, 0.4536209469096992, -0.005470581693462384, 44.63211225069206),
            ),
            (
                (-0.0023498626573886707, 1.6015648402914997, 0.0, 0.0),
                (-0.008059576699374927, 2.346950465060143, 0.6601867765454391, 0.0),
                (0.005786240232451603, -3.030218041750617, 1.2010098076925713, 0.0),
                (-0.005150705273045218, -2.947009677418514, -1.2381547362131846, 0.0),
                (7.304934133218215e-05, -0.04620588608893594, -0.05860842067558793, 11.719695688326743),
            ),
        ),
    ),
    "high": Schedule(
        lower=0.000865,
        upper=1.05825,
        held=1.2,
        image=(0.99716, 1.00284),
        unit=UNIT,
        chunks=(
            (
                (-0.012651133741448033, 3.599272280840878, 0.0, 0.0),
                (-0.012515935741709176, 3.5842445376367884, -0.012747919136116488, 0.0),
                (-0.012569894694318663, 3.5878514995572135, -0.0004596313472721173, 0.0),
                (0.009500364034515636, -3.210571049479827, 0.2629830407802302, 0.0),
                (0.0013041372950622395, 0.4869916112548373, -0.0023876441919559064, 46.176786261240636),
            ),
            (
                (-0.005095312616671304, 2.2842066718413503, 0.0, -0.0),
                (0.0103836461749947, -3.6415568576114468, 0.7088115945421509, 0.0),
                (-0.013399675214602426, -3.759415533987548, -0.15474210264598967, -0.0),
                (-0.0044084080616193615, 1.5302674363973365, -0.5561907586176742, 0.0),
                (0.00035245107001089415, -0.16372619335013378, -0.010506570764930586, 21.55515880820336),
            ),
            ((1.238492820420352e-05, -0.007919410628120077, 0.0, 2.218542921831671),),
        ),
    ),
    "exact": Schedule(
        lower=0.0001,
        upper=1.02,
        held=1.0,
        image=(0.99811, 1.00002),
        unit=1.0,
        chunks=quintics(
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
"""Accuracy level -> its polynomials: the best that `compiler.programs` found, a quintic at the end of "high"; "exact" composed quintics."""
