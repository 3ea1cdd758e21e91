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
"""Before the iteration X is divided by MARGIN·‖X‖_F, so that rounding never lifts a singular value out of the interval."""

Number = Any
"""An mpmath number; mpmath has no types."""

Quintic = tuple[float, float, float]


class Schedule(NamedTuple):
    """The polynomials of one accuracy level.

    Attributes:
        lower: the smallest σ/‖X‖_F that the level takes to `image`.
        image: where [lower, 1] goes, MARGIN included; and what rounding lifts above 1, up to 1.04.
        unit: R is unit·X·Xᵀ in the chunks.
        chunks: the products of each polynomial q of R, by the rule of `compiler.programs`; X becomes q(R)·X.
    """

    lower: float
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
        lower=0.01,
        image=(0.99607, 1.00393),
        unit=UNIT,
        chunks=(
            (
                (0.011901469309510604, -3.491003376259432, 0.0, 0.0),
                (0.012709660366259371, 3.6136560064565986, 0.017662636344541235, 0.0),
                (0.010019371425209358, 3.2689110409118696, -0.19172305418890448, 0.0),
                (0.0005983798205378245, 0.23058449574929277, -0.004872210186123369, 23.70913043400173),
            ),
            (
                (-0.005930111043075617, 2.464230855415466, -0.0, -0.0),
                (0.0023266127986764614, -1.1968495184759234, -0.4007952935399865, 0.0),
                (-0.012868534669726293, -4.037182044254885, -0.44437247644310357, -0.0),
                (4.514207558147964e-05, -0.029053454331466368, -0.017684511106937487, 7.613745777650703),
            ),
        ),
    ),
    "default": Schedule(
        lower=0.0025,
        image=(0.98733, 1.01267),
        unit=UNIT,
        chunks=(
            (
                (-0.013545094738355908, 3.7242686548544417, 0.0, 0.0),
                (-0.012303842639876906, 3.551790663757328, -0.0070035455869899834, 0.0),
                (-0.01229798309253467, 3.5534898059637015, -0.014175737982816988, 0.0),
                (0.009395966120306949, -3.1947349362819404, 0.263550683216432, 0.0),
                (0.0012499270893505856, 0.4724247049671761, -0.005231958310324426, 46.14058347914306),
            ),
            (
                (-0.0032805348530202203, 1.8398169223731764, 0.0, 0.0),
                (-0.008836213411053374, 2.3810443068913725, 0.8810263263382915, 0.0),
                (0.005796302653829258, -3.0130804749874804, 1.1963861728281306, 0.0),
                (-0.0052848073371481105, -2.9644726528181065, -1.22121156016955, 0.0),
                (0.00010125384113277693, -0.059442868034435575, -0.07629208882005935, 13.712651199418824),
            ),
        ),
    ),
    "high": Schedule(
        lower=0.001,
        image=(0.99908, 1.00092),
        unit=UNIT,
        chunks=(
            (
                (-0.013541949234253574, 3.723836196221525, 0.0, 0.0),
                (-0.01251593574170918, 3.5842445376367893, -0.01318910018513109, 0.0),
                (-0.012569894694318667, 3.5878514995572144, -0.00045963134727211753, 0.0),
                (0.00950036403451563, -3.2105710494798254, 0.26298304078023016, 0.0),
                (0.001342863069619272, 0.5014526096635368, -0.0025436297234068374, 47.547985306994256),
            ),
            (
                (-0.008402222154402656, 2.933236350302463, 0.0, -0.0),
                (0.01045732231224602, -3.7413535178378003, 1.1234648838867827, 0.0),
                (-0.010108372796427373, -3.1572974405544207, 0.03985587342818835, -0.0),
                (-0.0040993197717987, 1.6239580128187203, -0.39808435994445107, 0.0),
                (0.0002575089826991803, -0.13537045085155536, -0.020582878564161612, 21.038139894383118),
            ),
            ((9.82457408225469e-06, -0.006818610798188988, 0.0, 2.1026133397832742),),
        ),
    ),
    "exact": Schedule(
        lower=0.0001,
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
