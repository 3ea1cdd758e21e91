"""SN of matrices that no rank holds whole: their largest singular value by sums of products, never by gathering."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from compiler.exchange import Traffic
from compiler.msign import ldexp
from compiler.norms import Reduction, ritz_steps, start_of
from compiler.shards import Run, Unit

__all__ = ["Scattered", "normalize_over_ranks"]


@dataclass
class Scattered:
    """A stack of matrices A = Φ of which this rank holds some boxes; it is scaled in place."""

    unit: Unit
    boxes: list[tuple[Run, Tensor]]
    start: Tensor | None
    working: torch.dtype
    device: torch.device
    sigma: Tensor = field(init=False)
    basis: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.tall = self.unit.sizes[1] > self.unit.sizes[2]
        self.boxes = [(run, X.to(self.working)) for run, X in self.boxes]

    def largest(self) -> Tensor:
        """Per matrix the largest entry here, (copies,)."""
        out = torch.zeros(self.unit.sizes[0], dtype=self.working, device=self.device)
        for run, X in self.boxes:
            copies = self._indices(run, "copy")
            out[copies] = torch.maximum(out[copies], X.reshape(run.copies, -1).abs().amax(1))
        return out

    def scale_(self, exponent: Tensor) -> None:
        """Multiply by 2^-exponent, (copies,)."""
        self.boxes = [
            (run, ldexp(X.reshape(run.copies, -1), -exponent[self._indices(run, "copy"), None]).view(X.shape)) for run, X in self.boxes
        ]

    def times(self, Q: Tensor, *, transposed: bool) -> Tensor:
        """This rank's share of Aᵀ·Q or A·Q, A being the wide one of A and Aᵀ: (copies, n, k) from (copies, m, k) or back."""
        copies, *sides = self.unit.sizes
        short, long = min(sides), max(sides)
        out = torch.zeros(copies, long if transposed else short, Q.size(-1), dtype=Q.dtype, device=Q.device)
        for run, X in self.boxes:
            c, rows, columns = (self._indices(run, part) for part in ("copy", "out", "in"))
            A = X.reshape(len(c), len(rows), len(columns))
            if self.tall != transposed:
                A, rows, columns = A.mT, columns, rows
            # A (c, rows, columns) takes what is indexed by columns to rows
            out.index_put_((c[:, None], rows), A @ Q[c[:, None], columns], accumulate=True)
        return out

    def ritz(self) -> Reduction:
        """`compiler.norms.ritz` in steps, with sums over ranks left to the caller; sets sigma and basis."""
        m = min(self.unit.sizes[1:])
        like = torch.empty(self.unit.sizes[0], m, 0, dtype=self.working, device=self.device)
        block = start_of(like, self.start)
        self.sigma, self.basis = yield from ritz_steps(
            lambda Q: self.times(Q, transposed=True), lambda Q: self.times(Q, transposed=False), block, cold=self.start is None
        )

    def updates(self) -> Iterator[Tensor]:
        """A / σ₁ on each box."""
        for run, X in self.boxes:
            sigma = self.sigma[self._indices(run, "copy"), None]
            yield (X.reshape(run.copies, -1) / sigma.where(sigma > 0, 1)).view(X.shape)

    def _indices(self, run: Run, part: str) -> Tensor:
        """Which copies, rows or columns of the unit a box has, in its own order."""
        parts = ("in", "lookup") if part == "in" else (part,)
        index = torch.zeros(1, dtype=torch.long, device=self.device)
        for of, extent, begin, length in zip(self.unit.parts, self.unit.extents, run.begins, run.extents, strict=True):
            if of in parts:
                index = (index[:, None] * extent + torch.arange(begin, begin + length, device=self.device)).flatten()
        return index


def normalize_over_ranks(stacks: list[Scattered], group: ProcessGroup, traffic: Traffic) -> None:
    """The largest Ritz value of all matrices of all stacks, by all-reduces of blocks of n × 16 and m × 16; nothing else travels."""
    largest = [stack.largest() for stack in stacks]
    flat = _reduced(largest, dist.ReduceOp.MAX, group, traffic)
    for stack, size in zip(stacks, flat, strict=True):
        stack.scale_(torch.frexp(size.where(size.isfinite(), 1)).exponent)
    waiting: dict[int, tuple[Generator[Tensor, Tensor, None], Tensor]] = {}
    for i, stack in enumerate(stacks):
        steps = stack.ritz()
        waiting[i] = steps, next(steps)
    while waiting:
        sums = _reduced([partial for _, partial in waiting.values()], dist.ReduceOp.SUM, group, traffic)
        for (i, (steps, _)), total in zip(list(waiting.items()), sums, strict=True):
            try:
                waiting[i] = steps, steps.send(total)
            except StopIteration:
                del waiting[i]


def _reduced(parts: list[Tensor], op: dist.ReduceOp.RedOpType, group: ProcessGroup, traffic: Traffic) -> list[Tensor]:
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, op, group=group)
    traffic.reduced += flat.numel() * flat.element_size()
    return [piece.view(part.shape).to(part.dtype) for piece, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)]
