"""SpectralOptimizer: one torch optimizer for base update × matrix map × scale, per block of a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from compiler.blocks import block_view, check_axes, covers, matrices, plain
from compiler.coefficients import SCHEDULES
from compiler.distributed import TRAVEL, Owned, Plan, Weight, over_any
from compiler.errors import BadGradient, BadOption, NotAMatrix
from compiler.exchange import Traffic
from compiler.msign import msign, power_of_two
from compiler.norms import ritz, spectral_normalize, svc
from compiler.shards import Run, local, placements, sharding_of
from compiler.updates import UPDATES, Direction, buffers_of, empty_buffer
from scaling.errors import UnknownName

__all__ = ["MAPS", "SpectralOptimizer"]

WORKSPACE = 2**28
"""Bytes of base updates that are mapped in one batch; a single larger weight is mapped whole."""

NEW_OPTIONS: dict[str, Any] = {
    "update": "momentum",
    "map": "msign",
    "weight_decay": 0.0,
    "momentum": 0.95,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "clip": 1.0,
    "lr_scale": 1.0,
    "wd_scale": 1.0,
    "eps_scale": 1.0,
    "clip_scale": 1.0,
    "norm_scale": 1.0,
    "accuracy": "default",
    "strict": False,
    "nonfinite": "skip",
    "travel": "auto",
    "maximize": False,
    "blocks": None,
}
"""What a group, or a checkpoint from before an option existed, gets by default."""


class SpectralOptimizer(Optimizer):
    """W ← (1 - η·λ)·W - η·map(Φ) with η = lr·lr_scale, λ = weight_decay·wd_scale, Φ the base update.

    Every group carries the same nominal `lr`, which schedulers may write as they like: the scales are applied inside `step`.
    With wd_scale = 1/lr_scale, as `compiler.compile` sets it, the fraction decayed per step is lr·weight_decay at every width.

    Args:
        params: tensors, (name, tensor) pairs, or groups of them; a group may set every option below for itself.
        lr: the nominal learning rate, a float or a one-element tensor.
        update: the base update Φ, a name of `UPDATES`: "sgd" and "adam" take, bit for bit on a CPU, the steps of
            torch.optim.SGD (dampening 0, decay coupled) and torch.optim.AdamW; "momentum" and "nesterov" are torch.optim.Muon's
            B ← μ·B + (1 - μ)·G; "sign" is the sign of that.
        map: a name of `MAPS`: "msign" (U·Vᵀ), "sn" (Φ/‖Φ‖₂, from a block of 16 vectors kept in the state) or "svc"
            (U·min(λ·S, 1)·Vᵀ with λ = clip·clip_scale); or None.
        weight_decay: decoupled, except for "sgd" without a map.
        momentum, betas, eps: of the base update; Adam's ε is eps·eps_scale.
        clip: λ of "svc".
        accuracy: of `compiler.msign`.
        strict: "sn" never exceeds spectral norm 1 (`compiler.spectral_norm`).
        nonfinite: "skip" leaves a weight whose gradient holds NaN or Inf, and its state, as they are and counts it in `skipped`;
            "raise" raises before anything is changed.
        maximize: ascend.
        lr_scale, wd_scale, eps_scale, clip_scale: see above. norm_scale is read by `compiler.clip_grad_norm_`.
        travel: how base updates and updates go between ranks under "msign" and "svc": "full", in working precision; "half", in fp16
            with an exponent per matrix, which rounds every entry of both to 11 bits; "auto", "half" on CUDA, else "full".
        process_group: a group whose ranks hold the same replicated weights (DDP) and share the work on their matrices: each is
            mapped by one rank, whose update goes to the others. None: every rank maps all. Not kept by copy and pickle.
        blocks: None: under a map the weight is one (out, in) matrix. Else a list of dicts that partition the weight, each with
            its layout under "axes" (see `compiler.blocks`) and any of the options above.

    Every matrix of a block, one per copy, is mapped for itself; equal shapes, tall and wide, are batched over all weights.
    Gradients are only read. State: the buffers of the update, in the weight's dtype.

    Over ranks: weights may be DTensors, as `torch.distributed.fsdp.fully_shard` (FSDP2, HSDP) and `distribute_tensor` make them,
    in one Shard, of any axis, even or not, or Replicate. Make the optimizer after sharding. State is sharded like the weight, and
    every rank's step must be taken together. "msign" and "svc": a matrix cut by a shard boundary travels to the rank with the least
    to do, and its update back; strict "sn" too. "sn": only products with 16 vectors are summed. Weights without a matrix map are
    updated in place. A gradient that only some ranks have counts as zero on the others; one spoilt on any rank skips the weight on all.

    Attributes:
        traffic: bytes this rank has sent in all-to-alls and put into all-reduces.
        skipped: weight name (or "group.index") -> steps skipped for a gradient that was not finite; not part of the state dict.

    Raises:
        BadOption: for an option out of range.
        UnknownName: for an unknown name.
        NotAMatrix: for a weight under a map that is not a matrix.
        NotShardable: for a weight that lies over ranks in a way that is not supported.

    >>> W = torch.nn.Parameter(torch.zeros(2, 2))
    >>> W.grad = torch.diag(torch.tensor([4.0, -1.0]))
    >>> SpectralOptimizer([W], lr=0.5, map="sn").step()
    >>> W.data
    tensor([[-0.5000,  0.0000],
            [ 0.0000,  0.1250]])
    """

    skipped: dict[str, int]
    traffic: Traffic
    process_group: ProcessGroup | None
    _plan: Plan | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        update: str = "momentum",
        map: str | None = "msign",
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        clip: float = 1.0,
        accuracy: str = "default",
        strict: bool = False,
        nonfinite: str = "skip",
        travel: str = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        given = {
            "update": update,
            "map": map,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": tuple(betas),
            "eps": eps,
            "maximize": maximize,
            "clip": clip,
            "accuracy": accuracy,
            "strict": strict,
            "nonfinite": nonfinite,
            "travel": travel,
        }
        self.skipped = {}
        self.traffic = Traffic()
        self.process_group, self._plan = process_group, None
        super().__init__(params, {"lr": lr, **NEW_OPTIONS, **given})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("skipped", {})
        self.__dict__.setdefault("traffic", Traffic())
        self.__dict__.setdefault("process_group", None)
        self.__dict__.setdefault("_plan", None)
        for name, default in NEW_OPTIONS.items():
            self.defaults.setdefault(name, default)
            for group in self.param_groups:
                group.setdefault(name, default)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; refused as a whole if an option of it makes no sense.

        Raises:
            BadOption: for an option out of range.
            UnknownName: for an unknown name.
            NotAMatrix: for a weight under a map that is not a matrix.
        """
        groups = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except Exception:
            del self.param_groups[groups:]
            raise
        if isinstance(param_group["lr"], Tensor):
            param_group["lr"] = param_group["lr"].clone()  # schedulers write it in place, group by group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step and return the closure's loss, if there is a closure.

        Weights without a gradient are left alone.

        Raises:
            BadGradient: for sparse gradients; with nonfinite="raise" for NaN or Inf. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self.plan()
        pieces: list[_Piece] = []
        shared: dict[int, list[_Piece]] = {}
        active: dict[int, dict[str, Any]] = {}
        for group, index, W in self._finite():
            for piece in self._pieces(group, index, W, plan):
                if piece.unit is not None:
                    shared.setdefault(piece.unit, []).append(piece)
                elif piece.o["map"] is None:
                    piece.direction().subtract_from_(piece.W, piece.lr)
                else:
                    pieces.append(piece)
            if plan is not None:
                active[plan.position[W]] = self.state[W]
        for piece, U in _mapped(pieces):
            piece.W.add_(U.reshape(piece.W.shape), alpha=-piece.lr)
        if plan is not None:
            plan.update_(shared, active, _map_owned, self.traffic)
        return loss

    def plan(self) -> Plan | None:
        """Who maps what over ranks, and the bytes that travel; None if every weight is whole on every rank."""
        if self.process_group is None and not any(isinstance(W, DTensor) for group in self.param_groups for W in group["params"]):
            return None
        named = [(group, self._name(group, i), W) for group in self.param_groups for i, W in enumerate(group["params"])]
        weights = [Weight(position, name, W, group) for position, (group, name, W) in enumerate(named)]
        if self._plan is None or not self._plan.fits(weights):
            self._plan = Plan(weights, self.process_group, WORKSPACE)
        return self._plan

    def _finite(self) -> list[tuple[dict[str, Any], int, Tensor]]:
        """The weights with a gradient, on any rank, that is finite on all; the others are counted or raised."""
        found = [(g, i, W) for g in self.param_groups for i, W in enumerate(g["params"]) if W.numel() > 0]
        sparse = [self._name(g, i) for g, i, W in found if W.grad is not None and W.grad.is_sparse]
        if sparse:
            raise BadGradient(sparse, "sparse", "use dense gradients: nn.Embedding(..., sparse=False)")
        if astray := [self._name(g, i) for g, i, W in found if W.grad is not None and placements(W.grad) != placements(W)]:
            raise BadGradient(astray, "over ranks placed unlike its weight:", "redistribute the gradient to its weight's placements")
        present = [W.grad is not None for _, _, W in found]
        checked = [k for k, (_, _, W) in enumerate(found) if W.grad is not None and local(W.grad).numel() > 0]
        bad = [False] * len(found)
        if checked:
            largest = torch._foreach_norm([local(found[k][2].grad) for k in checked], ord=math.inf)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]
            finite = torch.stack([norm.isfinite().to(largest[0].device) for norm in largest]).tolist()
            for k, fine in zip(checked, finite, strict=True):
                bad[k] = not fine
        if (plan := self.plan()) is not None:
            flags = over_any([plan.weights[plan.position[W]] for _, _, W in found], present, bad, self.process_group)
            present, bad = [some for some, _ in flags], [spoilt for _, spoilt in flags]
        spoilt = [(g, self._name(g, i)) for (g, i, _), wrong in zip(found, bad, strict=True) if wrong]
        if any(g["nonfinite"] == "raise" for g, _ in spoilt):
            raise BadGradient(
                [name for _, name in spoilt], "NaN or Inf in the", "nothing was changed; nonfinite='skip' leaves such weights out"
            )
        for _, name in spoilt:
            self.skipped[name] = self.skipped.get(name, 0) + 1
        return [entry for entry, some, wrong in zip(found, present, bad, strict=True) if some and not wrong]

    def _name(self, group: dict[str, Any], index: int) -> str:
        if "param_names" in group:
            return group["param_names"][index]
        position = next(i for i, other in enumerate(self.param_groups) if other is group)
        return f"{position}.{index}"

    def _pieces(self, group: dict[str, Any], index: int, W: Tensor, plan: Plan | None) -> Iterator[_Piece]:
        """The parts of one weight that are updated for themselves here, decay applied, state ready."""
        state: dict[str, Any] = self.state[W]
        blocks = [{**group, **block} for block in group["blocks"] or ({},)]
        for name in dict.fromkeys(name for o in blocks for name in buffers_of(o)):
            if name not in state:
                state[name] = empty_buffer(W)
        if any(o["update"] == "adam" for o in blocks):
            state["step"] = state.get("step", torch.tensor(0.0)) + 1
        here = local(W)
        grad = torch.zeros_like(here) if W.grad is None else local(W.grad)
        grad = -grad if group["maximize"] else grad
        for number, o in enumerate(blocks):
            o["step"] = state["step"].item() if "step" in state else 0
            tensors = [here, grad, *(local(state[name]) for name in buffers_of(o))]
            axes, sizes = o.get("axes", plain(W.shape) if o["map"] else ()), (1, 1, 1)
            parts = plan.runs.get((plan.position[W], number)) if plan is not None else None
            if parts is not None and plan is not None:
                slots = plan.slots_of(plan.position[W], number, state)
                for number_of_unit, run, unit in parts:
                    views = [run.view(T) for T in tensors]
                    buffers = dict(zip(buffers_of(o), views[2:], strict=True))
                    yield _Piece(views[0], views[1], buffers, o, unit.sizes, slots, f"basis{number}", number_of_unit, run)
                continue
            if o["map"] is not None or (axes and not covers(axes, W.shape)):
                sizes = block_view(here, axes)[1]
                tensors = [block_view(T, axes)[0] for T in tensors]
            buffers = dict(zip(buffers_of(o), tensors[2:], strict=True))
            yield _Piece(tensors[0], tensors[1], buffers, o, sizes, state, f"basis{number}")


