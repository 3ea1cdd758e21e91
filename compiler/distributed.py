"""The optimizer over ranks: which weights need the others, who maps which matrix, and one step of it.

Weight and momentum stay as they are sharded. Matrices that one rank holds whole are mapped there; the others travel to an owner and
their updates back (`compiler.exchange`), or, for SN, are normalised without travelling (`compiler.scattered`). Everything is
laid out once from global shapes, the same on all ranks without talking, so that no rank waits for a message that is not sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from compiler.blocks import plain
from compiler.exchange import Exchange, Traffic, Wire
from compiler.norms import VECTORS
from compiler.scattered import Scattered, normalize_over_ranks
from compiler.shards import UNASSIGNED, Run, Sharding, Unit, assign, local, sharding_of, units_of

__all__ = ["TRAVEL", "Owned", "Plan", "Slots", "Weight", "groups_of", "over_any"]

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
        return self.group["blocks"], self.group["map"], self.group["strict"], self.group["travel"]

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The options of each block; one that is all of the weight where the group has none."""
        return self.group["blocks"] or [{}]

    def options(self, block: int) -> dict[str, Any]:
        """The options of one block."""
        return {**self.group, **self.blocks[block]}


@dataclass
class Owned:
    """A stack of whole matrices Φ (copies, out, in) to map, with its options; duck-typed to a piece of a step."""

    stack: Tensor
    o: dict[str, Any]
    state: dict[str, Any] = field(default_factory=dict)
    basis: str = ""

    @property
    def sizes(self) -> tuple[int, ...]:
        """(copies, out, in)."""
        return tuple(self.stack.shape)


def groups_of(W: Tensor, shared: ProcessGroup | None) -> tuple[ProcessGroup, ...]:
    """The groups over whose ranks a weight's gradient may differ."""
    if isinstance(W, DTensor):
        return tuple(W.device_mesh.get_group(dim) for dim in range(W.device_mesh.ndim) if W.device_mesh.size(dim) > 1)
    return () if shared is None else (shared,)


def over_any(weights: list[Weight], present: list[bool], bad: list[bool], shared: ProcessGroup | None) -> list[tuple[bool, bool]]:
    """Per weight whether any rank has a gradient, and whether any rank's holds NaN or Inf."""
    flags = list(zip(present, bad, strict=True))
    together: dict[tuple[str, ...], list[int]] = {}
    for i, weight in enumerate(weights):
        together.setdefault(tuple(group.group_name for group in groups_of(weight.W, shared)), []).append(i)
    for names, members in together.items():
        if names:
            W = weights[members[0]].W
            agreed = torch.tensor([flags[i] for i in members], dtype=torch.uint8, device=local(W).device)
            for group in groups_of(W, shared):
                dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
            for i, (some, spoilt) in zip(members, agreed.tolist(), strict=True):
                flags[i] = bool(some), bool(spoilt)
    return flags


