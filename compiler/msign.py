"""msign(X) = U·Vᵀ of the SVD X = U·S·Vᵀ: the polar factor, the direction of steepest descent per unit spectral norm."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from compiler.coefficients import MARGIN, SCHEDULES, Schedule
from compiler.errors import NotAMatrix
from scaling.errors import UnknownName

__all__ = ["iterate", "ldexp", "msign", "power_of_two", "require_matrices"]


def msign(X: Tensor, *, accuracy: str = "default") -> Tensor:
    """The polar factor U·Vᵀ of every matrix in the last two dimensions.

    Args:
        X: shape (..., m, n), bf16, fp16, fp32 or fp64; read only. Half precision is iterated in fp32, fp64 in fp64.
        accuracy: what becomes of a singular value σ, in units of the Frobenius norm of its matrix (exact arithmetic; fp32 adds 1e-6):

            ========= ===== ============== ================
            level     steps for σ in       image
            ========= ===== ============== ================
            "fast"    4     [1e-2, 1]      [0.966, 1.013]
            "default" 5     [3e-3, 1]      [0.977, 1.005]
            "high"    6     [1e-3, 1]      [0.989, 1.001]
            "exact"   8     [1e-4, 1]      [0.998, 1.00002]
            ========= ===== ============== ================

            Below its interval a level multiplies σ by up to 235, 514, 1760 and 21900. On a CPU "exact" is the SVD in fp64, where
            it costs no more: every σ above max(m, n)·ε·σ₁ (ε of X's dtype) becomes 1, every smaller one 0.

    Returns:
        A new tensor of X's shape and dtype. A zero matrix gives zero. Norms from the smallest subnormal to the largest finite
        number are handled. A matrix with NaN or Inf in it comes out all NaN, the others of the batch unharmed.

    Raises:
        NotAMatrix: for fewer than two dimensions, or entries that are not real floating point.
        UnknownName: for an unknown accuracy.

    >>> msign(torch.tensor([[3.0, 0.0], [0.0, -0.5]]), accuracy="exact")
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    require_matrices(X)
    if accuracy not in SCHEDULES:
        raise UnknownName("accuracy", accuracy, SCHEDULES)
    if X.numel() == 0:
        return X.clone()
    tall = X.size(-2) > X.size(-1)
    A, _, good = power_of_two(X.mT if tall else X)
    if accuracy == "exact" and X.device.type == "cpu":
        A = _svd(A, torch.finfo(X.dtype).eps)
    else:
        norm = MARGIN * torch.linalg.matrix_norm(A, keepdim=True)
        A = iterate(A / norm.where(norm > 0, 1), SCHEDULES[accuracy])
    A = A.where(good, torch.nan).to(X.dtype)
    return A.mT if tall else A


def require_matrices(X: Tensor) -> None:
    """Refuse what has no singular values here.

    Raises:
        NotAMatrix: for fewer than two dimensions, or entries that are not real floating point.
    """
    if X.ndim < 2:
        raise NotAMatrix(X.shape, "no singular vectors in a tensor", "pass (..., m, n); at least two dimensions")
    if not X.is_floating_point():
        raise NotAMatrix(X.shape, f"a tensor of {X.dtype}", "pass real floating point entries")


def power_of_two(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X in working precision (fp32, or fp64 for fp64), each matrix over the power of two that brings its largest entry to [1/2, 1).

    Exact: no rounding, no overflow in any norm, whatever the size. Matrices with NaN or Inf are set to zero.

    Returns:
        A = X / 2^e; the exponents e; whether each matrix is finite. The last two have shape (..., 1, 1).
    """
    A = X.to(torch.promote_types(X.dtype, torch.float32))
    largest = A.abs().amax(dim=(-2, -1), keepdim=True)
    good = largest.isfinite()
    exponent = torch.frexp(largest.where(good, 1)).exponent
    return ldexp(A.where(good, 0), -exponent), exponent, good


def ldexp(X: Tensor, exponent: Tensor) -> Tensor:
    """X·2^e, also where 2^e itself is out of range."""
    half = exponent // 2
    return X.ldexp(half.to(X.dtype)).ldexp((exponent - half).to(X.dtype))


def iterate(A: Tensor, schedule: Schedule) -> Tensor:
    """The composed quintics p of `schedule` on the singular values: U·p(S)·Vᵀ, for A (..., m, n) with m ≤ n.

    A wide matrix is iterated in Gram space, Q·A with Q a polynomial of A·Aᵀ that is m × m (Zhang, Dao et al. 2026, "Gram
    Newton-Schulz"), restarted so that rounding does not grow; for a nearly square one each step is its own restart, the
    usual iteration, which then has fewer products.
    """
    *batch, m, n = A.shape
    A = A.reshape(-1, m, n)
    every = range(1, len(schedule.steps))
    cuts = [0, *(schedule.restarts if 2 * n > 3 * m else every), len(schedule.steps)]
    for first, last in pairwise(cuts):
        A = torch.bmm(_gram(torch.bmm(A, A.mT), schedule.steps[first:last]), A)
    return A.reshape(*batch, m, n)


def _gram(R: Tensor, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    """The Q for which Q·A has gone through `steps`, from R = A·Aᵀ. Everything here is a polynomial of R and commutes."""
    Z = Q = _quintic(R, *steps[0])
    for step in steps[1:]:
        R = torch.bmm(torch.bmm(Z, R), Z)
        Z = _quintic(R, *step)
        Q = torch.bmm(Z, Q)
    return Q


def _quintic(R: Tensor, a: float, b: float, c: float) -> Tensor:
    Z = torch.baddbmm(R, R, R, beta=b, alpha=c)
    Z.diagonal(dim1=-2, dim2=-1).add_(a)
    return Z


def _svd(A: Tensor, eps: float) -> Tensor:
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    cutoff = max(A.shape[-2:]) * eps * S[..., :1]
    return (U * S.gt(cutoff).unsqueeze(-2)) @ Vh
