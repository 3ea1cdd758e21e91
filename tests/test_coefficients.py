"""The iteration's coefficients are what the generator makes, and do what they say."""

from itertools import pairwise

import mpmath
import pytest
import torch

from compiler.coefficients import MARGIN, ROOM, SCHEDULES, compose, quintics, remez_odd
from compiler.programs import UNIT, normalized, polish, search
from compiler.programs import image as program_image

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


PROGRAMS = [(level, number) for level in ("fast", "default", "high") for number in (0, 1)]


def compose_on(steps, x):
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
    return x


def operands(chunk, R):
    """R, every L and Q of a chunk, of numbers of any kind."""
    L = [R]
    for k, (a, b, d, g) in enumerate(chunk):
        other = L[0] if k in (0, len(chunk) - 1) else L[k - 1]
        L.append(a * L[k] * L[k] + b * L[k] + d * other + g)
    return L


def image(schedule, x):
    for chunk in schedule.chunks:
        x = x * operands(chunk, schedule.unit * x * x)[-1]
    return x


def grid(lower):
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    return torch.cat([lower + (1 - lower) * t, lower ** (1 - t)]).unique()


def unnormalized(level, number):
    """A chunk as a program for [lower, 1], and that lower end: what the chunk before leaves with 1 % of room below, and `ROOM` above."""
    schedule = SCHEDULES[level]
    lower = schedule.lower / schedule.upper
    for chunk in schedule.chunks[:number]:
        s = torch.logspace(torch.tensor(lower).log10().item(), 0, 200_001, dtype=torch.float64)
        y = s * operands(chunk, UNIT * (s * schedule.upper / MARGIN) ** 2)[-1]
        lower = 0.99 * ROOM * (y.min() / y.max()).item()
    upper = schedule.upper / MARGIN if number == 0 else 1.0
    unit = UNIT * upper**2
    rows = [list(row) for row in schedule.chunks[number]]
    rows[0][0], rows[0][1] = rows[0][0] * unit**2, rows[0][1] * unit
    if len(rows) > 2:
        rows[1][2] *= unit
    rows[-1][2] *= unit
    y = program_image(rows, grid(lower))
    middle = (y.max() + y.min()).item() / 2
    rows[-1] = [x / middle for x in rows[-1]]
    return [tuple(row) for row in rows], lower


def test_the_generator_recovers_the_published_polar_express_table():
    made = compose(1e-3, 8, cushion=0.02407327424182761)
    assert made == [pytest.approx(row, rel=1e-9) for row in POLAR_EXPRESS]


def test_the_quintics_are_what_the_generator_makes():
    exact, high = SCHEDULES["exact"], SCHEDULES["high"]
    made = quintics(*compose(exact.lower, len(exact.chunks), safety=1.02))
    assert [chunk[0] for chunk in exact.chunks] == [pytest.approx(chunk[0], rel=1e-9) for chunk in made]
    rows, lower = unnormalized("high", 1)
    y = program_image(rows, torch.linspace(lower, 1, 200_001, dtype=torch.float64))
    polynomial, _ = remez_odd(0.98 * (y.min() / y.max()).item(), 1.0)
    ((c, b, d, a),) = high.chunks[2]
    assert (a, b * UNIT, c * UNIT**2, d) == pytest.approx([*map(float, polynomial), 0], rel=2e-3)


@pytest.mark.parametrize(("level", "number"), PROGRAMS)
def test_the_programs_are_optimal_among_those_near(level, number):
    """The polisher finds nothing better than the data, and comes back to it from beside it."""
    rows, lower = unnormalized(level, number)
    held = SCHEDULES[level].held if number == 1 else 1.0
    s = grid(lower)
    error = (program_image(rows, s) - 1).abs().max().item()
    assert polish(rows, lower, held=held, steps=20)[1] > error * (1 - 0.05)
    beside = [tuple(x * (1 + 2e-4 * (-1) ** (i + j)) for j, x in enumerate(row)) for i, row in enumerate(rows)]
    assert (program_image(beside, s) - 1).abs().max().item() > error * 1.001
    assert polish(beside, lower, held=held, steps=120)[1] == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(("level", "number"), PROGRAMS)
