"""The optimizer over ranks: which weights need the others, who maps which matrix, and one step of it.

Weight and momentum stay as they are sharded. Matrices that one rank holds whole are mapped there; the others travel to an owner and
their updates back (`compiler.exchange`), or, for SN, are normalised without travelling (`compiler.scattered`). Everything is
laid out once from global shapes, the same on all ranks without talking, so that no rank waits for a message that is not sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from compiler.blocks import plain
from compiler.exchange import Exchange, Traffic, Wire
from compiler.gradients import Ready
from compiler.maps import chunks, empty_basis, mapped, peak
from compiler.pieces import Piece, directions, keep_, subtract_
from compiler.scattered import Scattered, normalize_over_ranks
from compiler.shards import UNASSIGNED, Run, Sharding, Unit, assign, local, sharding_of, units_of

__all__ = ["TRAVEL", "Owned", "Plan", "Weight"]

TRAVEL = ("auto", "half", "full")
"""How Φ and U travel: in fp16 scaled by powers of two, in working precision, or in what msign works in (fp16 on CUDA, else full)."""


@dataclass
class Weight:
    """A weight of the optimizer: its position among all, its name, its group, the blocks' options."""

    position: int
    name: str
    W: Tensor
    group: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """What a plan depends on."""
        return tuple(self.group[name] for name in ("blocks", "map", "strict", "travel", "workspace"))

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The options of each block; one that is all of the weight where the group has none."""
        return self.group["blocks"] or [{}]

    def options(self, block: int) -> dict[str, Any]:
        """The options of one block."""
        return {**self.group, **self.blocks[block]}


@dataclass
class Owned:
    """Whole matrices Φ (copies, out, in) that this rank maps: number `at` of an exchange. See `compiler.maps.Mappable`."""

    at: int
    stack: Tensor
    o: dict[str, Any]
    vectors: Tensor | None = None
    warm: bool = False
    good: Tensor | None = None
    key: tuple[Any, ...] = ()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(copies, out, in)."""
        copies, out, into = self.stack.shape
        return copies, out, into

    @property
    def working(self) -> torch.dtype:
        """The dtype to map in."""
        return self.stack.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.stack.device


