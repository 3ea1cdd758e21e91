"""The iteration's coefficients are what the generator makes, and do what they say."""

from itertools import pairwise

import mpmath
import pytest
import torch

from compiler.coefficients import MARGIN, SCHEDULES, compose, remez_odd

POLAR_EXPRESS = (  # Amsel et al. 2025, arXiv 2505.16932, listing 1: l = 1e-3
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def image(steps, x):
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
    return x


def test_the_generator_recovers_the_published_polar_express_table():
    made = compose(1e-3, 8, cushion=0.02407327424182761)
    assert made == [pytest.approx(row, rel=1e-9) for row in POLAR_EXPRESS]


@pytest.mark.parametrize("level", SCHEDULES)
def test_the_data_is_what_the_generator_makes(level):
    schedule = SCHEDULES[level]
    made = compose(schedule.lower, len(schedule.steps), safety=1.02)
    assert list(schedule.steps) == [pytest.approx(step, rel=1e-9) for step in made]


@pytest.mark.parametrize("degree", [3, 5, 7])
@pytest.mark.parametrize("lower", [1e-4, 3e-2, 0.9])
def test_a_remez_polynomial_equioscillates(degree, lower):
    polynomial, error = remez_odd(lower, 1.0, degree)
    with mpmath.workdps(40):
        grid = [lower + (1 - lower) * mpmath.mpf(i) / 4000 for i in range(4001)]
        residual = [mpmath.polyval([*(c for c in polynomial[::-1])], x * x) * x - 1 for x in grid]
        assert max(map(abs, residual)) <= error * (1 + mpmath.mpf(10) ** -12)
        signs = [r > 0 for r in residual if abs(r) > error * (1 - mpmath.mpf("1e-2"))]
    changes = sum(a != b for a, b in pairwise(signs))
    assert changes == (degree + 1) // 2  # (degree + 3)/2 extrema of alternating sign: Chebyshev's theorem


@pytest.mark.parametrize("level", SCHEDULES)
def test_the_stated_interval_goes_to_the_stated_image(level):
    schedule = SCHEDULES[level]
    x = torch.logspace(torch.tensor(schedule.lower).log10().item(), 0, 500_001, dtype=torch.float64)
    y = image(schedule.steps, x.clamp(schedule.lower, 1) / MARGIN)
    low, high = schedule.image
    assert low <= y.min() < low + 2e-5
    assert high - 2e-5 < y.max() <= high


@pytest.mark.parametrize("level", SCHEDULES)
def test_below_its_interval_a_level_is_positive_and_bounded(level):
    schedule = SCHEDULES[level]
    y = image(schedule.steps, torch.linspace(1e-9, schedule.lower, 10_001, dtype=torch.float64) / MARGIN)
    assert y.min() > 0
    assert y.max() <= schedule.image[1]


@pytest.mark.parametrize("level", SCHEDULES)
def test_a_singular_value_two_percent_above_one_is_harmless(level):
    schedule = SCHEDULES[level]
    y = image(schedule.steps, torch.linspace(1, 1.02, 1001, dtype=torch.float64))
    assert (y - 1).abs().max() < 0.05


def test_greedy_composition_beats_a_single_fit_of_the_same_quintic():
    one, two = compose(3e-3, 1)[0], compose(3e-3, 2)
    x = torch.linspace(3e-3, 1, 100_001, dtype=torch.float64)
    assert (1 - image(two, x)).abs().max() < (1 - image([one, one], x)).abs().max()