def test_the_error_of_a_program_is_reached_with_alternating_sign(level, number):
    """Within 10 %, at five points at least. The family is not linear: Chebyshev's count of points does not hold for it."""
    rows, lower = unnormalized(level, number)
    s = grid(lower)
    y = program_image(rows, s) - 1
    extreme = y[y.abs() > 0.9 * y.abs().max()]
    changes = (extreme[1:].sign() != extreme[:-1].sign()).sum().item()
    assert changes >= 4


def test_the_search_finds_the_quintic_that_remez_finds():
    """With one product the family is the quintics."""
    polynomial, error = remez_odd(0.2, 1.0)
    rows, found = search(0.2, 1, starts=30, kept=3)
    assert found == pytest.approx(float(error), rel=1e-6)
    a, b, d, g = rows[0]
    assert (g, b + d, a) == pytest.approx([float(c) for c in polynomial], rel=1e-3)


def test_normalizing_changes_units_and_nothing_else():
    rows = [(-3.0, 3.5, 0.0, 0.0), (-2.0, 2.5, 0.3, 0.0), (4.0, -9.0, -1.0, 7.0)]
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    scaled = normalized(rows, upper=1.02, scale=0.5)
    x = 1.02 * s
    torch.testing.assert_close(x * operands(scaled, UNIT * x * x)[-1], 0.5 * program_image(rows, s))


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


def enclosed(schedule, x):
    """An interval that holds the image of the interval x, every rounding included: mean value form, chunk after chunk."""
    wide = x
    y = mpmath.iv.mpf(wide.mid)
    for chunk in schedule.chunks:
        L, slopes = operands(chunk, schedule.unit * wide * wide), [2 * schedule.unit * wide]
        for k, (a, b, d, _) in enumerate(chunk):
            other = 0 if k in (0, len(chunk) - 1) else k - 1
            slopes.append((2 * a * L[k] + b) * slopes[k] + d * slopes[other])
        centre, y = y, y * operands(chunk, schedule.unit * y * y)[-1]
        wide = y + (L[-1] + wide * slopes[-1]) * (wide - centre)
    return wide


def prove(schedule, start, end, low, high):
    """That every x in [start, end] goes to [low, high] or at most 0.002 beside it: by intervals, halved until it is so for each."""
    start, end = mpmath.mpf(start), mpmath.mpf(end)
    edges = [start * (end / start) ** (mpmath.mpf(i) / 500) for i in range(501)]
    pieces = list(pairwise(edges))
    for left, right in pieces:
        image = enclosed(schedule, mpmath.iv.mpf([left, right]))
        if not (low - 2e-3 <= image.a and image.b <= high + 2e-3):
            assert right / left > 1 + mpmath.mpf(2) ** -22, f"{left} goes to {image}"
            middle = (left + right) / 2
            pieces += [(left, middle), (middle, right)]


@pytest.mark.parametrize("level", SCHEDULES)
def test_the_stated_interval_goes_to_the_stated_image(level):
    schedule = SCHEDULES[level]
    x = torch.logspace(torch.tensor(schedule.lower).log10().item(), 0, 500_001, dtype=torch.float64)
    y = image(schedule, x.clamp(schedule.lower, 1) / MARGIN)
    low, high = schedule.image
    assert low <= y.min() < low + 2e-5
    assert high - 2e-5 < y.max() <= high


@pytest.mark.parametrize("level", SCHEDULES)
@pytest.mark.slow  # four minutes
def test_no_singular_value_escapes_between_the_points_of_a_grid(level):
    schedule = SCHEDULES[level]
    prove(schedule, schedule.lower / mpmath.mpf("1.02"), schedule.upper / mpmath.mpf("1.02"), *schedule.image)


@pytest.mark.parametrize("level", ["fast", "default", "high"])
@pytest.mark.slow  # a minute
def test_no_singular_value_that_rounding_lifts_escapes_between_the_points_of_a_grid(level):
    schedule = SCHEDULES[level]
    prove(schedule._replace(chunks=schedule.chunks[1:]), ROOM, schedule.held, 0.25, schedule.image[1])


