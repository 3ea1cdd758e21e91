"""The spectral norm, SN (X over its spectral norm) and SVC (singular value clipping)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from compiler import kernels
from compiler.autocast import outside_autocast
from compiler.coefficients import MARGIN, SCHEDULES, quintics
from compiler.errors import BadOption
from compiler.msign import iterate, ldexp, power_of_two, require_matrices
from compiler.svd import svd

__all__ = ["Reduction", "follow", "ritz", "ritz_steps", "spectral_norm", "spectral_normalize", "start_of", "svc"]

STAGES = 3
"""Of clipping where there is no SVD, whatever σ₁/τ: a number that depends on data would make the host wait."""

VECTORS = 16
COLD, WARM = 8, 1
"""Blocks added to the Krylov space without and with a start."""

POLISH = quintics((15 / 8, -10 / 8, 3 / 8))
"""Takes an error of e at 1 to about e³: the Newton-Schulz quintic."""
SIGN = SCHEDULES["exact"]._replace(chunks=SCHEDULES["exact"].chunks + POLISH)
INVERSE_ROOT = SIGN


@outside_autocast
def spectral_norm(X: Tensor, *, strict: bool = False) -> Tensor:
    """σ₁ of every matrix in the last two dimensions.

    By default the largest Ritz value of a Krylov space of 9 blocks of 16 vectors: an underestimate, by rounding only (4e-7 in fp32)
    on momenta of real training, by 3e-5 on Gaussian 512 × 512 and 0.12 % on Gaussian 2048 × 2048 matrices, whose edge is the hardest case.

    Args:
        X: shape (..., m, n), real floating point; read only.
        strict: never underestimate. Returns the Schatten norm (Σ σ¹⁶)^(1/16): above σ₁ by 0.04-1.5 % on real momenta, by about
            20 % on Gaussian matrices, by rank^(1/16) at most (all σ equal).

    Returns:
        Shape (...), X's dtype; NaN for a matrix with NaN or Inf in it.

    Raises:
        NotAMatrix: for fewer than two dimensions, or entries that are not real floating point.

    >>> round(spectral_norm(torch.diag(torch.tensor([3.0, -4.0]))).item(), 5)
    4.0
    """
    require_matrices(X)
    if X.numel() == 0:
        return X.new_zeros(X.shape[:-2])
    A, exponent, good = power_of_two(X.mT if X.size(-2) > X.size(-1) else X)
    sigma = _schatten16(A) if strict else ritz(A)[0]
    return ldexp(sigma, exponent[..., 0, 0]).where(good[..., 0, 0], torch.nan).to(X.dtype)


@outside_autocast
def spectral_normalize(X: Tensor, *, strict: bool = False) -> Tensor:
    """SN: every matrix over its spectral norm, as `spectral_norm` finds it; zero stays zero.

    Args:
        X: shape (..., m, n), real floating point; read only.
        strict: make sure that ‖result‖₂ ≤ 1, at the price of `spectral_norm`'s overestimate.

    Raises:
        NotAMatrix: for fewer than two dimensions, or entries that are not real floating point.

    >>> spectral_normalize(torch.diag(torch.tensor([3.0, -4.0])))
    tensor([[ 0.7500,  0.0000],
            [ 0.0000, -1.0000]])
    """
    require_matrices(X)
    if X.numel() == 0:
        return X.clone()
    A, _, good = power_of_two(X)
    sigma = spectral_norm(A, strict=strict)[..., None, None]
    return (A / sigma.where(sigma > 0, 1)).where(good, torch.nan).to(X.dtype)


@outside_autocast
def svc(X: Tensor, scale: float | Tensor) -> Tensor:
    """SVC: U·min(scale·S, 1)·Vᵀ of the SVD X = U·S·Vᵀ. As scale → ∞ this is msign(X).

    On a CPU by the SVD in fp64: exact to the rounding of X's dtype. On other devices in Gram space (the projector on σ > 1/scale, and
    (X·Xᵀ)^(-1/2) there) in three stages, in fp32 within 1e-3 in spectral norm for scale·σ₁ up to 1e3 and 2e-3 up to 1e4 (measured on a
    CPU); beyond, singular values near rounding (1e-6·σ₁) come out too small. Nothing waits for the device.

    Args:
        X: shape (..., m, n), real floating point; read only. Half precision is computed in fp32.
        scale: at least 0; a number, or a tensor that broadcasts to X's leading dimensions.

    Returns:
        A new tensor of X's shape and dtype, NaN for a matrix with NaN or Inf in it.

    Raises:
        NotAMatrix: for fewer than two dimensions, or entries that are not real floating point.
        BadOption: for a scale that is negative or NaN.

    >>> svc(torch.diag(torch.tensor([3.0, -0.2])), 2.0)
    tensor([[ 1.0000,  0.0000],
            [ 0.0000, -0.4000]])
    """
    require_matrices(X)
    if not isinstance(scale, Tensor) and not scale >= 0:
        raise BadOption("scale", scale, "a number of at least 0 (msign is the limit of a large one)")
    if X.numel() == 0:
        return X.clone()
    tall = X.size(-2) > X.size(-1)
    A, exponent, good = power_of_two(X.mT if tall else X)
    factor = torch.as_tensor(scale, dtype=torch.float64, device=X.device)[..., None, None].ldexp(exponent.double())
    factor = factor.expand(*X.shape[:-2], 1, 1)
    out = (_clip_svd if X.device.type == "cpu" else _clip_projector)(A, factor).where(good, torch.nan).to(X.dtype)
    return out.mT if tall else out


def ritz(A: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ritz values and vectors of A·Aᵀ on the Krylov space of a block of vectors (Musco & Musco 2015, arXiv 1504.05477).

    Args:
        A: shape (..., m, n) with m ≤ n, scaled so that no square overflows.
        start: the block an earlier call returned for a nearby matrix, (..., m, k). It saves 7 of the 9 blocks. Where A has
            nothing to do with that matrix, the underestimate is up to 0.7 % (spectra of real momenta) or 16 % (Gaussian).

    Returns:
        The largest Ritz value as an estimate of σ₁ from below, (...); the k = min(16, m) best vectors, (..., m, k). On a GPU those are
        the last block's, as LAPACK's decompositions would wait for the host.
    """
    krylov = [_orthonormal(start_of(A, start))]
    for _ in range(COLD if start is None else WARM):
        krylov.append(_orthonormal(A @ (A.mT @ krylov[-1])))
    basis = _orthonormal(torch.cat(krylov, -1))
    return _largest(A.mT @ basis, basis, krylov[-1])


