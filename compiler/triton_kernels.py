"""The kernels in Triton: imported only where they run, as `compiler.kernels` decides. Everything is computed in fp32.

No atomics: the same input gives the same bits. `TRITON_INTERPRET=1` runs them on a CPU, which is how the suite checks them.
"""

# The arguments of a kernel are pointers and numbers, and a launch does not have the types of the function:
# ruff: noqa: ANN001, ANN202
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["BLOCK", "Shape", "adam_", "advance_", "apply_", "ritz", "shape_of", "symmetric"]

TILE = 64
"""Side of a tile of `advance_` and `apply_`: 64 × 64 entries, of which rows and columns both fill whole lines of memory."""


@triton.jit
def _coefficient(x, index, EACH: tl.constexpr):
    """A number, or the entry of one matrix in a table of numbers."""
    return tl.load(x + index) if EACH else x


@triton.jit
def _root(t):
    """The row i of entry t of a triangle stored by rows, the largest i with i(i + 1)/2 ≤ t; exact, as fp32 is off by one at most."""
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    return tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)


@triton.jit
def _symmetric(
    a, rows_of_a, c, d, out, alpha, beta, delta, gamma, m, k, triangle, tiles,
    a_batch, a_row, a_col, c_batch, c_row, d_batch, d_row, out_batch, out_row,
    C: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    SIDE: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write α·A·Aᵀ + β·C + δ·D + γ·I to out by the tiles of the lower triangle; each is written twice, the second time transposed.

    Persistent: program p takes tiles p, p + programs, … of the whole batch, matrix after matrix. With TMA, A is read through the
    descriptor rows_of_a, of all matrices one below the other: what a tile reads of the next matrix is not written.
    """
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        matrix, t = (tile // triangle).to(tl.int64), tile % triangle
        i = _root(t)
        j = t - i * (i + 1) // 2
        rows, cols = i * SIDE + tl.arange(0, SIDE), j * SIDE + tl.arange(0, SIDE)
        inside = (rows[:, None] < m) & (cols[None, :] < m)
        at = rows[:, None].to(tl.int64)
        if C:  # asked for now, they are there when the products are done
            c_tile = _read(c + matrix * c_batch + at * c_row + cols[None, :], inside, EVEN)
        if D:
            d_tile = _read(d + matrix * d_batch + at * d_row + cols[None, :], inside, EVEN)
        acc = tl.zeros((SIDE, SIDE), tl.float32)
        if TMA:
            above = tile // triangle * m
            for start in tl.range(0, k, DEPTH):
                left = rows_of_a.load([above + i * SIDE, start])
                acc = tl.dot(left, rows_of_a.load([above + j * SIDE, start]).T, acc, input_precision=PRECISION)
        else:
            depth = tl.arange(0, DEPTH)
            left_at = a + matrix * a_batch + at * a_row + depth[None, :] * a_col
            right_at = a + matrix * a_batch + cols[None, :].to(tl.int64) * a_row + depth[:, None] * a_col
            for start in tl.range(0, k, DEPTH):
                if EVEN:
                    left, right = tl.load(left_at), tl.load(right_at)
                else:
                    left = tl.load(left_at, mask=(rows[:, None] < m) & (depth[None, :] < k - start), other=0.0)
                    right = tl.load(right_at, mask=(cols[None, :] < m) & (depth[:, None] < k - start), other=0.0)
                acc = tl.dot(left, right, acc, input_precision=PRECISION)
                left_at += DEPTH * a_col
                right_at += DEPTH * a_col
        acc *= _coefficient(alpha, matrix, EACH[0])
        if C:
            acc += _coefficient(beta, matrix, EACH[1]) * c_tile.to(tl.float32)
        if D:
            acc += _coefficient(delta, matrix, EACH[2]) * d_tile.to(tl.float32)
        acc += tl.where(rows[:, None] == cols[None, :], _coefficient(gamma, matrix, EACH[3]), 0.0)
        result = acc.to(out.dtype.element_ty)
        place = out + matrix * out_batch + at * out_row + cols[None, :]
        mirror = out + matrix * out_batch + cols[:, None].to(tl.int64) * out_row + rows[None, :]
        if EVEN:
            tl.store(place, result)
            if i != j:
                tl.store(mirror, tl.trans(result))
        else:
            tl.store(place, result, mask=inside)
            if i != j:
                tl.store(mirror, tl.trans(result), mask=(cols[:, None] < m) & (rows[None, :] < m))


@triton.jit
def _read(place, inside, EVEN: tl.constexpr):
    """EVEN: all are inside."""
    return tl.load(place) if EVEN else tl.load(place, mask=inside, other=0.0)


class Shape(NamedTuple):
    """How a product is cut: into tiles of side × side, depth columns at a time."""

    side: int
    depth: int
    warps: int
    stages: int
    resident: int
    tma: bool


FEW, LARGE = 264, 4096
"""Fewer than two tiles of 128 × 128 for each of 132 multiprocessors: smaller ones. From LARGE rows on the tensor memory accelerator.
Measured on an H200 (examples/results/symmetric_cuda.txt): 64 against 128 wide 0.009 and 0.014 ms for one matrix of 768 rows, 0.029 and
0.034 ms for 32 of 512, 0.92 and 0.64 ms for 32 of 2048; with it against without 0.53 and 0.55 ms for 4 of 4096, 1.90 and 2.21 ms for
6 of 4096 × 11008, but 0.67 and 0.64 ms for 32 of 2048, and 0.1 ms of the host's time for each launch."""


def shape_of(batch: int, m: int, dtype: torch.dtype) -> Shape:
    """What is fastest for a batch of m rows."""
    side = -(-m // 128)
    if m <= 512 or batch * side * (side + 1) // 2 < FEW:
        return Shape(64, 32 if dtype == torch.float32 else 64, 4, 4, 3, tma=False)
    if dtype == torch.float32:
        return Shape(128, 32, 8, 3, 1, tma=False)
    return Shape(128, 64, 8, 4, 1, tma=m >= LARGE)


def symmetric(
    A: Tensor, coefficients: list[float | Tensor], C: Tensor | None, D: Tensor | None, out: Tensor, shape: Shape | None = None
) -> Tensor:
    """`compiler.kernels.symmetric`, for C, D and out with rows of stride 1."""
    batch, m, k = A.shape
    side, depth, warps, stages, resident, tma = shape or shape_of(batch, m, A.dtype)
    tma = tma and _describable(A)
    n = triton.cdiv(m, side)
    triangle = n * (n + 1) // 2
    c, d = out if C is None else C, out if D is None else D
    _symmetric[(min(batch * triangle, resident * _programs(A.device)),)](
        A, TensorDescriptor(A, [batch * m, k], [A.stride(1), 1], [side, depth]) if tma else A, c, d, out, *coefficients,
        m, k, triangle, batch * triangle,
        *A.stride(), c.stride(0), c.stride(1), d.stride(0), d.stride(1), out.stride(0), out.stride(1),
        C=C is not None, D=D is not None, EACH=tuple(isinstance(x, Tensor) for x in coefficients),
        EVEN=m % side == 0 and (tma or k % depth == 0), PRECISION="ieee", SIDE=side, DEPTH=depth, TMA=tma,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _describable(T: Tensor) -> bool:
    """Whether the tensor memory accelerator (Hopper and later) can read a batch as one matrix: rows evenly spaced, 16 bytes aligned."""
    hopper = not T.is_cuda or torch.cuda.get_device_capability(T.device) >= (9, 0)
    even = T.stride(2) == 1 and (T.size(0) == 1 or T.stride(0) == T.size(1) * T.stride(1)) and T.stride(1) >= T.size(2)
    return hopper and even and T.stride(1) * T.itemsize % 16 == 0 and T.data_ptr() % 16 == 0


@cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _ritz(before, after, sigma, turn, SQUARINGS: tl.constexpr, SHIFT: tl.constexpr, K: tl.constexpr):
    """For one matrix: the largest λ of after·v = λ·before·v, and the inverse of the Cholesky factor of before, transposed."""
    matrix = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    at = matrix * K * K + i * K + j
    G, H = tl.load(before + at), tl.load(after + at)
    one = tl.where(i == j, 1.0, 0.0)
    trace = tl.sum(tl.sum(G * one, 1), 0)
    G += one * (SHIFT * trace + 1e-30)
    L = one
    for k in tl.static_range(K):  # Gauss on [G | I]: the right half becomes the inverse of the factor
        pivot = tl.sum(tl.sum(tl.where((i == k) & (j == k), G, 0.0), 1), 0)
        root = 1.0 / tl.sqrt(tl.maximum(pivot, SHIFT * trace + 1e-30))
        row, below = tl.sum(tl.where(i == k, G, 0.0), 0)[None, :] * root, tl.sum(tl.where(j == k, G, 0.0), 1)[:, None] * root
        inverse = tl.sum(tl.where(i == k, L, 0.0), 0)[None, :] * root
        G -= tl.where(i > k, below * row, 0.0)
        L = tl.where(i == k, inverse, L - tl.where(i > k, below * inverse, 0.0))
    H = tl.dot(tl.dot(L, H, input_precision="ieee"), tl.trans(L), input_precision="ieee")
    P = H
    for _ in tl.static_range(SQUARINGS):
        size = tl.sum(tl.sum(tl.abs(P) * one, 1), 0)
        P = P / tl.where(size > 0, size, 1.0)
        P = tl.dot(P, P, input_precision="ieee")
    size = tl.sum(tl.sum(P * one, 1), 0)
    tl.store(sigma + matrix, tl.sqrt(tl.maximum(tl.sum(tl.sum(H * P, 1), 0) / tl.where(size > 0, size, 1.0), 0.0)))
    tl.store(turn + at, tl.trans(L))


def ritz(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The largest singular value of X over a block of 16 vectors Y, from G = YᵀY and H = (XᵀY)ᵀ(XᵀY); and T, so that Y·T is orthonormal.

    Args:
        before: G, shape (batch, 16, 16), fp32, contiguous.
        after: H, likewise.

    Returns:
        √λ of H·v = λ·G·v, shape (batch,), never more than σ₁ of X but by rounding, as G is shifted by 8 ε of its trace; and T like G.
    """
    sigma, turn = before.new_empty(len(before)), torch.empty_like(before)
    _ritz[(len(before),)](before, after, sigma, turn, SQUARINGS=20, SHIFT=2.0**-20, K=16, num_warps=1)
    return sigma, turn


@triton.jit
def _place(r, c, row_stride, col_stride):
    """Offsets of this program's tile in a matrix of r × c, and which of them lie inside."""
    across = tl.cdiv(c, TILE_SIDE)
    rows = (tl.program_id(0) // across) * TILE_SIDE + tl.arange(0, TILE_SIDE)
    cols = (tl.program_id(0) % across) * TILE_SIDE + tl.arange(0, TILE_SIDE)
    inside = (rows[:, None] < r) & (cols[None, :] < c)
    return rows, cols, rows[:, None].to(tl.int64) * row_stride + cols[None, :].to(tl.int64) * col_stride, inside


TILE_SIDE = tl.constexpr(TILE)


@triton.jit
def _advance(
    grads, buffers, finite, factors, out, squares, largest, momentum, r, c, g_row, g_col, b_row, b_col,
    DTYPE: tl.constexpr, STATE: tl.constexpr, NESTEROV: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    rows, cols, at, inside = _place(r, c, g_row, g_col)
    fine = tl.load(finite + matrix) != 0
    mu = tl.load(momentum)
    G = tl.load(tl.load(grads + matrix).to(tl.pointer_type(DTYPE)) + at, mask=inside & fine, other=0.0).to(tl.float32)
    Phi = G
    B = G
    if STATE is not None:
        place = (
            tl.load(buffers + matrix).to(tl.pointer_type(STATE)) + rows[:, None].to(tl.int64) * b_row + cols[None, :].to(tl.int64) * b_col
        )
        B = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        B = tl.where(fine, B + (1.0 - mu) * (G - B), B)
        B = B.to(STATE)
        tl.store(place, B, mask=inside & fine)
        B = B.to(tl.float32)
        Phi = G + mu * (B - G) if NESTEROV else B
    Phi = tl.where(fine, Phi, 0.0) * tl.load(factors + 2 * matrix) * tl.load(factors + 2 * matrix + 1)
    Phi = Phi.to(out.dtype.element_ty)
    X = out + matrix * r * c
    if TALL:
        tl.store(X + cols[:, None].to(tl.int64) * r + rows[None, :], tl.trans(Phi), mask=(cols[:, None] < c) & (rows[None, :] < r))
    else:
        tl.store(X + rows[:, None].to(tl.int64) * c + cols[None, :], Phi, mask=inside)
    Phi = Phi.to(tl.float32)
    part = matrix * tl.num_programs(0) + tl.program_id(0)
    tl.store(squares + part, tl.sum(tl.sum(Phi * Phi, 1), 0))
    tl.store(largest + part, tl.max(tl.max(tl.abs(B), 1), 0))


def advance_(
    grads: Tensor, buffers: Tensor | None, like: Tensor, kept: Tensor | None, out: Tensor, factors: Tensor, finite: Tensor,
    momentum: Tensor, nesterov: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`compiler.kernels.advance_`, for matrices at the addresses `grads` and `buffers` that lie in memory like `like` and `kept`."""
    r, c = like.shape
    grid = (triton.cdiv(r, TILE) * triton.cdiv(c, TILE), len(grads))
    squares, largest = torch.empty(2, grid[1], grid[0], dtype=torch.float32, device=out.device).unbind()
    _advance[grid](
        grads, grads if buffers is None else buffers, finite, factors, out, squares, largest, momentum, r, c,
        *like.stride(), *(like if kept is None else kept).stride(),
        DTYPE=_DTYPES[like.dtype], STATE=None if kept is None else _DTYPES[kept.dtype], NESTEROV=nesterov, TALL=r > c,
    )  # fmt: skip
    return squares.sum(1), largest.amax(1)


@triton.jit
def _apply(weights, lows, U, scale, decay, finite, r, c, row, col, DTYPE: tl.constexpr, LOW: tl.constexpr, TALL: tl.constexpr):
    matrix = tl.program_id(1).to(tl.int64)
    rows, cols, at, inside = _place(r, c, row, col)
    fine = tl.load(finite + matrix) != 0
    X = U + matrix * r * c
    if TALL:
        u = tl.trans(tl.load(X + cols[:, None].to(tl.int64) * r + rows[None, :], mask=(cols[:, None] < c) & (rows[None, :] < r), other=0.0))
    else:
        u = tl.load(X + rows[:, None].to(tl.int64) * c + cols[None, :], mask=inside, other=0.0)
    W, low, mask = tl.load(weights + matrix), tl.load(lows + matrix), inside & fine
    w = _kept(W, low, at, mask, DTYPE, LOW)
    _keep(W, low, at, tl.load(decay + matrix) * w - tl.load(scale + matrix) * u.to(tl.float32), mask, DTYPE, LOW)


@triton.jit
def _kept(W, low, at, mask, DTYPE: tl.constexpr, LOW: tl.constexpr):
    """Entries of the weight at address W, in fp32: `compiler.bits.join` where its bits are kept at the address low."""
    if LOW:
        bits = tl.load(W.to(tl.pointer_type(tl.int16)) + at, mask=mask, other=0).to(tl.int32)
        magnitude = ((bits & 0x7FFF) << 16) + tl.load(low.to(tl.pointer_type(tl.int16)) + at, mask=mask, other=0).to(tl.int32)
        w = (tl.maximum(magnitude, 0) | ((bits >> 15) << 31)).to(tl.float32, bitcast=True)
    else:
        w = tl.load(W.to(tl.pointer_type(DTYPE)) + at, mask=mask, other=0.0).to(tl.float32)
    return w


@triton.jit
def _keep(W, low, at, new, mask, DTYPE: tl.constexpr, LOW: tl.constexpr):
    """Write them: `compiler.bits.split`."""
    if LOW:
        bits = new.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(W.to(tl.pointer_type(tl.int16)) + at, high.to(tl.int16), mask=mask)
        tl.store(low.to(tl.pointer_type(tl.int16)) + at, (bits - (high << 16)).to(tl.int16), mask=mask)
    else:
        tl.store(W.to(tl.pointer_type(DTYPE)) + at, new.to(DTYPE), mask=mask)


def apply_(weights: Tensor, lows: Tensor | None, like: Tensor, U: Tensor, scale: Tensor, decay: Tensor, finite: Tensor) -> None:
    """`compiler.kernels.apply_`, for matrices at the addresses `weights` and `lows` that lie in memory like `like`."""
    r, c = like.shape
    grid = (triton.cdiv(r, TILE) * triton.cdiv(c, TILE), len(weights))
    _apply[grid](
        weights, weights if lows is None else lows, U, scale, decay, finite, r, c, *like.stride(),
        DTYPE=_DTYPES[like.dtype], LOW=lows is not None, TALL=r > c,
    )  # fmt: skip


@triton.jit
def _adam(
    work, weights, lows, grads, means, squares, sizes, rate, decay, root, finite, rest1, beta2, rest2, eps,
    DTYPE: tl.constexpr, STATE: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p takes BLOCK entries of one tensor: which, and the how manieth of them, are entries p of `work`."""
    tensor = tl.load(work + 2 * tl.program_id(0))
    at = tl.load(work + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (at < tl.load(sizes + tensor)) & (tl.load(finite + tensor) != 0)
    W, low = tl.load(weights + tensor), tl.load(lows + tensor)
    M = tl.load(means + tensor).to(tl.pointer_type(STATE)) + at
    V = tl.load(squares + tensor).to(tl.pointer_type(STATE)) + at
    g = tl.load(tl.load(grads + tensor).to(tl.pointer_type(DTYPE)) + at, mask=mask, other=0.0).to(tl.float32)
    m, v = tl.load(M, mask=mask, other=0.0).to(tl.float32), tl.load(V, mask=mask, other=0.0).to(tl.float32)
    m, v = (m + rest1 * (g - m)).to(STATE), (beta2 * v + rest2 * g * g).to(STATE)
    tl.store(M, m, mask=mask)
    tl.store(V, v, mask=mask)
    Phi = tl.div_rn(m.to(tl.float32), tl.div_rn(tl.sqrt_rn(v.to(tl.float32)), tl.load(root + tensor)) + eps)
    w = _kept(W, low, at, mask, DTYPE, LOW)
    _keep(W, low, at, tl.load(decay + tensor) * w - tl.load(rate + tensor) * Phi, mask, DTYPE, LOW)


def adam_(
    work: Tensor, dtypes: tuple[torch.dtype, torch.dtype, bool], tables: list[Tensor], sizes: Tensor, factors: list[Tensor], finite: Tensor,
    betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """`compiler.kernels.adam_`, for weights, their bits, gradients, m and v at the addresses `tables`.

    `dtypes`: of weights and gradients, of m and v, and whether bits are kept; `factors`: rate, decay and root.
    """
    (beta1, beta2), (dtype, state, low) = betas, dtypes
    _adam[(len(work),)](
        work,
        *tables,
        sizes,
        *factors,
        finite,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        DTYPE=_DTYPES[dtype],
        STATE=_DTYPES[state],
        LOW=low,
        BLOCK=BLOCK,
    )


BLOCK = 1024
"""Entries that a program of `adam_` takes."""

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