@pytest.mark.parametrize("level", SCHEDULES)
def test_below_its_interval_a_level_is_positive_and_bounded(level):
    schedule = SCHEDULES[level]
    y = image(schedule, torch.linspace(1e-9, schedule.lower, 10_001, dtype=torch.float64) / MARGIN)
    assert y.min() > 0
    assert y.max() <= schedule.image[1]


@pytest.mark.parametrize("level", SCHEDULES)
def test_a_singular_value_that_rounding_lifts_above_one_is_harmless(level):
    """By four percent, MARGIN included."""
    schedule = SCHEDULES[level]
    y = image(schedule, torch.linspace(1 / MARGIN, max(schedule.upper, 1.04) / MARGIN, 1001, dtype=torch.float64))
    low, high = schedule.image
    assert low - 0.01 < y.min()
    assert y.max() < high + 0.01


@pytest.mark.parametrize("level", ["fast", "default", "high"])
def test_what_rounding_lifts_in_the_first_program_does_not_leave_the_image_upwards(level):
    """What is sure not to leave it: R off by ε = 2⁻¹¹ and X not, where σ·q(σ² - ε) is at its worst; and nothing falls far below."""
    schedule = SCHEDULES[level]
    first, rest = schedule._replace(chunks=schedule.chunks[:1]), schedule._replace(chunks=schedule.chunks[1:])
    x = torch.logspace(-5, 0, 100_001, dtype=torch.float64) * schedule.upper / MARGIN
    y = image(first, x)
    assert y.max() == pytest.approx(ROOM, rel=1e-2)
    lifted = y * (1 + 2**-11 / MARGIN**2 / x.square()).sqrt()
    assert lifted[x > 1e-3].max() < schedule.held * 1.02
    z = image(rest, torch.linspace(ROOM, schedule.held, 10_001, dtype=torch.float64))
    assert z.min() > 0.25
    assert z.max() <= schedule.image[1]


def test_a_program_holds_beyond_its_interval_as_far_as_it_was_polished_for():
    polynomial = [(*(float(c) for c in remez_odd(0.2, 1.0)[0][::-1]),)]
    [(c, b, a)] = polynomial
    rows, error = polish([(c, b, 0.0, a)], 0.2, held=1.1)
    y = program_image(rows, torch.linspace(0.2, 1.1, 10_001, dtype=torch.float64))
    assert y.max() == pytest.approx(1 + error, abs=1e-6)
    assert polish([(c, b, 0.0, a)], 0.2)[1] < error < polish([(c, b, 0.0, a)], 0.2 / 1.1)[1]


@pytest.mark.parametrize("level", ["default", "high"])
def test_of_a_matrix_near_rank_1_the_largest_singular_value_goes_to_the_upper_end_of_the_image(level):
    """There all of the matrix is: ⟨msign(X), X⟩ / (‖msign(X)‖₂·‖X‖_*) is nearly what becomes of it over the upper end."""
    schedule = SCHEDULES[level]
    [y] = image(schedule, torch.tensor([1 / MARGIN], dtype=torch.float64))
    assert y > 1 + 0.5 * (schedule.image[1] - 1)


@pytest.mark.parametrize("level", ["fast", "default", "high"])
def test_operands_stay_within_the_unit(level):
    """fp16 ends at 65504."""
    schedule = SCHEDULES[level]
    for number, chunk in enumerate(schedule.chunks):
        x = torch.linspace(0, [schedule.upper / MARGIN, schedule.held, schedule.image[1]][number], 100_001, dtype=torch.float64)
        *L, Q = operands(chunk, schedule.unit * x * x)
        assert max(T.abs().max().item() for T in L) <= UNIT * max(1.11, 1.01 * x.max().item() ** 2)  # R itself
        assert Q.abs().max() < 100


def test_greedy_composition_beats_a_single_fit_of_the_same_quintic():
    one, two = compose(3e-3, 1)[0], compose(3e-3, 2)
    x = torch.linspace(3e-3, 1, 100_001, dtype=torch.float64)
    assert (1 - compose_on(two, x)).abs().max() < (1 - compose_on([one, one], x)).abs().max()
