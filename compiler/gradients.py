"""Which weights take part in a step: those with a gradient, on any rank, that is finite on all."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from compiler.errors import BadGradient
from compiler.kernels import table
from compiler.shards import local

__all__ = ["Ready", "groups_of", "over_any", "read", "refuse_sparse", "watched"]


@dataclass
class Ready:
    """A weight that may be updated in this step.

    Attributes:
        position: among all weights of the optimizer.
        number: of its group.
        name, W, group: its own.
        limit: the largest entry of a gradient that spoils no buffer.
        unread: whether the host may not ask what becomes of it in a step.
        flags: None where the host knows that the weight is updated; else a flag on the device of every weight there.
        sizes: the largest entries of their gradients, likewise.
        at: its place in these two.
        idle: whether only its state is made.
        state: of the optimizer.
        warm: whether SN may start from the vectors in it.
        step: how many steps it has taken, this one included, where that is counted.
    """

    position: int
    number: int
    name: str
    W: Tensor
    group: dict[str, Any]
    limit: float
    unread: bool
    flags: Tensor | None = None
    sizes: Tensor | None = None
    at: int = 0
    _good: Tensor | None = None
    idle: bool = False
    state: dict[str, Any] = field(default_factory=dict)
    warm: bool = False
    step: float | Tensor = 0.0

    @property
    def good(self) -> Tensor | None:
        """None where the host knows that the weight is updated; else a flag on the device."""
        if self._good is None and self.flags is not None:
            self._good = self.flags[self.at]
        return self._good

    @property
    def gradient(self) -> Tensor | None:
        """What this rank has of it."""
        return None if self.W.grad is None else local(self.W.grad)


def refuse_sparse(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse sparse gradients.

    Raises:
        BadGradient: with the names of their weights.
    """
    if sparse := [name for name, W in weights if W.grad is not None and W.grad.is_sparse]:
        raise BadGradient(sparse, "sparse", "use dense gradients: nn.Embedding(..., sparse=False)")


def read(entries: list[Ready]) -> Tensor:
    """Whether each weight has a gradient here, whether it is spoilt, and whether it is anything but zeros: (3, weights), on the CPU."""
    flags = []
    for entry in entries:
        G = entry.gradient
        if G is None or G.numel() == 0:
            flags.append((G is not None, False, False))
        else:
            low, high = (end.item() for end in G.aminmax())  # NaN if there is a NaN
            flags.append((True, not (-entry.limit <= low and high <= entry.limit), low != 0 or high != 0))
    return torch.tensor(flags, dtype=torch.bool, device="cpu").reshape(-1, 3).mT


def watched(entries: list[Ready]) -> Tensor:
    """The same for weights of one device, on that device; nothing is read by the host."""
    device = entries[0].W.device
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, entry in enumerate(entries):
        G = entry.gradient
        kind = (G.dtype, entry.limit) if G is not None and G.numel() > 0 else ()
        alike.setdefault(kind, []).append(i)
    sizes, spoilt, moves = [], [], []
    for kind, members in alike.items():
        norms = torch._foreach_norm([entries[i].gradient for i in members], ord=math.inf) if kind else ()  # pyright: ignore[reportArgumentType]
        size = torch.stack(list(norms)) if kind else torch.zeros(len(members), device=device)
        size = size.to(torch.promote_types(size.dtype, torch.float32))  # the limit of fp32 is Inf in bf16
        sizes.append(size.float())
        spoilt.append(~size.le(kind[1] if kind else 0))  # NaN is not within a limit
        moves.append(size != 0)
    order = [i for members in alike.values() for i in members]
    back = table(tuple(sorted(range(len(order)), key=order.__getitem__)), device)
    size = torch.cat(sizes).index_select(0, back)
    for i, entry in enumerate(entries):
        entry.sizes, entry.at = size, i
    present = table(tuple(int(entry.W.grad is not None) for entry in entries), device).bool()
    return torch.stack([present, *(torch.cat(flags).index_select(0, back) for flags in (spoilt, moves))])


def groups_of(W: Tensor, shared: ProcessGroup | None) -> tuple[ProcessGroup, ...]:
    """The groups over whose ranks a weight's gradient may differ."""
    if isinstance(W, DTensor):
        return tuple(W.device_mesh.get_group(dim) for dim in range(W.device_mesh.ndim) if W.device_mesh.size(dim) > 1)
    return () if shared is None else (shared,)


def over_any(entries: list[Ready], flags: Tensor, shared: ProcessGroup | None) -> Tensor:
    """Flags that are set on any rank that has a part or a copy of the weight."""
    together: dict[tuple[str, ...], list[int]] = {}
    for i, entry in enumerate(entries):
        together.setdefault(tuple(group.group_name for group in groups_of(entry.W, shared)), []).append(i)
    columns = list(flags.unbind(1))
    for members in together.values():
        agreed = torch.stack([columns[i] for i in members], 1).to(local(entries[members[0]].W).device, torch.uint8)
        for group in groups_of(entries[members[0]].W, shared):
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
        for i, column in zip(members, agreed.to(flags.device, torch.bool).unbind(1), strict=True):
            columns[i] = column
    return torch.stack(columns, 1)
