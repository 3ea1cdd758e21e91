"""msign(X) = U·Vᵀ of the SVD X = U·S·Vᵀ: the polar factor, the direction of steepest descent per unit spectral norm."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from compiler import kernels
from compiler.coefficients import MARGIN, SCHEDULES, Schedule
from compiler.errors import NotAMatrix
from compiler.programs import Product
from scaling.errors import UnknownName

__all__ = ["is_rough", "iterate", "ldexp", "msign", "polar", "power_of_two", "require_matrices", "storage"]

ROUGH = ("fast",)
"""Levels whose first chunk is taken in bf16 where that is faster; of the steepest descent value "default" would keep 0.966, not 0.973."""

ROOM = 0.9
"""What the singular values are multiplied by after a first part in half precision. Its error, of up to 5 % in bf16 and up to 10 % in fp16
where a few rows hold nearly all of a matrix and nothing averages out, would else take some beyond where the next part holds, by 1.8 %
("high") or 2.6 %: emulated without it in fp16, a spectral norm of 3 ("default") or Inf ("high") on three in a thousand 3 × 3 matrices
and one in two thousand 32 × 32 ones, drawn with rows, columns and spectra of all sizes; with it 1.017 and 1.002 from 8 rows on."""

FEWEST_ROWS = 16
"""Below, matrices are stored in fp32 everywhere: they cost nothing, and fp16 is at its worst there."""


@torch.no_grad()
def msign(X: Tensor, *, accuracy: str = "default") -> Tensor:
    """The polar factor U·Vᵀ of every matrix in the last two dimensions.

    Args:
        X: shape (..., m, n), bf16, fp16, fp32 or fp64; read only. Half precision is iterated in fp32, fp64 in fp64.
        accuracy: what becomes of a singular value σ, in units of the Frobenius norm of its matrix (exact arithmetic; fp32 adds 1e-6):

            ========= ======== ============== ==================
            level     products for σ in       image
            ========= ======== ============== ==================
            "fast"    4 + 4    [1e-2, 1]      [0.996, 1.004]
            "default" 5 + 5    [2.5e-3, 1]    [0.987, 1.013]
            "high"    5+5+1    [1e-3, 1]      [0.9990, 1.0010]
            "exact"   8 × 1    [1e-4, 1]      [0.998, 1.00002]
            ========= ======== ============== ==================

            Below its interval a level multiplies σ by up to 177, 620, 2062 and 21900. On CUDA all but "exact" keep operands in fp16
            from 16 rows on, with sums in fp32: intervals then start 1.11 times as high, factors are as much lower, rounding adds up to
            5e-3 to the image, turns directions with σ at the lower end of the interval by 8 % (60 × 60, an H200), and makes singular
            values of up to 0.015, 0.05 and 0.15 of a null space. On a CPU with fast bf16 products the first part of "fast" is taken
            in bf16 from 256 rows on: directions then turn by up to 1.2 % (off-diagonal of UᵀYV, real momenta), and the image starts a
            little lower. On a CPU "exact" is the SVD in fp64: every σ above max(m, n)·ε·σ₁ (ε of X's dtype) becomes 1, every
            smaller one 0.

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
        squares = torch.linalg.vector_norm(A, dim=(-2, -1), dtype=torch.promote_types(A.dtype, torch.float32)).square()
        A, scale = polar(A, squares, accuracy)
        A = (A.to(scale.dtype) * scale[:, None, None]).reshape(good.shape[:-2] + A.shape[-2:])
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


def storage(rows: int, dtype: torch.dtype, device: torch.device, accuracy: str) -> torch.dtype:
    """What `polar` wants matrices of so many rows in, the shorter side: fp16 on CUDA, where sums are in fp32; fp64 for fp64; else fp32."""
    if dtype == torch.float64:
        return dtype
    return torch.float16 if device.type == "cuda" and accuracy != "exact" and rows >= FEWEST_ROWS else torch.float32


def polar(A: Tensor, squares: Tensor, accuracy: str) -> tuple[Tensor, Tensor]:
    """The msign of matrices prepared elsewhere, as a batch and the factors that are still to be applied to it.

    Args:
        A: shape (B, m, n) with m ≤ n, in `storage`, entries of at most 1; workspace: its contents are lost.
        squares: ‖A‖_F² of the entries as they are stored, (B,), fp32 or A's dtype.
        accuracy: a level of `msign`.

    Returns:
        Y (B, m, n) in A's dtype and scale (B,): msign = scale·Y. The factors are left to whoever writes the result, as in fp16 a matrix
        of norm 1 has entries where digits are lost. Zero where ‖A‖_F is 0; nothing here waits for the device.
    """
    norm = MARGIN * squares.sqrt()
    scale = torch.where(norm > 0, 1 / norm, 0)
    if A.dtype == torch.float16:
        return iterate(A, SCHEDULES[accuracy], scale=scale), scale
    A.mul_(scale.to(A.dtype)[:, None, None])
    return iterate(A, SCHEDULES[accuracy], rough=is_rough(A.size(-2), A.dtype, A.device, accuracy)), (norm > 0).to(scale.dtype)


def iterate(A: Tensor, schedule: Schedule, *, scale: Tensor | None = None, rough: bool = False) -> Tensor:
    """The polynomials of `schedule` on the singular values: U·p(S)·Vᵀ, for A (..., m, n) with m ≤ n.

    Each polynomial q is evaluated in the m × m matrix R = A·Aᵀ, which is smaller (Zhang, Dao et al. 2026, "Gram Newton-Schulz"), and the
    next one in an R made anew from q(R)·A, so that rounding does not grow.

    Args:
        A: read only.
        schedule: its chunks, one after the other.
        scale: shape (...): p is applied to scale·S instead, and the result is over scale, U·p(scale·S)/scale·Vᵀ.
        rough: take all chunks but the last in bf16. The last one brings the singular values where they belong all the same.
    """
    *batch, m, n = A.shape
    A = A.reshape(-1, m, n)
    square = schedule.unit if scale is None else schedule.unit * scale.reshape(-1).square()
    Y, working = A, A.dtype
    for number, chunk in enumerate(schedule.chunks):
        half = rough and number < len(schedule.chunks) - 1
        Y = Y.to(torch.bfloat16 if half else working)
        room = ROOM if number == 0 and Y.dtype.itemsize == 2 else 1.0
        Q = _program(kernels.symmetric(Y, alpha=square), chunk, room=room, identity=not half)
        # in bf16 the large multiple of I would cost Q its digits: X gets it exactly
        Y = torch.baddbmm(Y, Q, Y, beta=room * chunk[-1][3]) if half else torch.bmm(Q, Y)
    return Y.reshape(*batch, m, n)


def _program(R: Tensor, chunk: tuple[Product, ...], *, room: float = 1.0, identity: bool = True) -> Tensor:
    """room·Q, Q a polynomial of R, by the products of `compiler.programs`; four matrices of R's size as workspace."""
    before, last, spare = R, R, [torch.empty_like(R) for _ in chunk[:3]]
    for k, (a, b, d, g) in enumerate(chunk):
        final = k == len(chunk) - 1
        other = R if final else before
        if final:
            a, b, d, g = room * a, room * b, room * d, room * g if identity else 0.0
        before, last = last, kernels.symmetric(last, alpha=a, C=last, beta=b, D=other if d else None, delta=d, gamma=g, out=spare[k % 3])
    return last


def is_rough(m: int, dtype: torch.dtype, device: torch.device, accuracy: str) -> bool:
    """Whether matrices of m rows, m ≤ n, go through bf16 first: where it is good enough and faster, 2.1 times at 256 rows (measured)."""
    return accuracy in ROUGH and dtype == torch.float32 and device.type == "cpu" and m >= 256 and _fast_bf16()


@cache
def _fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones: AVX512-BF16 or AMX, as oneDNN finds."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


def _svd(A: Tensor, eps: float) -> Tensor:
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    cutoff = max(A.shape[-2:]) * eps * S[..., :1]
    return (U * S.gt(cutoff).unsqueeze(-2)) @ Vh
