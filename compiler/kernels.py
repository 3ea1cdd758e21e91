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

from compiler.errors import BadOption

__all__ = ["advance_", "apply_", "runs_triton", "symmetric"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

SPLIT, PANEL = 384, 128
"""On a CPU, from SPLIT rows on, the triangle is computed by strips of PANEL rows. Measured on one core of an EPYC with AVX-512, against
the whole product: 1.40 (512 rows), 1.51 (768), 1.57 times (1024) as fast in fp32, 1.14, 1.33 and 1.30 times in bf16; at 256 no gain."""


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
        out: shape (batch, m, m), rows of stride 1, of A's dtype; none of the operands. Made if not given.

    Returns:
        out. Products are summed in fp32 (fp64 for fp64), the rest added in fp32, and rounded once on CUDA.
    """
    out = A.new_empty(*A.shape[:2], A.size(1)) if out is None else out
    kernels = runs_triton(A)
    if kernels is not None:
        C, D = (None if T is None else T if T.stride(2) == 1 else T.contiguous() for T in (C, D))
        scalars: list[float | Tensor] = [x.float() if isinstance(x, Tensor) else float(x) for x in (alpha, beta, delta, gamma)]
        return kernels.symmetric(A, scalars, C, D, out)
    _symmetric(A, alpha, C, beta, out)
    if D is not None:
        out.addcmul_(D, _each(delta).to(D.dtype)) if isinstance(delta, Tensor) else out.add_(D, alpha=delta)
    if isinstance(gamma, Tensor) or gamma != 0:
        out.diagonal(dim1=1, dim2=2).add_(gamma[:, None] if isinstance(gamma, Tensor) else gamma)
    return out


def _symmetric(A: Tensor, alpha: float | Tensor, C: Tensor | None, beta: float | Tensor, out: Tensor) -> None:
    """α·A·Aᵀ + β·C in torch."""
    if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
        _symmetric(A, 1.0, None, 0.0, out)
        out.mul_(_each(alpha))
        if C is not None:
            out.addcmul_(C, _each(beta).to(C.dtype)) if isinstance(beta, Tensor) else out.add_(C, alpha=beta)
        return
    C, beta = (out, 0.0) if C is None else (C, beta)
    if A.is_cuda or A.size(1) < SPLIT:
        torch.baddbmm(C, A, A.mT, alpha=alpha, beta=beta, out=out)
        return
    for a, b, c, o in zip(A, A.mT, C, out, strict=True):
        for start in range(0, len(a), PANEL):
            stop = min(start + PANEL, len(a))
            torch.addmm(c[start:stop, :stop], a[start:stop], b[:, :stop], alpha=alpha, beta=beta, out=o[start:stop, :stop])
            o[:start, start:stop] = o[start:stop, :start].T


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
        buffers: B of each; None: Φ = G.
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
            B = torch.lerp(buffers[i], G, 1 - momentum)
            Phi = G.lerp(B, momentum) if nesterov else B
            B = buffers[i].copy_(B.where(finite[i], buffers[i]))
        Phi = Phi.where(finite[i], 0).to(torch.promote_types(Phi.dtype, torch.float32))
        half = exponent[i] // 2
        Phi = Phi.ldexp(-half).ldexp(half - exponent[i])
        out[i].copy_(Phi.T if G.size(0) > G.size(1) else Phi)
        largest.append(B.abs().amax())
    return out.float().square().sum((1, 2)), torch.stack(largest).float()


def apply_(weights: Sequence[Tensor], U: Tensor, *, scale: float | Tensor, decay: float | Tensor, finite: Tensor) -> None:
    """W ← decay·W - scale·U, rounded once; where not finite, W stays as it is.

    Args:
        weights: W matrices (r, c) of one shape, dtype and strides.
        U: shape (W, min(r, c), max(r, c)), contiguous, read transposed if r > c.
        scale: a number or a tensor, 0-d or of shape (W,).
        decay: likewise.
        finite: shape (W,), bool.
    """
    scale, decay = (_per_matrix(x, U) for x in (scale, decay))
    kernels = runs_triton(U, *weights)
    if kernels is not None:
        kernels.apply_(_addresses(weights), weights[0], U, scale, decay, finite)
        return
    for i, W in enumerate(weights):
        u = U[i].T if W.size(0) > W.size(1) else U[i]
        new = W.to(scale.dtype) * decay[i] - u.to(scale.dtype) * scale[i]
        W.copy_(torch.where(finite[i], new.to(W.dtype), W))


def _per_matrix(x: float | Tensor, like: Tensor) -> Tensor:
    """A factor for each matrix, in fp32, or fp64 with matrices in fp64."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    x = x.to(dtype) if isinstance(x, Tensor) else _filled(float(x), like.device).to(dtype)
    return x.expand(len(like)).contiguous()


@lru_cache(maxsize=4096)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    table = torch.tensor(addresses, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table  # a copy nobody waits for


def _addresses(matrices: Sequence[Tensor]) -> Tensor:
    """The addresses as a tensor on the device, made once: a CUDA graph may not copy it there."""
    first = matrices[0]
    if any((T.shape, T.dtype, T.stride()) != (first.shape, first.dtype, first.stride()) for T in matrices):
        raise BadOption("matrices", [tuple(T.shape) for T in matrices], "of one shape, dtype and strides, as one launch takes them")
    return _table(tuple(T.data_ptr() for T in matrices), first.device)


def _filled(value: float, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=torch.float32, device=device)
