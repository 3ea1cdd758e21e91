"""Products known to be symmetric, and the passes over the weights before and after them: Triton on CUDA, torch elsewhere.

Nothing here waits for the device: numbers that depend on data stay in tensors. The Triton code is checked entry by entry against torch
in its interpreter, and compiled for sm_90 by tests that need no device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compiler.bits import join, split
from compiler.errors import BadOption

__all__ = ["adam_", "advance_", "apply_", "cached", "holds", "in_place", "product", "runs_triton", "symmetric", "table"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

STRIP = 128
"""On a CPU the triangle is computed by strips of so many rows, each finished in a place that stays in the cache. Measured by `msign` on an
EPYC with AVX-512 against the whole product, one core and two: 1.14 and 1.10 times as fast at 24 × 256², 1.06 and 1.02 at 768², no gain
at 512². 64 rows gain 3 % more at 256² and lose 12 % at 512² on two cores."""

CACHE = 1 << 20
"""Bytes of one operand that a core's cache holds beside its others, so that a batch is better taken in parts: 64 × 128² by `msign` are
1.40 times as fast on one core so, and 1.05 on two."""


@cache
def _triton() -> ModuleType | None:
    """The Triton kernels, or None where Triton is missing or has nothing to run on."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from compiler import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def runs_triton(*tensors: Tensor) -> ModuleType | None:
    """The Triton kernels if they can take these tensors."""
    here = all(T.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" for T in tensors)
    return _triton() if here and all(T.dtype in DTYPES for T in tensors) else None


def holds(flags: Tensor) -> bool:
    """Whether all flags are known to be set: the host looks at those on a CPU, as nothing waits there, and at none while compiling."""
    return flags.device.type == "cpu" and not torch.compiler.is_compiling() and bool(flags.all())


def cached(A: Tensor) -> int:
    """How many of the matrices A (B, m, n), m ≤ n, are best taken at once, for products of size m × m."""
    if A.device.type != "cpu" or torch.compiler.is_compiling():
        return max(len(A), 1)
    return max(1, torch.get_num_threads() * CACHE // (A.size(1) ** 2 * A.itemsize))


def in_place(A: Tensor) -> bool:
    """Whether `symmetric` of such operands may write its result over D."""
    return runs_triton(A) is None and not _whole(A)


def _whole(A: Tensor) -> bool:
    """Whether torch computes the product at once, not strips of the triangle."""
    return A.is_cuda or A.size(1) <= STRIP


def symmetric(
    A: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    C: Tensor | None = None,
    beta: float | Tensor = 1.0,
    D: Tensor | None = None,
    delta: float | Tensor = 1.0,
    gamma: float | Tensor = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """α·A·Aᵀ + β·C + δ·D + γ·I, of which half is computed, and mirrored.

    Args:
        A: shape (batch, m, k), any strides.
        alpha: of A·Aᵀ; like the others a number, or a tensor of shape (batch,) on the device.
        C: shape (batch, m, m), symmetric.
        beta: of C.
        D: like C.
        delta: of D.
        gamma: of I.
        out: shape (batch, m, m), rows of stride 1, of A's dtype; neither A nor C, and D only where `in_place`. Made if not given.

    Returns:
        out. Products are summed in fp32 (fp64 for fp64), the rest added in fp32, and rounded once in fp16 and on CUDA.
    """
    out = A.new_empty(*A.shape[:2], A.size(1)) if out is None else out
    kernels = runs_triton(A)
    if kernels is not None:
        C, D = (None if T is None else T if T.stride(2) == 1 else T.contiguous() for T in (C, D))
        scalars: list[float | Tensor] = [x.float() if isinstance(x, Tensor) else float(x) for x in (alpha, beta, delta, gamma)]
        return kernels.symmetric(A, scalars, C, D, out)
    m, whole = A.size(1), _whole(A)
    for start in range(0, m, m if whole else STRIP):
        stop = m if whole else min(start + STRIP, m)
        C_strip, into = None if C is None else C[:, start:stop, :stop], out if whole and A.dtype != torch.float16 else None
        strip = _product(A[:, start:stop], A[:, :stop].mT, alpha, C_strip, beta, into)
        if D is not None:
            _add(strip, D[:, start:stop, :stop], delta)
        if isinstance(gamma, Tensor) or gamma != 0:
            strip[:, :, start:].diagonal(dim1=1, dim2=2).add_(gamma[:, None] if isinstance(gamma, Tensor) else gamma)
        if strip is not into:
            out[:, start:stop, :stop] = strip
        out[:, :start, start:stop] = out[:, start:stop, :start].mT
    return out


def _product(A: Tensor, B: Tensor, alpha: float | Tensor, C: Tensor | None, beta: float | Tensor, out: Tensor | None) -> Tensor:
    """α·A·B + β·C in torch, a new tensor if `out` is not given; fp32 for fp16, as α·A·B may be in range where A·B is not."""
    if not isinstance(alpha, Tensor) and not isinstance(beta, Tensor) and A.dtype != torch.float16:
        if C is None:
            return torch.baddbmm(A.new_empty(()), A, B, alpha=alpha, beta=0, out=out)
        return torch.baddbmm(C, A, B, alpha=alpha, beta=beta, out=out)
    out = product(A, B) if A.dtype == torch.float16 else torch.bmm(A, B, out=out)
    out.mul_(_each(alpha))
    if C is not None:
        _add(out, C, beta)
    return out


def _add(out: Tensor, C: Tensor, factor: float | Tensor) -> None:
    """Add factor·C."""
    out.addcmul_(C, _each(factor).to(C.dtype)) if isinstance(factor, Tensor) else out.add_(C, alpha=factor)


def product(A: Tensor, B: Tensor) -> Tensor:
    """A·B in fp32."""
    return torch.bmm(A, B, out_dtype=torch.float32) if A.is_cuda and A.dtype != torch.float32 else A.float() @ B.float()


def _each(factor: Any) -> Any:
    return factor[:, None, None] if isinstance(factor, Tensor) else factor


def advance_(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor] | None,
    out: Tensor,
    *,
    momentum: float | Tensor,
    nesterov: bool,
    exponent: Tensor,
    finite: Tensor,
) -> tuple[Tensor, Tensor]:
    """B ← μ·B + (1 - μ)·G, and Φ, which is B or with Nesterov μ·B + (1 - μ)·G, into a batch of wide matrices.

    Args:
        grads: W matrices (r, c) of one shape, dtype and strides: weights, copies or blocks of weights. Read only.
        buffers: B of each, likewise; None: Φ = G.
        out: shape (W, min(r, c), max(r, c)), contiguous. Gets Φ·2^-exponent, transposed if r > c; zeros where not finite.
        momentum: μ, a number or a 0-d tensor on the device.
        nesterov: which Φ.
        exponent: shape (W,), int32. With 2^exponent ≥ max(|G|, |B|) no entry of out exceeds 1, as Φ is a mean of the two.
        finite: shape (W,), bool. Where False, B stays as it is.

    Returns:
        Σ out² of each matrix, from its entries as rounded; and the largest |B|, or |G| without buffers, of each. Both (W,), fp32.
    """
    kernels = runs_triton(out, *grads)
    if kernels is not None:
        half = exponent // 2
        factors = torch.stack([torch.exp2(-half.float()), torch.exp2((half - exponent).float())], 1)
        mu = momentum.float() if isinstance(momentum, Tensor) else _filled(float(momentum), out.device)
        pointers = None if buffers is None else _addresses(buffers)
        kept = None if buffers is None else buffers[0]
        return kernels.advance_(_addresses(grads), pointers, grads[0], kept, out, factors, finite, mu.reshape(1), nesterov)
    largest: list[Tensor] = []
    for i, G in enumerate(grads):
        Phi = B = G.where(finite[i], 0)
        if buffers is not None:
            G = G.to(buffers[i].dtype)
            B = torch.lerp(buffers[i], G, 1 - momentum)
            Phi = G.lerp(B, momentum) if nesterov else B
            B = buffers[i].copy_(B.where(finite[i], buffers[i]))
        Phi = Phi.where(finite[i], 0).to(torch.promote_types(Phi.dtype, torch.float32))
        half = exponent[i] // 2
        Phi = Phi.ldexp(-half).ldexp(half - exponent[i])
        out[i].copy_(Phi.T if G.size(0) > G.size(1) else Phi)
        largest.append(B.abs().amax())
    return out.float().square().sum((1, 2)), torch.stack(largest).float()


def apply_(
    weights: Sequence[Tensor],
    U: Tensor,
    *,
    scale: float | Tensor,
    decay: float | Tensor,
    finite: Tensor,
    lows: Sequence[Tensor] | None = None,
) -> None:
    """W ← decay·W - scale·U, rounded once; where not finite, W stays as it is.

    Args:
        weights: W matrices (r, c) of one shape, dtype and strides.
        U: shape (W, min(r, c), max(r, c)), contiguous, read transposed if r > c.
        scale: a number or a tensor, 0-d or of shape (W,).
        decay: likewise.
        finite: shape (W,), bool.
        lows: the bits that bf16 weights lack (`compiler.bits`), each like its weight; None where none are kept.
    """
    scale, decay = (_per_matrix(x, U) for x in (scale, decay))
    kernels = runs_triton(U, *weights)
    if kernels is not None:
        kernels.apply_(_addresses(weights), None if lows is None else _addresses(lows), weights[0], U, scale, decay, finite)
        return
    for i, W in enumerate(weights):
        u, low = U[i].T if W.size(0) > W.size(1) else U[i], None if lows is None else lows[i]
        _write(W, low, _read(W, low).to(scale.dtype) * decay[i] - u.to(scale.dtype) * scale[i], finite[i])


def _read(W: Tensor, low: Tensor | None) -> Tensor:
    return W.to(torch.promote_types(W.dtype, torch.float32)) if low is None else join(W, low)


def _write(W: Tensor, low: Tensor | None, new: Tensor, finite: Tensor) -> None:
    high, rest = (new.to(W.dtype), None) if low is None else split(new)
    W.copy_(torch.where(finite, high, W))
    if low is not None and rest is not None:
        low.copy_(torch.where(finite, rest, low))


def adam_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    rate: Tensor,
    decay: Tensor,
    root: Tensor,
    finite: Tensor,
    lows: Sequence[Tensor] | None = None,
) -> None:
    """Take Adam's step: m ← β₁·m + (1 - β₁)·G, v ← β₂·v + (1 - β₂)·G², W ← decay·W - rate·m / (√v / root + ε), each rounded once.

    Args:
        weights: W of T tensors of any shapes, one dtype, each dense in memory.
        grads: G of each, laid out like it; read only.
        means: m, likewise, of one dtype.
        squares: v, likewise, of the dtype of m.
        betas: β₁ and β₂.
        eps: ε.
        rate: shape (T,), fp32; lr / (1 - β₁ᵗ).
        decay: likewise; 1 - lr·decay.
        root: likewise; √(1 - β₂ᵗ).
        finite: shape (T,), bool. Where False, all stays as it is.
        lows: as in `apply_`.
    """
    kernels = runs_triton(*weights)
    if kernels is not None:
        device, sizes = weights[0].device, tuple(W.numel() for W in weights)
        tables = [table(tuple(T.data_ptr() for T in tensors), device) for tensors in (weights, lows or weights, grads, means, squares)]
        work, factors = _work(sizes, kernels.BLOCK, device), [x.float().contiguous() for x in (rate, decay, root)]
        dtypes = weights[0].dtype, means[0].dtype, lows is not None
        kernels.adam_(work, dtypes, tables, table(sizes, device), factors, finite, betas, eps)
        return
    for i, (W, G, m, v) in enumerate(zip(weights, grads, means, squares, strict=True)):
        g = G.where(finite[i], 0).float()
        new_m, new_v = m.float().lerp(g, 1 - betas[0]).to(m.dtype), (v.float() * betas[1]).addcmul(g, g, value=1 - betas[1]).to(v.dtype)
        low = None if lows is None else lows[i]
        _write(W, low, decay[i] * _read(W, low) - rate[i] * new_m.float() / (new_v.float().sqrt() / root[i] + eps), finite[i])
        for old, after in ((m, new_m), (v, new_v)):
            old.copy_(torch.where(finite[i], after, old))


@lru_cache(maxsize=64)
def _work(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """(tensor, block of it) for every block of every tensor."""
    counts = torch.tensor([-(-size // block) for size in sizes], device="cpu")
    tensor = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    nth = torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts)[tensor]
    work = torch.stack([tensor, nth], 1).to(torch.int32)
    return work.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else work


def _per_matrix(x: float | Tensor, like: Tensor) -> Tensor:
    """A factor for each matrix, in fp32, or fp64 with matrices in fp64."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    x = x.to(dtype) if isinstance(x, Tensor) else _filled(float(x), like.device).to(dtype)
    return x.expand(len(like)).contiguous()


def table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers that the host knows (addresses, places) as int64 on the device, made once: a CUDA graph may not copy them there."""
    return torch.tensor(numbers, device=device) if torch.compiler.is_compiling() else _table(numbers, device)


@lru_cache(maxsize=4096)
def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    made = torch.tensor(numbers, dtype=torch.int64, device="cpu")  # whatever the default device is
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)  # a copy nobody waits for


def _addresses(matrices: Sequence[Tensor]) -> Tensor:
    first = matrices[0]
    if any((T.shape, T.dtype, T.stride()) != (first.shape, first.dtype, first.stride()) for T in matrices):
        raise BadOption("matrices", [tuple(T.shape) for T in matrices], "of one shape, dtype and strides, as one launch takes them")
    return table(tuple(T.data_ptr() for T in matrices), first.device)


def _filled(value: float, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=torch.float32, device=device)