@dataclass
class _Piece:
    """A block of one weight in one step: views of shape (copies..., out..., in...), or the whole weight."""

    W: Tensor
    G: Tensor
    buffers: dict[str, Tensor]
    o: dict[str, Any]
    sizes: tuple[int, int, int]
    state: MutableMapping[str, Any]
    basis: str
    unit: int | None = None
    run: Run | None = None

    @property
    def lr(self) -> float:
        return float(self.o["lr"]) * self.o["lr_scale"]

    def direction(self) -> Direction:
        """Decay the weight, advance the buffers and return Φ."""
        decay, G = self.o["weight_decay"] * self.o["wd_scale"], self.G
        if decay != 0:
            if self.o["update"] == "sgd" and self.o["map"] is None:
                G = G.add(self.W, alpha=decay)
            else:
                self.W.mul_(1 - self.lr * decay)
        return UPDATES[self.o["update"]](G, self.buffers, self.o)


_Mappable = _Piece | Owned


def _tall(piece: _Mappable) -> bool:
    return piece.sizes[1] > piece.sizes[2]


def _batch(piece: _Mappable) -> tuple[Any, ...]:
    """What the pieces of one batch have in common."""
    _, out, into = piece.sizes
    T = piece.W if isinstance(piece, _Piece) else piece.stack
    options = (piece.o["map"], piece.o["accuracy"], piece.o["strict"], piece.basis in piece.state)
    return min(out, into), max(out, into), torch.promote_types(T.dtype, torch.float32), T.device, *options


