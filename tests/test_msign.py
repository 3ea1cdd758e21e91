"""msign against the SVD in float64, on every shape, size and spectrum."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler import msign
from compiler.coefficients import MARGIN, SCHEDULES
from compiler.errors import NotAMatrix
from compiler.msign import iterate
from compiler.msign import polar as polar_of
from scaling.errors import UnknownName

SHAPES = [(8, 8), (5, 40), (40, 5), (1, 7), (7, 1), (1, 1), (3, 20, 30), (2, 3, 30, 20)]
LAWS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def polar(X):
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return U @ Vh


def image(schedule, x):
    for chunk in schedule.chunks:
        before = last = R = schedule.unit * x * x
        for k, (a, b, d, g) in enumerate(chunk):
            other = R if k == len(chunk) - 1 else before
            before, last = last, a * last**2 + b * last + d * other + g
        x = x * last
    return x


def with_spectrum(m, n, singular_values):
    k = len(singular_values)
    U = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))[0]
    return (U * torch.as_tensor(singular_values, dtype=torch.float64)) @ V.mT, U @ V.mT


def in_half(device, level):
    return device.type == "cuda" and level != "exact"


@pytest.mark.parametrize("level", ["fast", "default", "high"])
@pytest.mark.parametrize(("m", "n", "count"), [(16, 16, 1000), (16, 64, 500), (32, 32, 300)])
def test_fp16_diverges_on_no_matrix(level, m, n, count):
    """Rows, columns and spectra of all sizes. Coefficients whose second part held up to 1 only gave one in
    a thousand a norm of 1.3 to 300."""
    U, V = (torch.linalg.qr(torch.randn(count, side, m))[0] for side in (m, n))
    s = torch.exp(-12 * torch.rand(count, 1) * torch.rand(count, m).sort(1)[0])
    s = s * (torch.arange(m) < torch.randint(1, m + 1, (count, 1))) + 1e-5
    X = (U * s[:, None]) @ V.mT
    for side in ((count, m, 1), (count, 1, n)):
        X = X * torch.exp(4 * torch.randn(side) * torch.rand(count, 1, 1) * (torch.rand(count, 1, 1) < 0.6))
    A = (X / X.abs().amax((1, 2), keepdim=True)).half()
    Y, scale = polar_of(A, A.float().square().sum((1, 2)), level)
    assert torch.linalg.matrix_norm(Y.float() * scale[:, None, None], 2).max() < 1.03


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_is_the_polar_factor(shape, device):
    X = torch.randn(shape, dtype=torch.float64)
    Y = msign(X.to(device), accuracy="exact").cpu()
    torch.testing.assert_close(Y, polar(X), atol=1e-10 if device.type == "cpu" else 5e-3, rtol=0)


@pytest.mark.parametrize("level", SCHEDULES)
@pytest.mark.parametrize(("m", "n"), [(60, 60), (40, 200), (200, 40)])
def test_every_level_keeps_its_word(level, m, n, device):
    """σ/s from the lower end of the level up to 1: every singular value of msign(X) in the stated image, along the same directions."""
    schedule = SCHEDULES[level]
    s = torch.logspace(0, -6, 40, dtype=torch.float64).clamp(min=1.25 * schedule.lower)  # s is 1.07
    X, exact = with_spectrum(m, n, s)
    Y = msign(X.float().to(device), accuracy=level).cpu().double()
    low, high = schedule.image
    S = torch.linalg.svdvals(Y)[: len(s)]
    rounding, turned = (5e-3, 0.2) if in_half(device, level) else (1e-4, 1e-3)
    assert low - rounding <= S.min()
    assert S.max() <= high + rounding
    assert torch.linalg.matrix_norm(Y - exact, 2) <= max(1 - low, high - 1) + turned


@pytest.mark.parametrize(("m", "n"), [(30, 30), (30, 90)])
def test_the_iteration_is_the_composed_polynomial_of_the_singular_values(m, n):
    """Both evaluations, usual and in Gram space, for every level, also below its interval."""
    for schedule in SCHEDULES.values():
        s = torch.logspace(0, -5, 30, dtype=torch.float64) / MARGIN
        X, _ = with_spectrum(m, n, s)
        s = image(schedule, s)
        U, _, Vh = torch.linalg.svd(X, full_matrices=False)
        torch.testing.assert_close(iterate(X, schedule), (U * s) @ Vh, atol=1e-9, rtol=0)


@pytest.mark.parametrize("level", SCHEDULES)
def test_zero_stays_exactly_zero(level, device):
    X = torch.randn(3, 6, 9, device=device)
    X[1] = 0
    Y = msign(X, accuracy=level)
    assert torch.equal(Y[1], torch.zeros_like(Y[1]))
    assert Y[0].isfinite().all()
    assert torch.equal(msign(X[1], accuracy=level), Y[1])


@pytest.mark.parametrize("level", SCHEDULES)
def test_rank_deficient_matrices_keep_their_null_space(level, device):
    X, exact = with_spectrum(20, 30, [1.0, 0.7, 0.2])
    Y = msign(X.float().to(device), accuracy=level).cpu().double()
    left = {"fast": 0.03, "default": 0.1, "high": 0.3}[level] if in_half(device, level) else 1e-3
    torch.testing.assert_close(Y, exact, atol=max(0.05, left), rtol=0)
    assert torch.linalg.svdvals(Y)[3:].max() < left


@pytest.mark.parametrize("level", SCHEDULES)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-10, 1e10, 1e37, 3e38])
def test_tiny_and_huge_norms_are_handled(level, size, device):
    X = torch.full((8, 4), size, device=device)
    X[0, 0] = 0
    Y = msign(X, accuracy=level)
    same = msign((X != 0).float(), accuracy=level)
    torch.testing.assert_close(Y, same, atol=0.03 if in_half(device, level) else 1e-5, rtol=0)


def test_subnormal_and_huge_doubles_are_handled():
    for size in (5e-324, 1e-310, 1e300, 1.7e308):
        X = torch.eye(3, 5, dtype=torch.float64) * size
        torch.testing.assert_close(msign(X, accuracy="exact"), torch.eye(3, 5, dtype=torch.float64))
        torch.testing.assert_close(msign(X, accuracy="default"), torch.eye(3, 5, dtype=torch.float64), atol=0.03, rtol=0)


@pytest.mark.parametrize("level", SCHEDULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_entry_makes_its_own_matrix_nan_and_no_other(level, bad, device):
    X = torch.randn(3, 4, 6, device=device)
    clean = msign(X, accuracy=level)
    X[1, 2, 3] = bad
    Y = msign(X, accuracy=level)
    assert Y[1].isnan().all()
    torch.testing.assert_close(Y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_and_shape_are_kept_and_the_input_is_not_touched(dtype, device):
    X = torch.randn(2, 12, 5, device=device).to(dtype)
    before = X.clone()
    Y = msign(X)
    assert Y.dtype == dtype
    assert Y.shape == X.shape
    assert torch.equal(X, before)
    assert Y.data_ptr() != X.data_ptr()
    torch.testing.assert_close(Y.cpu().double(), polar(X.cpu()), atol=0.03, rtol=0)


def test_strides_do_not_matter():
    X = torch.randn(12, 20, 2)[..., 0]
    assert not X.is_contiguous()
    torch.testing.assert_close(msign(X), msign(X.contiguous()))
    torch.testing.assert_close(msign(X.mT), msign(X).mT, atol=1e-5, rtol=0)


def test_empty_matrices_are_returned():
    assert msign(torch.zeros(3, 0, 5)).shape == (3, 0, 5)
    assert msign(torch.zeros(0, 4, 5)).shape == (0, 4, 5)


def test_what_has_no_singular_vectors_is_refused():
    with pytest.raises(NotAMatrix, match="at least two dimensions"):
        msign(torch.randn(5))
    with pytest.raises(NotAMatrix, match="real floating point"):
        msign(torch.randn(5, 5, dtype=torch.complex64))
    with pytest.raises(NotAMatrix, match="real floating point"):
        msign(torch.ones(5, 5, dtype=torch.int64))
    with pytest.raises(UnknownName, match="fast, default, high, exact"):
        msign(torch.randn(5, 5), accuracy="perfect")


def test_the_exact_level_is_steepest_descent_per_unit_spectral_norm():
    X = torch.randn(20, 30, dtype=torch.float64)
    Y = msign(X, accuracy="exact")
    assert (X * Y).sum() == pytest.approx(torch.linalg.svdvals(X).sum().item())


@LAWS
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    level=st.sampled_from(list(SCHEDULES)),
    size=st.integers(-100, 100),
    seed=st.integers(0, 10**6),
    rank=st.integers(0, 24),
)
def test_laws(m, n, level, size, seed, rank):
    """Scale invariance, transposition, orthogonal equivariance, ‖msign(X)‖₂ ≤ 1.013, no NaN, input untouched."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X = draw(m, n) if rank >= min(m, n) else draw(m, rank) @ draw(rank, n)
    before = X.clone()
    Y = msign(X, accuracy=level)
    assert torch.equal(X, before)
    assert Y.isfinite().all()
    assert torch.linalg.matrix_norm(Y, 2) <= SCHEDULES[level].image[1] + 1e-6
    assert torch.equal(msign(X * 2.0**size, accuracy=level), Y)
    torch.testing.assert_close(msign(X * 3.7, accuracy=level), Y, atol=1e-6, rtol=0)
    torch.testing.assert_close(msign(-X, accuracy=level), -Y, atol=1e-6, rtol=0)
    torch.testing.assert_close(msign(X.mT, accuracy=level), Y.mT, atol=1e-6, rtol=0)
    Q, P = torch.linalg.qr(draw(m, m))[0], torch.linalg.qr(draw(n, n))[0]
    torch.testing.assert_close(msign(Q @ X @ P, accuracy=level), Q @ Y @ P, atol=1e-6, rtol=0)
