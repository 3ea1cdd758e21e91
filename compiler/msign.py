"""msign(X) = U·Vᵀ of the SVD X = U·S·Vᵀ: the polar factor, the direction of steepest descent per unit spectral norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compiler import kernels
from compiler.autocast import outside_autocast
from compiler.coefficients import MARGIN, SCHEDULES, Schedule
from compiler.errors import NotAMatrix
from compiler.programs import Product
from compiler.svd import svd
from scaling.errors import UnknownName

__all__ = ["iterate", "ldexp", "msign", "polar", "power_of_two", "require_matrices", "storage"]

FEWEST_ROWS = 16
"""Below, matrices are stored in fp32 everywhere: they cost nothing, and fp16 is at its worst there."""


@torch.no_grad()
@outside_autocast
def msign(X: Tensor, *, accuracy: str = "default") -> Tensor:
    """The polar factor U·Vᵀ of every matrix in the last two dimensions.

    Args:
        X: shape (..., m, n), bf16, fp16, fp32 or fp64; read only. Half precision is iterated in fp32, fp64 in fp64.
        accuracy: what becomes of a singular value σ, in units of s = (Σ σ⁴)^¼ of its matrix, σ₁ ≤ s ≤ ‖X‖_F (exact arithmetic; fp32
            adds up to 6e-6, and turns directions, by up to 4e-4 in matrices of a few rows):

            ========= ======== ============== ==================
            level     products for σ in       image
            ========= ======== ============== ==================
            "fast"    4 + 4    [8.7e-3, 1]    [0.991, 1.009]
            "default" 5 + 5    [3.4e-3, 1]    [0.994, 1.006]
            "high"    5+5+1    [8.7e-4, 1]    [0.9971, 1.0029]
            "exact"   8 × 1    [1e-4, 1]      [0.998, 1.00002]
            ========= ======== ============== ==================

            Below its interval a level multiplies σ/s by up to 187, 513, 2165 and 21900. On CUDA all but "exact" keep operands in fp16
            from 16 rows on, with sums in fp32. That rounding (emulated, 20 to 64 rows) adds up to 4e-3 to the image, up to 0.02 in
            the worst that hill climbing over matrices of a few rows finds: no norm above 1.026 was seen. Where a few rows hold nearly
            all of a matrix some singular values come out as small as 0.25 of what they should. It turns directions with σ at the
            lower end of the interval by 2, 6 and 14 %, and makes singular values of up to 0.03, 0.07 and 0.3 of a null space. On a
            CPU "exact" is the SVD in fp64: every σ above max(m, n)·ε·σ₁ (ε of X's dtype) becomes 1, every smaller one 0.

    Returns:
        A new tensor of X's shape and dtype, without a gradient. A zero matrix gives zero. Norms from the smallest subnormal to the
        largest finite number are handled. A matrix with NaN or Inf in it comes out all NaN, the others of the batch unharmed.

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
        A = A.to(storage(A.size(-2), X.dtype, X.device, accuracy)).reshape(-1, *A.shape[-2:])
        if A.dtype == torch.float16:
            A, scale = polar(A, _squares(A), accuracy)
            A = A.float() * scale[:, None, None]
        else:
            A = polar_(A, accuracy)
        A = A.reshape(good.shape[:-2] + A.shape[-2:])
    A = (A if kernels.holds(good) else A.where(good, torch.nan)).to(X.dtype)
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
    largest = torch.maximum(A.amax(dim=(-2, -1), keepdim=True), -A.amin(dim=(-2, -1), keepdim=True))
    good = largest.isfinite()
    exponent = torch.frexp(largest.where(good, 1)).exponent
    if not kernels.holds(good):
        return ldexp(A.where(good, 0), -exponent), exponent, good
    if kernels.holds(exponent.abs() < NORMAL):
        return A * torch.ones_like(largest).ldexp(-exponent), exponent, good
    return ldexp(A, -exponent), exponent, good


NORMAL = 100
"""2^e is in the range of fp32 for smaller |e|."""


def ldexp(X: Tensor, exponent: Tensor) -> Tensor:
    """X·2^e, also where 2^e itself is out of range."""
    half = exponent // 2
    return X.ldexp(half.to(X.dtype)).ldexp((exponent - half).to(X.dtype))


def storage(rows: int, dtype: torch.dtype, device: torch.device, accuracy: str) -> torch.dtype:
    """What `polar` wants matrices of so many rows in, the shorter side: fp16 on CUDA, where sums are in fp32; fp64 for fp64; else fp32."""
    if dtype == torch.float64:
        return dtype
    return torch.float16 if device.type == "cuda" and accuracy != "exact" and rows >= FEWEST_ROWS else torch.float32


def polar_(A: Tensor, accuracy: str) -> Tensor:
    """The msign of matrices prepared elsewhere, in their place.

    Args:
        A: shape (B, m, n) with m ≤ n, fp32 or fp64; the largest entry of every matrix in [1/2, 1], or all of it zero.
        accuracy: a level of `msign`.

    Returns:
        A, written over.
    """
    schedule = SCHEDULES[accuracy]
    first, rest = schedule.chunks[0], schedule._replace(chunks=schedule.chunks[1:])
    for part in A.split(kernels.cached(A)):
        R = kernels.symmetric(part, alpha=schedule.unit)
        size = _size(R)
        square = torch.where(size > 0, schedule.unit / size, 0)
        Q = _program(R.mul_(square[:, None, None]), first).mul_(square.sqrt()[:, None, None])
        iterate(torch.bmm(Q, part), rest, out=part)
    return A


def polar(A: Tensor, squares: Tensor, accuracy: str) -> tuple[Tensor, Tensor]:
    """The msign of matrices prepared elsewhere, as a batch and the factors that are still to be applied to it.

    Args:
        A: shape (B, m, n) with m ≤ n, in `storage`, entries of at most 1; read only.
        squares: ‖A‖_F² of the entries as they are stored, (B,), fp32 or A's dtype.
        accuracy: a level of `msign`.

    Returns:
        Y (B, m, n) in A's dtype and scale (B,): msign = scale·Y. The factors are left to whoever writes the result, as in fp16 a matrix
        of norm 1 has entries where digits are lost. Zero where ‖A‖_F is 0; nothing here waits for the device.
    """
    schedule = SCHEDULES[accuracy]
    first, rest = schedule.chunks[0], schedule._replace(chunks=schedule.chunks[1:])
    square = schedule.unit / squares.clamp(min=SMALLEST)
    R = kernels.symmetric(A, alpha=square)
    factor = schedule.unit / _size(R).clamp(min=1)  # it is unit·MARGIN²/√m at least, or else R is zero
    square = square * factor
    Y = torch.bmm(_program(R, first, factor), A)
    del R
    return iterate(Y, rest, square=square), (square / schedule.unit).sqrt()


SMALLEST = 1e-30
"""Smaller sums of squares count as zero; their inverses are in the range of fp32."""


def _squares(A: Tensor) -> Tensor:
    """‖A‖_F² of each matrix, at least in fp32."""
    return torch.linalg.vector_norm(A, dim=(-2, -1), dtype=torch.promote_types(A.dtype, torch.float32)).square()


def _size(R: Tensor) -> Tensor:
    """(MARGIN·s)², s = (Σ σ⁴)^¼ ≥ σ₁ of the matrices X with R = X·Xᵀ."""
    return MARGIN**2 * torch.linalg.vector_norm(R, dim=(-2, -1), dtype=torch.promote_types(R.dtype, torch.float32))


def iterate(A: Tensor, schedule: Schedule, *, square: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The polynomials of `schedule` on the singular values: U·p(S)·Vᵀ, for A (..., m, n) with m ≤ n.

    Each polynomial q is evaluated in the m × m matrix R = A·Aᵀ, which is smaller (Zhang, Dao et al. 2026, "Gram Newton-Schulz"), and the
    next one in an R made anew from q(R)·A, so that rounding does not grow.

    Args:
        A: read only.
        schedule: its chunks, one after the other.
        square: unit·scale², shape (...): p is applied to scale·S instead, and the result is over scale, U·p(scale·S)/scale·Vᵀ.
        out: shape (B, m, n), for the result; not A.
    """
    *batch, m, n = A.shape
    Y = A.reshape(-1, m, n)
    alpha = schedule.unit if square is None else square.reshape(-1)
    for k, chunk in enumerate(schedule.chunks, 1):
        into = out if k == len(schedule.chunks) else None
        Y = torch.bmm(_program(kernels.symmetric(Y, alpha=alpha), chunk), Y, out=into)
    return Y.reshape(*batch, m, n)


def _program(R: Tensor, chunk: tuple[Product, ...], factor: Tensor | None = None) -> Tensor:
    """Q, a polynomial of R, by the products of `compiler.programs`; at most four matrices of R's size as workspace, R among them.

    Args:
        R: shape (B, m, m). Its contents are lost.
        chunk: its products.
        factor: shape (B,): of factor·R instead. That goes into the coefficients, as fp16 would round R again.
    """
    before, last, spare, over = R, R, [], kernels.in_place(R)
    for k, (alpha, beta, delta, gamma) in enumerate(_coefficients(chunk, factor)):
        final = k == len(chunk) - 1
        D = None if not chunk[k][2] else R if final else before
        out = D if over and D is not None and D is not last and (final or D is not R) else spare.pop() if spare else torch.empty_like(R)
        new = kernels.symmetric(last, alpha=alpha, C=last, beta=beta, D=D, delta=delta, gamma=gamma, out=out)
        if before is not R and before is not out:
            spare.append(before)
        before, last = last, new
    return last


def _coefficients(chunk: tuple[Product, ...], factor: Tensor | None) -> Sequence[tuple[float | Tensor, ...]]:
    """Those of the products of factor·R where R is at hand: R is squared in the first, and a summand there and wherever d may be."""
    if factor is None:
        return chunk
    rows: list[list[Any]] = [list(row) for row in chunk]
    places = [(0, 0), (0, 1), *((k, 2) for k in dict.fromkeys((0, 1, len(chunk) - 1)) if k < len(chunk))]
    scaled = torch._foreach_mul(  # pyright: ignore[reportPrivateImportUsage]
        [factor] * len(places), [chunk[k][j] for k, j in places]
    )  # one launch
    for (k, j), value in zip(places, scaled, strict=True):
        rows[k][j] = value
    rows[0][0] = rows[0][0] * factor
    return [tuple(row) for row in rows]


def _svd(A: Tensor, eps: float) -> Tensor:
    U, S, Vh = svd(A.double())
    cutoff = max(A.shape[-2:]) * eps * S[..., :1]
    return (U * S.gt(cutoff).unsqueeze(-2)) @ Vh