class Plan:
    """Who maps what, and what travels, for the weights that need other ranks.

    Args:
        weights: all of the optimizer's, in the same order on all ranks.
        shared: the group that shares the work on replicated weights.

    Raises:
        NotShardable: for a way of lying over ranks that is not supported.
    """

    def __init__(self, weights: list[Weight], shared: ProcessGroup | None) -> None:
        self.weights = weights
        self._keys = [weight.key for weight in weights]
        self.runs: dict[tuple[int, int], list[tuple[int | None, Run, Unit]]] = {}
        self.exchanges: list[tuple[Exchange, list[int]]] = []
        self.scattered: list[tuple[ProcessGroup, list[int]]] = []
        self.units: list[Unit] = []
        self.sizes: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.stacked: set[tuple[int, int]] = set()
        travelling: dict[str, list[Unit]] = {}
        scattered: dict[str, list[Unit]] = {}
        groups: dict[str, Sharding] = {}
        for weight in weights:
            sharding = self._sharding(weight, shared)
            if sharding is None:
                continue
            groups[sharding.group.group_name] = sharding
            for number in range(len(weight.blocks)):
                self._block(weight, number, sharding, travelling, scattered)
        for name, units in travelling.items():
            self._exchange(groups[name], units)
        for name, units in scattered.items():
            ids = [self._number(unit, groups[name]) for unit in units]
            self.scattered.append((groups[name].group, ids))

    def fits(self, weights: list[Weight]) -> bool:
        """Whether the plan was made for these very weights, blocks and maps."""
        return [weight.key for weight in weights] == self._keys and all(a.W is b.W for a, b in zip(weights, self.weights, strict=True))

    @property
    def bytes(self) -> int:
        """What this rank sends per step in all-to-alls, if every weight has a gradient."""
        return sum(exchange.bytes for exchange, _ in self.exchanges)

    def _sharding(self, weight: Weight, shared: ProcessGroup | None) -> Sharding | None:
        """None for weights whose entries are updated one by one, all alike."""
        if weight.group["blocks"] is None and weight.group["map"] is None:
            return None
        return sharding_of(weight.name, weight.W, shared)

    def _block(
        self, weight: Weight, number: int, sharding: Sharding, travelling: dict[str, list[Unit]], scattered: dict[str, list[Unit]]
    ) -> None:
        """Sort the units of one block by what becomes of them."""
        o = weight.options(number)
        axes = o.get("axes") or plain(weight.W.shape)
        name, key = sharding.group.group_name, (weight.position, number)
        alone = o["map"] is None or (sharding.axis is None and o["map"] == "sn")
        by_sums = o["map"] == "sn" and not o["strict"] and not alone
        stacked = by_sums and [f[1] for f in axes[sharding.axis or 0]] == ["copy"]
        units = units_of(weight.position, number, axes, weight.W.shape, sharding, whole=alone or (by_sums and not stacked))
        stacked = stacked and sum(unit.sizes[0] for unit in units) == weight.W.size(sharding.axis)
        self.runs.setdefault(key, [])
        self.sizes[key] = units[0].sizes
        if stacked:
            self.stacked.add(key)
        elif by_sums:
            [whole] = units_of(weight.position, number, axes, weight.W.shape, sharding, whole=True)
            self.sizes[key] = whole.sizes
            scattered.setdefault(name, []).append(whole)
            return
        for unit in units:
            held = unit.runs[sharding.rank]
            if alone:
                self.runs[key].extend((None, run, unit) for run in held)
            elif unit.owner != UNASSIGNED and not unit.replicated:
                self.runs[key].extend((None, run, unit) for run in held)
                travelling.setdefault(name, []).append(unit)  # for the balance; nothing of it travels
            else:
                travelling.setdefault(name, []).append(unit)

    def _exchange(self, sharding: Sharding, units: list[Unit]) -> None:
        """Owners for all units of a group; as many exchanges as the workspace wants, by what each brings to a rank on average."""
        ranks = len(sharding.bounds)
        assigned = assign(units, ranks)
        moving = [unit for unit, before in zip(assigned, units, strict=True) if before.owner == UNASSIGNED or before.replicated]
        buckets: list[list[Unit]] = [[]]
        used = 0
        for unit in moving:
            size = peak(self._options(unit)) * self._wire(unit).working.itemsize * unit.numel // ranks
            if buckets[-1] and used + size > self._options(unit)["workspace"]:
                buckets.append([])
                used = 0
            buckets[-1].append(unit)
            used += size
        for bucket in buckets:
            if bucket:
                wires = [self._wire(unit) for unit in bucket]
                device = local(self.weights[bucket[0].weight].W).device
                ids = [self._number(unit, sharding) for unit in bucket]
                self.exchanges.append((Exchange(bucket, wires, sharding.group, sharding.rank, device), ids))

    def _number(self, unit: Unit, sharding: Sharding) -> int:
        """Enter a unit whose pieces are not updated here alone."""
        self.units.append(unit)
        number = len(self.units) - 1
        self.runs[unit.weight, unit.block].extend((number, run, unit) for run in unit.runs[sharding.rank])
        return number

    def _wire(self, unit: Unit) -> Wire:
        W = local(self.weights[unit.weight].W)
        working = torch.promote_types(W.dtype, torch.float32)
        travel = self.weights[unit.weight].options(unit.block)["travel"]
        return Wire(working, travel == "half" or (travel == "auto" and W.is_cuda and working == torch.float32))

    def update_(self, pieces: dict[int, list[Piece]], ready: dict[int, Ready], traffic: Traffic) -> None:
        """Update the pieces that belong to units: gather, map, spread, write.

        Args:
            pieces: unit -> its pieces here, in the order of its runs.
            ready: position -> the weights that are updated in this step, the same on all ranks.
            traffic: counted up.
        """
        active = {position: entry for position, entry in ready.items() if not entry.idle}
        for group, ids in self.scattered:
            self._normalize([i for i in ids if self.units[i].weight in active], pieces, active, group, traffic)
        for exchange, ids in self.exchanges:
            moving = {at: i for at, i in enumerate(ids) if self.units[i].weight in active}
            if not moving:
                continue
            stacks = exchange.gather({at: directions(pieces.get(i, [])) for at, i in moving.items()}, traffic)
            owned = [Owned(at, stack, self._options(self.units[ids[at]])) for at, stack in stacks.items()]
            mine = {own.at: U for chunk in chunks(owned) for own, U in zip(chunk, mapped(chunk, [o.stack for o in chunk]), strict=True)}
            updates = exchange.spread(mine, traffic)
            for at, i in moving.items():
                subtract_(pieces.get(i, []), updates.get(at, []))

    def _options(self, unit: Unit) -> dict[str, Any]:
        return self.weights[unit.weight].options(unit.block)

    def _normalize(
        self, ids: list[int], pieces: dict[int, list[Piece]], active: dict[int, Ready], group: ProcessGroup, traffic: Traffic
    ) -> None:
        stacks, entries = [], [active[self.units[i].weight] for i in ids]
        for i, entry in zip(ids, entries, strict=True):
            unit, held, W = self.units[i], pieces.get(i, []), local(entry.W)
            boxes = [(piece.run, X) for piece, X in zip(held, directions(held), strict=True) if piece.run is not None]
            start = entry.state[f"basis{unit.block}"] if entry.warm else None
            stacks.append(Scattered(unit, boxes, start, torch.promote_types(W.dtype, torch.float32), W.device))
        if not stacks:
            return
        normalize_over_ranks(stacks, group, traffic)
        for i, entry, stack in zip(ids, entries, stacks, strict=True):
            keep_(entry.state[f"basis{self.units[i].block}"], stack.basis, entry.good)
            subtract_(pieces.get(i, []), list(stack.updates()))

    def empty_basis(self, weight: int, block: int) -> Tensor:
        """SN's vectors of a block, before it has any: sharded like a stack of matrices of which each rank has its own, else whole."""
        W, sizes = self.weights[weight].W, self.sizes[weight, block]
        if (weight, block) not in self.stacked or not isinstance(W, DTensor):
            return empty_basis(local(W), sizes)
        axis = next(p.dim for p in W.placements if isinstance(p, Shard))
        own = empty_basis(local(W), (local(W).size(axis), *sizes[1:]))
        whole = torch.empty(W.size(axis), *own.shape[1:], device="meta")
        lie = [Shard(0) if isinstance(p, Shard) else p for p in W.placements]
        return DTensor.from_local(own, W.device_mesh, lie, run_check=False, shape=whole.shape, stride=whole.stride())
