"""Exponents told apart from transients: exact on sums of powers, and right as often as stated on noisy ones."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.trend import student, trend

WIDTHS = (64, 128, 256, 512)
LARGEST = WIDTHS[-1]


def runs(of, noise=0.0, seeds=3, rng=None):
    rng = rng or random.Random(0)
    return [[of(width / LARGEST) * math.exp(rng.gauss(0, noise)) for _ in range(seeds)] for width in WIDTHS]


def outcome(found, predicted=0.0):
    if found.low > predicted + 0.25 or found.high < predicted - 0.25:
        return "failed"
    return "passed" if found.low >= predicted - 0.25 and found.high <= predicted + 0.25 else "undecided"


def rates(of, noise, repeats=400):
    rng = random.Random(1)
    found = [outcome(trend(WIDTHS, runs(of, noise, rng=rng), 0.0)) for _ in range(repeats)]
    return {name: found.count(name) / repeats for name in ("passed", "undecided", "failed")}


@given(
    power=st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]), predicted=st.sampled_from([-0.5, 0.0, 0.5]), scale=st.floats(1e-6, 1e6)
)
def test_a_pure_power_has_its_exponent_whatever_is_predicted(power, predicted, scale):
    found = trend(WIDTHS, runs(lambda x: scale * x**power), predicted)
    assert (found.exponent, found.low, found.high) == pytest.approx((power, power, power), abs=1e-4)


@given(share=st.floats(0, 1), power=st.sampled_from([-0.5, 0.0, 1.0]))
def test_the_exponent_of_a_transient_is_the_slope_at_the_largest_width(share, power):
    found = trend(WIDTHS, runs(lambda x: (1 - share) * x**power + share * x ** (power - 0.5)), power)
    assert found.exponent == pytest.approx(power - share / 2, abs=1e-4)


def test_a_limit_approached_from_below_is_not_taken_for_growth():
    """1 - 4/√d: its plain slope is 0.23."""
    found = trend(WIDTHS, runs(lambda x: 1 - 4 * (LARGEST * x) ** -0.5), 0.0)
    assert found.exponent == pytest.approx(0.107, abs=0.001)
    assert outcome(found) == "passed"


@pytest.mark.parametrize(("power", "noise"), [(0.5, 0.05), (-0.5, 0.1), (1.0, 0.2), (-1.0, 0.2)])
def test_a_wrong_power_is_never_passed_and_mostly_fails(power, noise):
    found = rates(lambda x: x**power, noise)
    assert found["passed"] <= 0.005
    assert found["failed"] > 0.95


@pytest.mark.parametrize("share", [0.0, 0.2, 1 / 3])
@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1, 0.2])
def test_a_right_power_beside_a_transient_is_never_said_to_be_wrong(share, noise):
    assert rates(lambda x: 1 - share + share * x**-0.5, noise)["failed"] <= 0.005


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2])
def test_two_terms_of_one_size_are_undecided(noise):
    assert rates(lambda x: 1 + x**-0.5, noise)["undecided"] > 0.9


def test_an_interval_has_the_exponent_as_often_as_it_says():
    rng = random.Random(2)
    for share in (0.0, 0.3, 0.6, 1.0):
        found = [trend(WIDTHS, runs(lambda x, s=share: 1 - s + s * x**-0.5, 0.05, rng=rng), 0.0) for _ in range(600)]
        assert sum(one.low <= -share / 2 <= one.high for one in found) / 600 > 0.93


def test_more_seeds_make_the_interval_narrower_and_two_runs_give_none():
    few, many = (trend(WIDTHS, runs(lambda x: 1.0, 0.1, seeds), 0.0) for seeds in (2, 32))
    assert many.high - many.low < (few.high - few.low) / 3
    one = trend((8, 16), [[1.0], [2.0]], 0.0)
    assert (one.low, one.high) == (-math.inf, math.inf)
    assert one.exponent == pytest.approx(1)


def test_what_is_zero_or_not_finite_has_no_exponent():
    assert trend((8, 16), [[0.0], [1.0]], 0.0) is None
    assert trend((8, 16), [[1.0], [math.inf]], 0.0) is None
    assert trend((8, 16), [[], [1.0]], 0.0) is None


def test_widths_may_have_different_numbers_of_runs():
    found = trend(WIDTHS, [[1.0], [1.0, 1.1], [1.05], [1.0, 1.1, 1.05]], 0.0)
    assert found.low < 0.05 < found.high


def test_students_t_is_that_of_tables():
    """Abramowitz & Stegun, table 26.10, A = 0.95."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 8: 2.306, 10: 2.228, 30: 2.042}
    assert {n: student(n) for n in table} == pytest.approx(table, rel=0.01)
