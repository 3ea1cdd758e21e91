"""The exponent that a measured quantity has at the largest width, told apart from a transient, with an interval.

A quantity of finite width is a sum of powers, c₁·d^p + c₂·d^(p - 1/2) + …: W₀Δx of a router dies out beside its ΔW·x. One power fitted
over all widths is that of neither. Exponents of widths are multiples of 1/2, so two neighbours are fitted, those on either side of the
plain slope, and what is told is the slope of their sum at the largest width: the predicted exponent if the other term is gone there, the
other's if nothing else is there; less than 1/4 from the predicted one, its term is the larger. A quantity that comes up to its limit
from below, c₁·d^p - c₂·d^(p - 1/2), looks as if it grew: that is fitted too, and where the runs do not tell the two apart, the
interval has both.

Every run, of each width and seed, is a point of one regression on ratios to the mean of its width, as noise is relative: what the seeds
scatter and what the powers do not fit is the noise, and Student's t makes it an interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import NormalDist, fmean, linear_regression

__all__ = ["SPACING", "Trend", "student", "trend"]

SPACING = 0.5
"""Between the exponents of parametrizations."""
LEVEL = 0.95
"""Of the two-sided interval."""


@dataclass(frozen=True)
class Trend:
    """The exponent at the largest width, and the interval [low, high] it is in with 95 % confidence."""

    exponent: float
    low: float
    high: float


def trend(widths: Sequence[int], samples: Sequence[Sequence[float]], predicted: float) -> Trend | None:
    """The exponent at the largest width of `samples` (width × seed); None unless every width has one, all positive and finite.

    `predicted` is the exponent whose limit may be approached from below. With two runs or fewer the interval is endless.
    """
    if not all(samples) or not all(0 < value < math.inf for value in chain(*samples)):
        return None
    at = [math.log(width / max(widths)) for width in widths]
    logs = [[math.log(value) for value in of_width] for of_width in samples]
    slope = linear_regression(at, [fmean(of_width) for of_width in logs]).slope
    lower = predicted + SPACING * math.floor((slope - predicted) / SPACING)
    fits = [_Fit.of(at, logs, lower)]
    if lower >= predicted:
        fits.append(_Fit.of(at, logs, predicted - SPACING))
    freedom = sum(map(len, samples)) - 2
    if freedom < 1:
        return Trend(fits[0].exponent, -math.inf, math.inf)
    t = student(freedom)
    best = min(fits, key=lambda fit: fit.squares)
    fits = [fit for fit in fits if fit.squares <= best.squares * (1 + t**2 / freedom)]
    margins = [t * math.sqrt(fit.squares / freedom * fit.variance) for fit in fits]
    low = min(fit.exponent - margin for fit, margin in zip(fits, margins, strict=True))
    high = max(fit.exponent + margin for fit, margin in zip(fits, margins, strict=True))
    return Trend(best.exponent, low, high)


@dataclass(frozen=True)
class _Fit:
    """c₁·d^lower + c₂·d^(lower + 1/2): its exponent at the largest width and the variance of that for runs of variance 1.

    `squares` is the sum of what is left of every run.
    """

    exponent: float
    variance: float
    squares: float

    @classmethod
    def of(cls, at: Sequence[float], logs: Sequence[Sequence[float]], lower: float) -> _Fit:
        """The fit of log values per width and seed, `at` log(width/largest)."""
        means = [fmean(of_width) for of_width in logs]
        top = max(means)
        # both terms at each width in units of the value there, so that c₁·row[0] + c₂·row[1] is to be 1
        rows = [(math.exp(lower * x - y + top), math.exp((lower + SPACING) * x - y + top)) for x, y in zip(at, means, strict=True)]
        runs = [len(of_width) for of_width in logs]
        a, b, c = (sum(n * row[i] * row[j] for n, row in zip(runs, rows, strict=True)) for i, j in ((0, 0), (0, 1), (1, 1)))
        u, v = (sum(n * row[i] for n, row in zip(runs, rows, strict=True)) for i in (0, 1))
        determinant = a * c - b * b
        first, second = (c * u - b * v) / determinant, (a * v - b * u) / determinant
        total = first + second
        # the gradient of second/total is (-second, first)/total², the covariance of the two ((c, -b), (-b, a))/determinant
        variance = (second**2 * c + 2 * second * first * b + first**2 * a) / determinant / total**4
        misfit = [first * row[0] + second * row[1] - 1 for row in rows]
        squares = sum((value - mean - off) ** 2 for of_width, mean, off in zip(logs, means, misfit, strict=True) for value in of_width)
        return cls(lower + SPACING * second / total, SPACING**2 * variance, squares)


def student(freedom: int, level: float = LEVEL) -> float:
    """The t beyond which Student's distribution has (1 - level)/2 on either side: exact for one and two degrees of freedom.

    From three on by Fisher & Cornish's expansion about the normal (Abramowitz & Stegun 26.7.5), 1 % off at three and less after.
    """
    tail = (1 + level) / 2
    if freedom == 1:
        return math.tan(math.pi * (tail - 0.5))
    if freedom == 2:
        return (2 * tail - 1) / math.sqrt(2 * tail * (1 - tail))
    z, n = NormalDist().inv_cdf(tail), freedom
    first, second, third = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
