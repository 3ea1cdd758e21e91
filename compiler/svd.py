"""The SVD on a CPU, also of matrices on which LAPACK's gives up."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["svd"]


def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of A (..., m, n) on a CPU: with k = min(m, n) of shapes (..., m, k), (..., k) and (..., k, n).

    By LAPACK's divide and conquer. That has been seen to "fail to converge" on finite input; such matrices, and no others of the
    batch, go through `jacobi`. Under torch.compile the error is raised as it is.
    """
    if torch.compiler.is_compiling():
        return torch.linalg.svd(A, full_matrices=False)
    try:
        return torch.linalg.svd(A, full_matrices=False)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        if A.ndim == 2:
            if A.size(0) <= A.size(1):
                return jacobi(A)
            V, S, Uh = jacobi(A.mT)
            return Uh.mT, S, V.mT
        found = [svd(B) for B in A.reshape(-1, *A.shape[-2:])]  # one by one, as the error of a batch spoils all of it
        U, S, Vh = (torch.stack(parts).unflatten(0, A.shape[:-2]) for parts in zip(*found, strict=True))
        return U, S, Vh


def jacobi(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of one matrix (m, n), m ≤ n, by rotations of its rows until all are orthogonal (Hestenes 1958; m/2 pairs at a time).

    It needs no convergence of anything inside, and finds small singular values at least as well as LAPACK (Demmel & Veselić 1992), in
    about ten sweeps of m - 1 rounds: slow in torch, seconds for 512 rows. Rows of Vᵀ of σ = 0 are zero.
    """
    X, U = A.clone(), torch.eye(len(A), dtype=A.dtype, device=A.device)
    order = list(range(len(A) + len(A) % 2))
    for _ in range(SWEEPS):
        largest = 0.0
        for _ in order[1:]:
            pairs = [pair for pair in zip(order[: len(order) // 2], order[::-1]) if max(pair) < len(A)]  # noqa: B905
            order = [order[0], order[-1], *order[1:-1]]
            if not pairs:
                continue
            p, q = torch.tensor(pairs, device=A.device).T
            x, y = X[p], X[q]
            a, b, c = (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)
            size = (a * b).sqrt()
            largest = max(largest, (c.abs() / size.where(size > 0, 1)).where(size > 0, 0).amax().item())
            zeta = (b - a) / (2 * c).where(c != 0, 1)
            t = (torch.where(zeta < 0, -1.0, 1.0) / (zeta.abs() + (1 + zeta.square()).sqrt())).where(c != 0, 0)[:, None]
            cos = 1 / (1 + t * t).sqrt()
            sin = t * cos
            X[p], X[q] = cos * x - sin * y, sin * x + cos * y
            U[p], U[q] = cos * U[p] - sin * U[q], sin * U[p] + cos * U[q]
        if largest <= len(A) * torch.finfo(A.dtype).eps:
            break
    S, places = torch.linalg.vector_norm(X, dim=1).sort(descending=True, stable=True)
    return U[places].mT, S, X[places] / S.where(S > 0, 1)[:, None]


SWEEPS = 40
"""At most; quadratic convergence takes six to twelve."""
