"""The SVD where LAPACK's gives up: rotations, against LAPACK's."""

import pytest
import torch

from compiler import msign, spectral_norm, svc
from compiler.svd import jacobi, svd


def spectra(m, n, generator):
    U, V = (torch.linalg.qr(torch.randn(side, m, generator=generator, dtype=torch.float64))[0] for side in (m, n))
    for S in (torch.ones(m), torch.logspace(0, -14, m), (torch.arange(m) < 1).float(), torch.rand(m, generator=generator), torch.zeros(m)):
        yield (U * S.double()) @ V.mT
    yield torch.randn(m, 1, generator=generator, dtype=torch.float64).expand(m, n)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (2, 2), (5, 40), (16, 16), (33, 35)])
def test_rotations_find_the_svd(m, n):
    for A in spectra(m, n, torch.Generator().manual_seed(m)):
        before = A.clone()
        U, S, Vh = jacobi(A)
        assert torch.equal(A, before)
        torch.testing.assert_close((U * S) @ Vh, A, atol=1e-13, rtol=0)
        torch.testing.assert_close(S, torch.linalg.svdvals(A), atol=1e-13, rtol=0)
        torch.testing.assert_close(U.mT @ U, torch.eye(m, dtype=torch.float64), atol=1e-13, rtol=0)
        V = Vh[S > 1e-12]
        torch.testing.assert_close(V @ V.mT, torch.eye(len(V), dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.fixture
def unwilling(monkeypatch):
    """LAPACK gives up on every matrix that has a 7 in its first place, and on batches with one."""
    lapack, refused = torch.linalg.svd, []

    def give_up(A, **options):
        if (A[..., 0, 0] == 7).any():
            refused.append(A.shape)
            raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
        return lapack(A, **options)

    monkeypatch.setattr(torch.linalg, "svd", give_up)
    return refused


def test_what_lapack_gives_up_on_goes_by_rotations_and_nothing_else_does(unwilling):
    A = torch.randn(2, 3, 5, 9, dtype=torch.float64)
    whole = svd(A)
    A[1, 0, 0, 0] = 7
    U, S, Vh = svd(A)
    assert unwilling == [A.shape, A.shape[2:]]
    torch.testing.assert_close((U * S[..., None, :]) @ Vh, A)
    for old, new in zip(whole, (U, S, Vh), strict=True):
        assert torch.equal(old[0], new[0])


def test_exact_msign_svc_and_the_spectral_norm_do_not_give_up(monkeypatch):
    X = torch.randn(3, 6, 10, dtype=torch.float64)
    X[1] = 0
    maps = (lambda A: msign(A, accuracy="exact"), lambda A: svc(A, 0.3), spectral_norm)
    expected = [of(X) for of in maps]
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    for of, Y in zip(maps, expected, strict=True):
        torch.testing.assert_close(of(X), Y)


def refuse(A, **options):
    raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