def follow(X: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """σ₁ of matrices that have changed a little, by one step of a block power iteration: three passes over X. Needs the Triton kernels.

    Args:
        X: shape (B, m, n), m ≤ n, contiguous; fp16 on CUDA, entries of at most 1.
        start: what the step before returned, (B, m, 16).

    Returns:
        σ₁ from below, but for rounding, and the vectors for the next step. The newest come first there, where the next step orthogonalizes
        the others against them; the last of `start` makes room for a fresh one, for directions that no other has met.
    """
    triton = kernels.runs_triton(X)
    assert triton is not None
    Q = _columns(start_of(X, start.float()), X.dtype)
    for A in (X.mT, X):
        Q = _columns(kernels.product(A, Q), X.dtype)
    Z = kernels.product(X.mT, Q).to(X.dtype)
    sigma, turn = triton.ritz(kernels.product(Q.mT, Q), kernels.product(Z.mT, Z))
    return sigma, Q.float() @ turn.roll(1, -1)


def _columns(Q: Tensor, dtype: torch.dtype) -> Tensor:
    """Of length 1, or 0."""
    size = torch.linalg.vector_norm(Q, dim=1, keepdim=True)
    return (Q / size.where(size > 0, 1)).to(dtype)


Reduction = Generator[Tensor, Tensor, Any]
"""Yields products, takes their sums over whoever holds a part of the matrix."""


def ritz_steps(down: Callable[[Tensor], Tensor], up: Callable[[Tensor], Tensor], block: Tensor, *, cold: bool) -> Reduction:
    """`ritz` with the products Aᵀ·Q (`down`) and A·Q (`up`) left to the caller, who may hold a part of A and send back the sum."""
    krylov = [_orthonormal(block)]
    for _ in range(COLD if cold else WARM):
        image = yield down(krylov[-1])
        krylov.append(_orthonormal((yield up(image))))
    basis = _orthonormal(torch.cat(krylov, -1))
    return _largest((yield down(basis)), basis, krylov[-1])


def start_of(A: Tensor, start: Tensor | None) -> Tensor:
    """The block a Krylov space of A (..., m, n) starts from: hashed numbers, or all but the last vector of an earlier block."""
    m, k = A.size(-2), min(VECTORS, A.size(-2))
    n = torch.arange(m * k, device=A.device) * -7046029254386353131  # splitmix64's first round: no generator's state is touched
    n = (n ^ (n >> 30)) * -4658895280553007687
    block = ((n ^ (n >> 27)) % 65521 / 32760 - 1).to(A.dtype).view(m, k).expand(*A.shape[:-2], -1, -1)
    if start is None:
        return block
    return torch.cat([start[..., :-1].to(A), block[..., -1:]], -1)  # one fresh vector, for what start cannot see


def _orthonormal(Y: Tensor) -> Tensor:
    """A basis of the columns of Y; on a GPU by shifted Cholesky (Fukaya et al. 2020, SIAM J. Sci. Comput. 42), as QR may wait."""
    if Y.device.type == "cpu":
        return torch.linalg.qr(Y)[0]
    return _cholesky_qr(Y)


def _cholesky_qr(Y: Tensor) -> Tensor:
    """The shift only shortens columns that depend on others to within rounding: ‖result‖₂ ≤ 1, and what is found stays a lower bound."""
    finfo = torch.finfo(Y.dtype)
    for _ in range(3):
        G = Y.mT @ Y
        diagonal = G.diagonal(dim1=-2, dim2=-1)
        diagonal += 8 * finfo.eps * diagonal.sum(-1, keepdim=True) + finfo.tiny
        L = torch.linalg.cholesky_ex(G)[0]
        Y = torch.linalg.solve_triangular(L.mT, Y, upper=True, left=False)
    return Y


def _largest(image: Tensor, basis: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """σ₁ of `image` = Aᵀ·basis, and the vectors to start from next time."""
    if image.device.type != "cpu":
        return _largest_by_squaring(image), last
    _, values, vectors = svd(image)
    return values[..., 0], basis @ vectors.mT[..., : last.size(-1)]


def _largest_by_squaring(image: Tensor) -> Tensor:
    """The Rayleigh quotient of (ZᵀZ)^(2^20), Z the image: products only, nothing to wait for."""
    G = image.mT @ image
    P = G
    for _ in range(20):
        size = torch.linalg.matrix_norm(P, keepdim=True)
        P = P / size.where(size > 0, 1)
        P = P @ P
    trace = P.diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((G * P).sum((-2, -1)) / trace.where(trace > 0, 1)).sqrt()


def _schatten16(A: Tensor) -> Tensor:
    """(Σ σ¹⁶)^(1/16) ≥ σ₁ of A (..., m, n) with m ≤ n, with room for rounding."""
    norm = torch.linalg.matrix_norm(A, keepdim=True)
    R = A / norm.where(norm > 0, 1)
    for _ in range(3):
        R = R @ R.mT
    return norm[..., 0, 0] * torch.linalg.matrix_norm(R) ** 0.125 * (1 + 8 * torch.finfo(A.dtype).eps)


def _clip_svd(A: Tensor, factor: Tensor) -> Tensor:
    U, S, Vh = svd(A.double())
    clipped = (S * factor[..., 0]).clamp(max=1).where(S > 0, 0)
    return (U * clipped.unsqueeze(-2)) @ Vh


def _clip_projector(A: Tensor, factor: Tensor, stages: int = STAGES) -> Tensor:
    """In stages, as clipping at τ is clipping at τ₁ > τ first, and rounding grows with σ₁/τ in each."""
    bound = _schatten16(A)[..., None, None].double()
    level = (1 / (factor * bound.where(bound > 0, 1))).clamp(max=1)  # where to clip, in units of the bound
    level = level.clamp(min=1e-6).pow(1 / stages)
    C = A / bound.where(bound > 0, 1).to(A.dtype)
    for _ in range(stages):
        C = _clip_once(C, level.to(A.dtype))
    return C * (factor * bound * level**stages).clamp(max=1).where(bound > 0, 1).to(A.dtype)


def _clip_once(C: Tensor, level: Tensor) -> Tensor:
    """U·min(S/level, 1)·Vᵀ = [(I - P) + level·P·Q]·C / level, P the projector on σ > level, Q = (C·Cᵀ)^(-1/2) there; σ ≤ 1."""
    R = C @ C.mT
    shifted = R.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_(level[..., 0] ** 2)
    step = iterate(C / MARGIN, INVERSE_ROOT) * level - C
    return (C + (step + iterate(shifted / MARGIN, SIGN) @ step) / 2) / level
