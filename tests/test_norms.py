"""Spectral norm, SN and SVC against the SVD in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler import msign, spectral_norm, spectral_normalize, svc
from compiler.errors import BadOption, NotAMatrix
from compiler.msign import power_of_two
from compiler.norms import _clip_projector, ritz

SHAPES = [(8, 8), (5, 40), (40, 5), (1, 7), (1, 1), (3, 20, 30), (2, 3, 30, 20), (100, 100)]


def clipped(X, scale):
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return (U * (S * scale).clamp(max=1).unsqueeze(-2)) @ Vh


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_spectral_norm_is_the_largest_singular_value(shape, device):
    X = torch.randn(shape)
    exact = torch.linalg.matrix_norm(X.double(), 2)
    near = 1e-5 if device.type == "cpu" else 1e-4  # the largest Ritz value by squaring, where LAPACK would make the host wait
    torch.testing.assert_close(spectral_norm(X.to(device)).cpu().double(), exact, rtol=near, atol=0)
    strict = spectral_norm(X.to(device), strict=True).cpu().double()
    assert (strict >= exact).all()
    assert (strict <= exact * min(shape[-2:]) ** (1 / 16) * (1 + 1e-5)).all()


def test_the_stated_error_on_a_gaussian_matrix_holds():
    X = torch.randn(512, 512)
    exact = torch.linalg.matrix_norm(X, 2)
    assert 0 <= 1 - spectral_norm(X) / exact < 5e-5
    assert 0.1 < spectral_norm(X, strict=True) / exact - 1 < 0.25


def test_sigma_max_of_a_gaussian_matrix_is_near_the_sum_of_the_roots():
    for m, n in ((256, 256), (64, 1024), (512, 128)):
        assert spectral_norm(torch.randn(m, n)).item() == pytest.approx(m**0.5 + n**0.5, rel=0.05)


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-10, 1e10, 1e37])
def test_norms_of_any_size_are_right(size, device):
    X = torch.full((3, 2), size, device=device)
    expected = torch.tensor(size).double() * 6**0.5
    for strict in (False, True):
        assert spectral_norm(X, strict=strict).cpu().double() == pytest.approx(expected.item(), rel=1e-5, abs=2e-45)
        torch.testing.assert_close(spectral_normalize(X, strict=strict).cpu(), torch.full((3, 2), 6**-0.5), atol=1e-5, rtol=0)


def test_zero_and_bad_matrices_stay_among_themselves(device):
    X = torch.randn(4, 6, 5, device=device)
    clean = X.clone()
    X[1], X[2, 0, 0], X[3, 1, 1] = 0, float("nan"), float("inf")
    for result, expected in ((spectral_normalize(X), spectral_normalize(clean)), (svc(X, 2.0), svc(clean, 2.0))):
        assert torch.equal(result[1], torch.zeros_like(result[1]))
        assert result[2:].isnan().all()
        torch.testing.assert_close(result[0], expected[0])
    assert spectral_norm(X)[1] == 0
    assert spectral_norm(X, strict=True)[1] == 0
    assert spectral_norm(X)[2:].isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sn_is_x_over_its_spectral_norm(shape, device):
    X = torch.randn(shape)
    exact = X.double() / torch.linalg.matrix_norm(X.double(), 2, keepdim=True)
    torch.testing.assert_close(spectral_normalize(X.to(device)).cpu().double(), exact, atol=1e-5 if device.type == "cpu" else 1e-4, rtol=0)
    assert torch.linalg.matrix_norm(spectral_normalize(X, strict=True).double(), 2).max() <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.01, 0.3, 1.0, 30.0])
def test_svc_clips_the_singular_values(shape, scale, device):
    X = torch.randn(shape)
    torch.testing.assert_close(
        svc(X.to(device), scale).cpu().double(), clipped(X, scale), atol=2e-6 if device.type == "cpu" else 5e-4, rtol=0
    )


def test_svc_takes_a_scale_per_matrix():
    X, scale = torch.randn(3, 8, 5), torch.tensor([0.1, 1.0, 100.0])
    expected = torch.stack([svc(x, float(s)) for x, s in zip(X, scale, strict=True)])
    torch.testing.assert_close(svc(X, scale), expected)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 7, 7)], ids=str)
def test_svc_tends_to_msign(shape):
    X = torch.randn(shape, dtype=torch.float64)
    exact = msign(X, accuracy="exact")
    errors = [torch.linalg.matrix_norm(svc(X, scale) - exact, 2).max().item() for scale in (0.05, 0.3, 1e8, float("inf"))]
    assert errors[0] > errors[1] > 1e-3
    assert max(errors[2:]) < 1e-10


@pytest.mark.parametrize("ratio", [0.5, 2, 10, 50, 1e3, 1e4])
def test_svc_in_gram_space_keeps_its_word(ratio):
    """The form other devices use, here on the CPU: Gaussian, orthogonal, rank-deficient and ill-conditioned matrices, zero among them."""
    spread = torch.linalg.qr(torch.randn(64, 64))[0] * torch.logspace(0, -6, 64) @ torch.linalg.qr(torch.randn(64, 64))[0]
    low_rank = torch.randn(64, 3) @ torch.randn(3, 64) / 20
    X = torch.stack([torch.randn(64, 64) / 16, torch.linalg.qr(torch.randn(64, 64))[0], low_rank, spread, torch.zeros(64, 64)])
    scale = ratio / torch.linalg.matrix_norm(X.double(), 2).clamp(min=1e-3)
    A, exponent, _ = power_of_two(X)
    result = _clip_projector(A, scale[:, None, None].ldexp(exponent.double()))
    error = torch.linalg.matrix_norm(result.double() - clipped(X, scale[:, None]), 2)
    assert error.max() < (5e-4 if ratio <= 50 else 2e-3)


def test_a_warm_start_follows_a_drifting_matrix():
    """A momentum of rank-4 gradients: the warm estimate stays within 1e-3 of σ₁, from below."""
    momentum, block = torch.randn(48, 80) * 0.01, None
    for _ in range(12):
        momentum = 0.9 * momentum + torch.randn(48, 4) @ torch.randn(4, 80)
        sigma, block = ritz(momentum, block)
        assert 0 <= 1 - sigma / torch.linalg.matrix_norm(momentum.double(), 2) + 1e-6 < 1e-3


def test_a_warm_start_sees_a_new_direction_orthogonal_to_all_it_knows():
    A = torch.zeros(64, 80)
    A[:20, :20] = torch.randn(20, 20)
    _, block = ritz(A)
    block[20:] = 0
    A[40, 50] = 100.0
    assert ritz(A, block)[0].item() == pytest.approx(100.0, rel=1e-3)


def test_norms_leave_the_random_state_and_the_input_alone():
    X = torch.randn(9, 4)
    state, before = torch.get_rng_state(), X.clone()
    spectral_norm(X), spectral_normalize(X), svc(X, 2.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(X, before)


@pytest.mark.parametrize("function", [spectral_norm, spectral_normalize, lambda X: svc(X, 1.0)])
def test_what_is_not_a_matrix_is_refused(function):
    with pytest.raises(NotAMatrix, match="at least two dimensions"):
        function(torch.randn(5))
    with pytest.raises(NotAMatrix, match="real floating point"):
        function(torch.randn(5, 5, dtype=torch.complex64))
    assert function(torch.zeros(2, 0, 3)).numel() in (0, 2)


@pytest.mark.parametrize("scale", [-1.0, float("nan")])
def test_a_scale_that_makes_no_sense_is_refused(scale):
    with pytest.raises(BadOption, match="at least 0"):
        svc(torch.randn(3, 3), scale)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_laws(m, n, scale, seed, dtype):
    """SN ignores scale, commutes with transposition and orthogonal maps; svc(c·X, s) = svc(X, c·s), of norm min(1, s·σ₁)."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(m, n, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))
    Q = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))[0].to(X.dtype)
    close = {"atol": 1e-4, "rtol": 0}
    Y = spectral_normalize(X)
    assert spectral_norm(X, strict=True) >= spectral_norm(X) * (1 - 1e-6)
    torch.testing.assert_close(spectral_normalize(X * 7.3), Y, **close)
    torch.testing.assert_close(spectral_normalize(X.mT), Y.mT, **close)
    torch.testing.assert_close(spectral_normalize(Q @ X), Q @ Y, **close)
    Z = svc(X, scale)
    torch.testing.assert_close(svc(X * 4, scale / 4), Z, **close)
    torch.testing.assert_close(svc(X.mT, scale), Z.mT, **close)
    torch.testing.assert_close(svc(Q @ X, scale), Q @ Z, **close)
    assert torch.linalg.matrix_norm(Z, 2).item() == pytest.approx(min(1, scale * torch.linalg.matrix_norm(X, 2).item()), abs=1e-5)