def _chunks(pieces: Sequence[_Mappable]) -> Iterator[list[_Mappable]]:
    """The pieces in batches of at most WORKSPACE bytes, but at least one piece."""
    batches: dict[tuple[Any, ...], list[_Mappable]] = {}
    for piece in pieces:
        batches.setdefault(_batch(piece), []).append(piece)
    for batch in batches.values():
        chunk, used = [], 0
        for piece in batch:
            size = math.prod(piece.sizes) * _batch(piece)[2].itemsize
            if chunk and used + size > WORKSPACE:
                yield chunk
                chunk, used = [], 0
            chunk.append(piece)
            used += size
        yield chunk


def _mapped(pieces: Sequence[_Mappable]) -> Iterator[tuple[Any, Tensor]]:
    """Each piece with map(Φ), batch by batch; tall matrices go through transposed."""
    for chunk in _chunks(pieces):
        working, name = _batch(chunk[0])[2], chunk[0].o["map"]
        stacks = [
            (matrices(piece.direction().tensor(), piece.sizes) if isinstance(piece, _Piece) else piece.stack).to(working) for piece in chunk
        ]
        stack = torch.cat([stack.mT if _tall(piece) else stack for piece, stack in zip(chunk, stacks, strict=True)])
        for piece, U in zip(chunk, MAPS[name](stack, chunk).split([piece.sizes[0] for piece in chunk]), strict=True):
            yield piece, U.mT if _tall(piece) else U


