"""One all-to-all of base updates Φ to the owners of the matrices and one of updates U back, each one packed message per pair of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from compiler.blocks import matrices
from compiler.msign import ldexp
from compiler.shards import Run, Unit

__all__ = ["Exchange", "Traffic", "Wire"]

ALIGN = 8
"""Bytes to which parts of a message are aligned, so that any dtype can be read out of it."""


@dataclass
class Traffic:
    """Bytes this rank has sent to others (`exchanged`, in all-to-alls) and put into all-reduces (`reduced`)."""

    exchanged: int = 0
    reduced: int = 0


class Wire(NamedTuple):
    """How the entries of a unit travel: in `working` precision, or as fp16 with one exponent per matrix and part of it."""

    working: torch.dtype
    half: bool

    def size(self, run: Run) -> int:
        """The bytes a part takes."""
        if not self.half:
            return _aligned(run.numel * self.working.itemsize)
        return _aligned(2 * run.copies) + _aligned(2 * run.numel)

    def write(self, message: Tensor, X: Tensor, run: Run) -> None:
        """Put a part, any shape, into its bytes."""
        if not self.half:
            message.view(self.working)[: run.numel].copy_(X.reshape(-1))
            return
        A = X.reshape(run.copies, -1).to(self.working)
        largest = A.abs().amax(1, keepdim=True)
        exponent = torch.frexp(largest.where(largest.isfinite(), 1)).exponent - 15  # the largest entry comes to [2^14, 2^15)
        message.view(torch.int16)[: run.copies].copy_(exponent[:, 0])
        message[_aligned(2 * run.copies) :].view(torch.float16)[: run.numel].copy_(ldexp(A, -exponent).reshape(-1))

    def read(self, message: Tensor, run: Run) -> Tensor:
        """The part, shaped run.extents."""
        if not self.half:
            return message.view(self.working)[: run.numel].view(run.extents)
        exponent = message.view(torch.int16)[: run.copies].to(torch.int32)[:, None]
        A = message[_aligned(2 * run.copies) :].view(torch.float16)[: run.numel].view(run.copies, -1)
        return ldexp(A.to(self.working), exponent).view(run.extents)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class Part(NamedTuple):
    """A run of units[unit] in a message, and the rank at the other end."""

    unit: int
    run: Run
    peer: int
    start: int
    stop: int


class Message:
    """What this rank sends to, or receives from, each of the others in one all-to-all."""

    def __init__(self, parts: Iterable[tuple[int, int, Run]], wires: list[Wire], ranks: int) -> None:
        self.splits = [0] * ranks
        self.parts: list[Part] = []
        start = 0
        for unit, peer, run in sorted(parts, key=lambda part: part[1]):  # stable: by peer, then in the order of the plan
            size = wires[unit].size(run)
            self.parts.append(Part(unit, run, peer, start, start + size))
            self.splits[peer] += size
            start += size
        self.size = start


class Exchange:
    """The units of a group of ranks that travel in one pair of all-to-alls.

    Args:
        units: with owners.
        wires: how each travels.
        group: the ranks.
        rank: this one.
        device: of the tensors.
    """

    def __init__(self, units: list[Unit], wires: list[Wire], group: ProcessGroup, rank: int, device: torch.device) -> None:
        self.units, self.wires, self.group, self.rank, self.device = units, wires, group, rank, device
        ranks = dist.get_world_size(group)
        home = [
            (i, r, run) for i, unit in enumerate(units) if unit.owner == rank for r in range(ranks) if r != rank for run in unit.runs[r]
        ]
        away = [(i, unit.owner, run) for i, unit in enumerate(units) if unit.owner != rank for run in unit.runs[rank]]

        def message(parts: list[tuple[int, int, Run]], *, of_all: bool) -> Message:
            return Message([part for part in parts if of_all or not units[part[0]].replicated], wires, ranks)

        self.to_owners, self.as_owner = message(away, of_all=False), message(home, of_all=False)
        self.from_owner, self.from_owners = message(home, of_all=True), message(away, of_all=True)

    @property
    def bytes(self) -> int:
        """What this rank sends per step."""
        return self.to_owners.size + self.from_owner.size

    def gather(self, directions: dict[int, list[Tensor]], traffic: Traffic) -> dict[int, Tensor]:
        """The stacks (copies, out, in) of Φ this rank owns.

        Args:
            directions: unit -> Φ on each of its runs here; a unit left out counts as zero.
            traffic: counted up.
        """
        sent = torch.zeros(self.to_owners.size, dtype=torch.uint8, device=self.device)
        place = dict.fromkeys(directions, 0)
        for part in self.to_owners.parts:
            if part.unit in directions:
                self.wires[part.unit].write(sent[part.start : part.stop], directions[part.unit][place[part.unit]], part.run)
                place[part.unit] += 1
        received = self._all_to_all(sent, self.to_owners, self.as_owner, traffic)
        stacks = {i: self._stack(i) for i, unit in enumerate(self.units) if unit.owner == self.rank and i in directions}
        for i, stack in stacks.items():
            for run, X in zip(self.units[i].runs[self.rank], directions[i], strict=True):
                run.place(stack).copy_(X)
        for part in self.as_owner.parts:
            if part.unit in stacks:
                part.run.place(stacks[part.unit]).copy_(self.wires[part.unit].read(received[part.start : part.stop], part.run))
        return {i: matrices(stack, self.units[i].sizes) for i, stack in stacks.items()}

    def spread(self, updates: dict[int, Tensor], traffic: Traffic) -> dict[int, list[Tensor]]:
        """Unit -> U on each of its runs here, from the stacks of U this rank owns."""
        sent = torch.zeros(self.from_owner.size, dtype=torch.uint8, device=self.device)
        for part in self.from_owner.parts:
            if part.unit in updates:
                U = updates[part.unit].reshape(self.units[part.unit].extents)
                self.wires[part.unit].write(sent[part.start : part.stop], part.run.place(U), part.run)
        received = self._all_to_all(sent, self.from_owner, self.from_owners, traffic)
        out = {i: self._own(i, U) for i, U in updates.items()}
        for part in self.from_owners.parts:
            out.setdefault(part.unit, []).append(self.wires[part.unit].read(received[part.start : part.stop], part.run))
        return out

    def _own(self, i: int, U: Tensor) -> list[Tensor]:
        """What the owner of a unit keeps; of a replicated one what the others get, to the bit, so that replicas stay the same."""
        unit, wire = self.units[i], self.wires[i]
        kept = [run.place(U.reshape(unit.extents)) for run in unit.runs[self.rank]]
        if not unit.replicated:
            return kept
        [run] = unit.runs[self.rank]
        message = torch.zeros(wire.size(run), dtype=torch.uint8, device=self.device)
        wire.write(message, kept[0], run)
        return [wire.read(message, run)]

    def _stack(self, i: int) -> Tensor:
        return torch.zeros(self.units[i].extents, dtype=self.wires[i].working, device=self.device)

    def _all_to_all(self, sent: Tensor, out: Message, into: Message, traffic: Traffic) -> Tensor:
        received = torch.empty(into.size, dtype=torch.uint8, device=self.device)
        dist.all_to_all_single(received, sent, into.splits, out.splits, group=self.group)
        traffic.exchanged += sent.numel()
        return received
