"""Matrices with the singular values of real momenta, and their exact images under the maps, for bench_optimizer.py.

The momenta of training are very ill-conditioned: half of their singular values lie below a thousandth of the largest. Gaussian
matrices, the usual benchmark, hide what separates one msign from another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scaling.records import Record

SPECTRA: dict[str, list[float]] = {
    name: entry["log10"] for name, entry in json.loads((Path(__file__).parent / "spectra.json").read_text())["spectra"].items()
}
"""Weight@step -> log10(σ/σ₁) at ranks spaced evenly in the logarithm."""

NEAR_RANK_1 = [0.0, -3.0, -5.0]
"""A spectrum like those: σ₂ three orders below σ₁."""

TESTED: tuple[tuple[str, tuple[int, int]], ...] = (
    ("q@5", (512, 512)),
    ("k@89", (512, 512)),
    ("o@89", (512, 512)),
    ("up@89", (2048, 512)),
    ("dn@5", (512, 2048)),
    ("near rank 1", (512, 512)),
    ("Gaussian", (512, 512)),
    ("Gaussian", (512, 1024)),
)
"""What accuracy is measured on: momenta in the shapes they come from."""

TESTED_ON_CUDA = (*TESTED, ("dn@89", (2048, 8192)), ("Gaussian", (2048, 2048)))
"""There kernels change with the shape."""

SIZE = 0.01
"""σ₁ of every made gradient."""


def singular_values(knots: Sequence[float], count: int) -> Tensor:
    """σ/σ₁ of rank 1 to `count`, fp64, straight in the logarithm of σ and of the rank between the knots."""
    place = torch.arange(1, count + 1, dtype=torch.float64).log() / math.log(max(count, 2)) * (len(knots) - 1)
    left = place.floor().long().clamp(max=len(knots) - 2)
    at = torch.tensor(knots, dtype=torch.float64)
    return 10 ** torch.lerp(at[left], at[left + 1], place - left)


def matrix(name: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A matrix (out, in), fp32, with the spectrum of that name and random singular vectors; or a Gaussian one."""
    device = generator.device
    if name == "Gaussian":
        X = torch.randn(shape, generator=generator, device=device)
        return X * (SIZE / torch.linalg.matrix_norm(X, 2))
    rank = min(shape)
    U, V = (torch.linalg.qr(torch.randn(side, rank, generator=generator, device=device, dtype=torch.float64))[0] for side in shape)
    S = SIZE * singular_values(NEAR_RANK_1 if name == "near rank 1" else SPECTRA[name], rank).to(device)
    return (U * S @ V.mT).float()


def rotating(shapes: Sequence[tuple[int, int]], sets: int, dtype: torch.dtype, generator: torch.Generator) -> Iterator[list[Tensor]]:
    """Sets of gradients, one per shape. Singular vectors are made once per shape and spectrum; the rest are its signed permutations."""
    names = list(SPECTRA)
    made: dict[tuple[tuple[int, int], str], Tensor] = {}
    for number in range(sets):
        grads = []
        for index, shape in enumerate(shapes):
            key = (shape, names[(index + number) % 3 + 6])  # q, k and v after 89 steps: one decomposition is seconds for a large shape
            if key not in made:
                made[key] = matrix(key[1], shape, generator)
            rows, columns = (torch.randperm(side, generator=generator, device=generator.device) for side in shape)
            signs = torch.randint(2, (shape[1],), generator=generator, device=generator.device) * 2 - 1
            grads.append((made[key][rows][:, columns] * signs).to(dtype))
        yield grads


class Error(Record):
    """How far an update is from the exact image Y of Φ under its map.

    `relative` is ‖U - Y‖_F/‖Y‖_F, `cosine` the angle between them, `norm` is ‖U‖₂ over ‖Y‖₂. `descent`, for msign, is
    ⟨U, Φ⟩ / (‖U‖₂·‖Φ‖_*): the share of the steepest descent per unit spectral norm that U reaches, 1 for the polar factor alone.
    """

    relative: float
    cosine: float
    norm: float
    descent: float | None = None


class Exact(NamedTuple):
    """A matrix and its SVD in fp64."""

    X: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor

    @classmethod
    def of(cls, X: Tensor, device: torch.device) -> Exact:
        """Of X as it was rounded, by LAPACK, kept on `device`."""
        return cls(*(T.to(device) for T in (X.double(), *torch.linalg.svd(X.cpu().double(), full_matrices=False))))

    def image(self, kind: str, scale: float) -> Tensor:
        """Φ = scale·X under msign, sn or svc with λ = 1."""
        maps = {"msign": self.S.gt(0).double(), "sn": self.S / self.S[0], "svc": (scale * self.S).clamp(max=1)}
        return (self.U * maps[kind]) @ self.Vh

    def error(self, update: Tensor, kind: str, scale: float = 1.0) -> Error:
        """Of `update` as the map of scale·X."""
        U, Y = update.double(), self.image(kind, scale)
        norm = _spectral_norm(U)
        return Error(
            relative=float((U - Y).norm() / Y.norm()),
            cosine=float((U * Y).sum() / (U.norm() * Y.norm())),
            norm=norm / _spectral_norm(Y),
            descent=float((U * self.X).sum() / (norm * self.S.sum())) if kind == "msign" else None,
        )


def _spectral_norm(X: Tensor) -> float:
    R = X @ X.mT if X.size(0) < X.size(1) else X.mT @ X
    return math.sqrt(float(torch.linalg.eigvalsh(R)[-1]))