def _map_owned(owned: list[Owned]) -> list[Tensor]:
    done = {id(piece): U for piece, U in _mapped(owned)}
    return [done[id(piece)] for piece in owned]


def _msign(stack: Tensor, pieces: list[_Mappable]) -> Tensor:
    return msign(stack, accuracy=pieces[0].o["accuracy"])


def _sn(stack: Tensor, pieces: list[_Mappable]) -> Tensor:
    if pieces[0].o["strict"]:
        return spectral_normalize(stack, strict=True)
    A, _, _ = power_of_two(stack)
    started = pieces[0].basis in pieces[0].state
    sigma, basis = ritz(A, torch.cat([piece.state[piece.basis] for piece in pieces]) if started else None)
    for piece, part in zip(pieces, basis.split([piece.sizes[0] for piece in pieces]), strict=True):
        piece.state[piece.basis] = part.to(piece.W.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    return A / sigma.where(sigma > 0, 1)[:, None, None]


def _svc(stack: Tensor, pieces: list[_Mappable]) -> Tensor:
    scales = [piece.o["clip"] * piece.o["clip_scale"] for piece in pieces for _ in range(piece.sizes[0])]
    return svc(stack, torch.tensor(scales, dtype=torch.float64, device=stack.device))


MAPS: dict[str, Callable[[Tensor, list[_Mappable]], Tensor]] = {"msign": _msign, "sn": _sn, "svc": _svc}
"""Name -> the map of a stack of matrices (B, m, n), m ≤ n."""


RANGES: dict[str, tuple[float, float]] = {
    "lr": (0, math.inf),
    "weight_decay": (0, math.inf),
    "momentum": (0, 1),
    "eps": (0, math.inf),
    "clip": (0, math.inf),
    "lr_scale": (0, math.inf),
    "wd_scale": (0, math.inf),
    "eps_scale": (0, math.inf),
    "clip_scale": (0, math.inf),
    "norm_scale": (0, math.inf),
}
"""Option -> [from, below)."""

CHOICES: dict[str, Iterable[Any]] = {
    "update": UPDATES,
    "map": (*MAPS, None),
    "accuracy": SCHEDULES,
    "nonfinite": ("skip", "raise"),
    "travel": TRAVEL,
}


def _check(group: dict[str, Any]) -> None:
    for block in group["blocks"] or ({},):
        _check_options({**group, **block})
    names = group.get("param_names", [f"number {i} of its group" for i in range(len(group["params"]))])
    for name, W in zip(names, group["params"], strict=True):
        if not W.is_floating_point():
            raise NotAMatrix(W.shape, f"weight {name}, {W.dtype},", "only real floating point weights can be updated")
        if group["blocks"] is not None or group["map"] is not None:
            sharding_of(name, W)
        if group["blocks"] is None and group["map"] is not None and W.ndim != 2:
            raise NotAMatrix(
                W.shape,
                f"map={group['map']!r} on weight {name}",
                "put vectors in a group with map=None, update='adam'; convolutions and experts need blocks, which compiler.compile makes",
            )
        if group["blocks"] is not None:
            _check_blocks(name, group["blocks"], W)


def _check_options(o: dict[str, Any]) -> None:
    for name, known in CHOICES.items():
        if o[name] not in known:
            raise UnknownName(name, o[name], [str(x) for x in known])
    if isinstance(o["lr"], Tensor) and o["lr"].numel() != 1:
        raise BadOption("lr", o["lr"], "a tensor lr has one element")
    for name, (low, high) in RANGES.items():
        if not low <= float(o[name]) < high:
            raise BadOption(
                name, o[name], f"a finite number of at least {low:g}" if high == math.inf else f"a number in [{low:g}, {high:g})"
            )
    if len(o["betas"]) != 2 or not all(0 <= beta < 1 for beta in o["betas"]):
        raise BadOption("betas", o["betas"], "two numbers in [0, 1)")


def _check_blocks(name: str, blocks: list[dict[str, Any]], W: Tensor) -> None:
    taken = 0
    for block in blocks:
        check_axes(block["axes"], W.shape)
        taken += math.prod(stop - start for axis in block["axes"] for _, _, start, stop in axis)
    if taken != W.numel():
        raise BadOption("blocks", [block["axes"] for block in blocks], f"they hold {taken} of the {W.numel()} entries of weight {name}")