class Slots(MutableMapping[str, Any]):
    """The state of a weight whose matrices lie one after the other along a sharded axis: each rank sees its own."""

    def __init__(self, state: MutableMapping[str, Any], W: DTensor) -> None:
        self.state, self.W = state, W

    def __getitem__(self, key: str) -> Any:
        return local(self.state[key])

    def __setitem__(self, key: str, value: Any) -> None:
        axis = next(p.dim for p in self.W.placements if isinstance(p, Shard))
        placements = [Shard(0) if isinstance(p, Shard) else p for p in self.W.placements]
        shape = (self.W.size(axis), *value.shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        mesh = self.W.device_mesh
        self.state[key] = DTensor.from_local(value.contiguous(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def __delitem__(self, key: str) -> None:
        del self.state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


class Plan:
    """Who maps what, and what travels, for the weights that need other ranks.

    Args:
        weights: all of the optimizer's, in the same order on all ranks.
        shared: the group that shares the work on replicated weights.
        workspace: bytes of Φ in working precision that one pair of all-to-alls brings to a rank, about.

    Raises:
        NotShardable: for a way of lying over ranks that is not supported.
    """

    def __init__(self, weights: list[Weight], shared: ProcessGroup | None, workspace: int) -> None:
        self.weights = weights
        self._keys = [weight.key for weight in weights]
        self.runs: dict[tuple[int, int], list[tuple[int | None, Run, Unit]]] = {}
        self.exchanges: list[tuple[Exchange, list[int]]] = []
        self.scattered: list[tuple[ProcessGroup, list[int]]] = []
        self.units: list[Unit] = []
        self.slots: dict[tuple[int, int], int] = {}
        self.position = {weight.W: weight.position for weight in weights}
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
            self._exchange(groups[name], units, workspace)
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
        if stacked:
            self.slots[key] = min(units[0].sizes[1:])
        elif by_sums:
            whole = units_of(weight.position, number, axes, weight.W.shape, sharding, whole=True)
            scattered.setdefault(name, []).extend(whole)
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

    def _exchange(self, sharding: Sharding, units: list[Unit], workspace: int) -> None:
        """Owners for all units of a group; as many exchanges as the workspace wants."""
        ranks = len(sharding.bounds)
        assigned = assign(units, ranks)
        moving = [unit for unit, before in zip(assigned, units, strict=True) if before.owner == UNASSIGNED or before.replicated]
        buckets: list[list[Unit]] = [[]]
        used = 0
        for unit in moving:
            size = 4 * unit.numel // ranks
            if buckets[-1] and used + size > workspace:
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

    def update_(
        self,
        pieces: dict[int, list[Any]],
        active: dict[int, dict[str, Any]],
        map_owned: Callable[[list[Owned]], list[Tensor]],
        traffic: Traffic,
    ) -> None:
        """Update the pieces that belong to units: gather, map, spread, write.

        Args:
            pieces: unit -> its pieces here, in the order of its runs.
            active: position -> state of the weights that are updated in this step, the same on all ranks.
            map_owned: maps stacks of whole matrices.
            traffic: counted up.
        """
        for group, ids in self.scattered:
            self._normalize([i for i in ids if self.units[i].weight in active], pieces, active, group, traffic)
        for exchange, ids in self.exchanges:
            moving = {at: i for at, i in enumerate(ids) if self.units[i].weight in active}
            if not moving:
                continue
            stacks = exchange.gather({at: [p.direction().tensor() for p in pieces.get(i, [])] for at, i in moving.items()}, traffic)
            owned = [Owned(stack, self._options(self.units[ids[at]])) for at, stack in stacks.items()]
            updates = exchange.spread(dict(zip(stacks, map_owned(owned), strict=True)), traffic)
            for at, i in moving.items():
                for piece, U in zip(pieces.get(i, []), updates.get(at, []), strict=True):
                    piece.W.add_(U.reshape(piece.W.shape), alpha=-piece.lr)

    def _options(self, unit: Unit) -> dict[str, Any]:
        return self.weights[unit.weight].options(unit.block)

    def _normalize(
        self, ids: list[int], pieces: dict[int, list[Any]], active: dict[int, dict[str, Any]], group: ProcessGroup, traffic: Traffic
    ) -> None:
        stacks = []
        for i in ids:
            unit, W = self.units[i], local(self.weights[self.units[i].weight].W)
            boxes = [(p.run, p.direction().tensor()) for p in pieces.get(i, [])]
            start = active[unit.weight].get(f"basis{unit.block}")
            stacks.append(Scattered(unit, boxes, start, torch.promote_types(W.dtype, torch.float32), W.device))
        if not stacks:
            return
        normalize_over_ranks(stacks, group, traffic)
        for i, stack in zip(ids, stacks, strict=True):
            unit = self.units[i]
            active[unit.weight][f"basis{unit.block}"] = stack.basis.to(self.weights[unit.weight].W.dtype)
            for piece, U in zip(pieces.get(i, []), stack.updates(), strict=True):
                piece.W.add_(U, alpha=-piece.lr)

    def slots_of(self, weight: int, block: int, state: dict[str, Any]) -> MutableMapping[str, Any]:
        """Where the pieces of a block keep their basis."""
        if (weight, block) not in self.slots:
            return state
        W = self.weights[weight].W
        slots = Slots(state, W)  # pyright: ignore[reportArgumentType]
        if f"basis{block}" not in state and not self.runs[weight, block]:
            m = self.slots[weight, block]
            slots[f"basis{block}"] = local(W).new_zeros(0, m, min(VECTORS, m))
        return slots
