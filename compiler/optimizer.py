"""SpectralOptimizer: one torch optimizer for base update × matrix map × scale, per block of a weight."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from compiler.autocast import outside_autocast
from compiler.bits import LOW
from compiler.blocks import block_view, covers, matrices
from compiler.distributed import Plan, Weight
from compiler.errors import BadGradient, BadOption, NotReady, NotShardable
from compiler.exchange import Traffic
from compiler.fused import Bounds, batches, fits
from compiler.gradients import Ready, over_any, read, refuse_sparse, watched
from compiler.kernels import table
from compiler.loading import check_state, exactly, without_gaps
from compiler.maps import chunks, empty_basis, keeps_vectors, mapped
from compiler.options import (
    NEW_OPTIONS,
    SCHEDULED,
    check_group,
    check_names,
    check_options,
    check_scheduled,
    in_plain_numbers,
    warn_of_scales_in,
)
from compiler.pieces import Lane, Piece, advance, directions, lanes, subtract_, write_
from compiler.prepared import Prepared, layout_of
from compiler.shards import local, placements
from compiler.updates import buffers_of, largest_gradient

__all__ = ["SpectralOptimizer"]

CHECKED = tuple(name for name in NEW_OPTIONS if name not in SCHEDULED)
"""What is looked at again once it is another."""

LOOKS = "looks"
"""How often SN has looked at a weight, up to WARM; kept by the host."""

WARM = 2
"""SN starts from its last vectors after this many steps: the first may be of zeros, as torch's distributed checkpoint takes one, or
as weights before a zero-initialised projection get, and leave nothing to start from."""


class SpectralOptimizer(Optimizer):
    """W ← (1 - η·λ)·W - η·map(Φ) with η = lr·lr_scale, λ = weight_decay·wd_scale, Φ the base update.

    Every group carries the same nominal `lr`, which schedulers may write as they like: the scales are applied inside `step`.
    With wd_scale = 1/lr_scale, as `compiler.compile` sets it, the fraction decayed per step is lr·weight_decay at every width.

    Args:
        params: tensors, (name, tensor) pairs, or groups of them; a group may set every option below but process_group for itself.
        lr: the nominal learning rate, a float or a one-element tensor.
        update: the base update Φ, a name of `UPDATES`: "sgd" and "adam" take, bit for bit on a CPU, the steps of
            torch.optim.SGD (dampening 0, decay coupled) and torch.optim.AdamW; "momentum" and "nesterov" are torch.optim.Muon's
            B ← μ·B + (1 - μ)·G; "sign" is the sign of that.
        map: a name of `MAPS`: "msign" (U·Vᵀ), "sn" (Φ/‖Φ‖₂, from a block of 16 vectors kept in the state) or "svc"
            (U·min(λ·S, 1)·Vᵀ with λ = clip·clip_scale); or None.
        weight_decay: decoupled, except for "sgd" without a map; a float or a one-element tensor.
        momentum, betas, eps: of the base update; Adam's ε is eps·eps_scale.
        clip: λ of "svc".
        accuracy: of `compiler.msign`.
        strict: "sn" never exceeds spectral norm 1 (`compiler.spectral_norm`).
        nonfinite: "skip" leaves a weight whose gradient holds NaN or Inf, or a number so large that a buffer would overflow for good,
            and its state, as they are to the bit and counts it in `skipped`; "raise" raises before anything is changed, and so waits
            for the device.
        maximize: ascend.
        lr_scale, wd_scale, eps_scale, clip_scale: see above. norm_scale is read by `compiler.clip_grad_norm_`.
        travel: how base updates and updates go between ranks under "msign" and "svc": "full", in working precision; "half", in fp16
            with an exponent per matrix, which rounds every entry of both to 11 bits; "auto", "half" on CUDA, else "full".
        process_group: a group whose ranks hold the same replicated weights (DDP) and share the work on their matrices: each is
            mapped by one rank, whose update goes to the others. None: every rank maps all. Not kept by copy and pickle.
        capturable: nothing in `step` is read by the host, on any device. On other devices than a CPU that is so anyway, but for an lr
            that is a tensor on the CPU.
        master: keep bf16 weights to fp32 precision: their other 16 bits in the state (`low_bits`), and their buffers in fp32. Without
            it a change of less than 0.2 % of an entry is lost to rounding. Weights of other dtypes are left as they are.
        workspace: bytes of temporary memory that a step may take, about; a weight that needs more for itself is mapped alone. The
            collectives of `process_group` and DTensors keep to as much once more.
        blocks: None: under a map the weight is one (out, in) matrix. Else a list of dicts that partition the weight, each with
            its layout under "axes" (see `compiler.blocks`) and any of the options above but nonfinite, maximize, capturable, master
            and workspace.

    Every matrix of a block, one per copy, is mapped for itself; equal shapes, tall and wide, are batched over all weights.
    Gradients are only read. State: the buffers of the update, in the weight's dtype unless `master`: none or one for "sgd",
    "momentum", "nesterov" and "sign", two and a step count for "adam"; for "sn" 16·min(out, in) numbers per matrix.

    On CUDA a step does not wait for the device, and can be captured in a CUDA graph after a step outside of it: what a schedule is to
    change between replays, lr and weight_decay, must then be tensors on the device.

    Over ranks: weights may be DTensors, as `torch.distributed.fsdp.fully_shard` (FSDP2, HSDP) and `distribute_tensor` make them,
    in one Shard, of any axis, even or not, or Replicate. Make the optimizer after sharding. State is sharded like the weight, and
    every rank's step must be taken together. "msign" and "svc": a matrix cut by a shard boundary travels to the rank with the least
    to do, and its update back; strict "sn" too. "sn": only products with 16 vectors are summed. Weights without a matrix map are
    updated in place. A gradient that only some ranks have counts as zero on the others; one spoilt on any rank skips the weight on all.

    A step with lr 0 leaves a weight whose gradient is all zeros, and its state, as they are, but makes that state if there is none:
    torch.distributed.checkpoint takes one for that.

    Attributes:
        traffic: bytes this rank has sent in all-to-alls and put into all-reduces.

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

    traffic: Traffic
    process_group: ProcessGroup | None
    _plan: Plan | None
    _skips: dict[int, int]
    _unread: dict[tuple[int, ...], Tensor]
    _bounds: Bounds
    _prepared: Prepared | None
    _checked: dict[int, tuple[Any, ...]]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        update: str = "momentum",
        map: str | None = "msign",
        weight_decay: float | Tensor = 0.0,
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
        capturable: bool = False,
        master: bool = False,
        workspace: int = NEW_OPTIONS["workspace"],
    ) -> None:
        given = {
            "update": update,
            "map": map,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "maximize": maximize,
            "clip": clip,
            "accuracy": accuracy,
            "strict": strict,
            "nonfinite": nonfinite,
            "travel": travel,
            "capturable": capturable,
            "master": master,
            "workspace": workspace,
        }
        self.traffic, self._skips, self._unread, self._bounds = Traffic(), {}, {}, {}
        self.process_group, self._plan, self._prepared, self._checked = process_group, None, None, {}
        super().__init__(params, {"lr": lr, **NEW_OPTIONS, **given})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("traffic", Traffic())
        self._bounds, self._prepared, self._checked = {}, None, {}
        for name, empty in (("_skips", {}), ("_unread", {}), ("process_group", None), ("_plan", None)):
            self.__dict__.setdefault(name, empty)
        for name, default in NEW_OPTIONS.items():
            self.defaults.setdefault(name, default)
            for group in self.param_groups:
                group.setdefault(name, default)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, as in torch, but each tensor in the dtype it was saved in, and none that shares memory with what is given.

        lr and weight_decay stay what they are here, a float or a tensor on its device, whatever they were when they were saved.

        Raises:
            BadState: for the state of another class, or of weights of other shapes or in another order.
            BadOption, UnknownName, NotAMatrix: for options that make no sense here. Nothing has been loaded then.
        """
        given: dict[str, Any] = {}
        scheduled = [{name: group[name] for name in SCHEDULED} for group in self.param_groups]

        def check(_: Optimizer, changed: dict[str, Any]) -> dict[str, Any]:
            given.update(without_gaps(changed))  # by other hooks, which have run before this one
            check_state(given, self.param_groups)
            return given

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: exactly(given, self.param_groups, self.state, scheduled), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; refused as a whole if an option of it makes no sense.

        Raises:
            BadOption: for an option out of range, or a weight that is in the group twice.
            UnknownName: for an unknown name, a misspelt option or one of torch's that this optimizer does not have.
            NotAMatrix: for a weight under a map that is not a matrix.
        """
        groups = len(self.param_groups)
        check_names(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            if len(set(group["params"])) < len(group["params"]):
                names = group.get("param_names", [tuple(W.shape) for W in group["params"]])
                raise BadOption("params", names, "one weight is among them twice, and would be stepped twice")
        except Exception:
            del self.param_groups[groups:]
            raise
        group.update(in_plain_numbers(group))
        if group["blocks"] and any(in_plain_numbers(block) for block in group["blocks"]):
            group["blocks"] = [{**block, **in_plain_numbers(block)} for block in group["blocks"]]
        for name in SCHEDULED:
            if isinstance(group[name], Tensor):
                group[name] = group[name].detach().clone()  # schedulers write it in place, group by group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step and return the closure's loss, if there is a closure.

        Weights without a gradient are left alone. Autocast is for the closure only.

        Raises:
            BadGradient: for sparse gradients; for weights on meta if there is no gradient at all; with nonfinite="raise" for NaN or Inf.
            BadOption, UnknownName: for an option that was changed to what makes no sense, as an lr below 0. Nothing has been changed then.
            NotReady: if a CUDA graph is captured before a first step has made the state.
            NotShardable: for a matrix that has been flattened since (FSDP1).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_changes()
        self._update()
        return loss

    @outside_autocast
    def _update(self) -> None:
        plan = self.plan()
        ready = self._ready(plan)
        rest = self._as_before(ready) if plan is None else ready
        alone: list[Piece] = []
        shared: dict[int, list[Piece]] = {}
        for piece in self._pieces(rest, plan):
            if piece.unit is None:
                alone.append(piece)
            else:
                shared.setdefault(piece.unit, []).append(piece)
        for chunk in chunks(self._at_once(alone, ready if plan is None else [])):
            if chunk[0].o["map"] is None:
                for members in lanes(chunk):
                    write_(members, advance(members))
            else:
                stacks = [matrices(direction, piece.sizes) for direction, piece in zip(directions(chunk), chunk, strict=True)]
                subtract_(chunk, mapped(chunk, stacks))
        if plan is not None:
            plan.update_(shared, {entry.position: entry for entry in ready}, self.traffic)

    @property
    def skipped(self) -> dict[str, int]:
        """Weight name (or "group.index") -> steps skipped for its gradient, since this object was made. Reading waits for the device."""
        names = [entry.name for entry in self._entries()]
        counts = Counter(self._skips)
        for positions, skips in self._unread.items():
            counts.update(dict(zip(positions, skips.tolist(), strict=True)))
        return {names[position]: count for position, count in sorted(counts.items()) if count > 0}

    def plan(self) -> Plan | None:
        """Who maps what over ranks, and the bytes that travel; None if every weight is whole on every rank."""
        if self.process_group is None and not any(isinstance(W, DTensor) for group in self.param_groups for W in group["params"]):
            return None
        weights = [Weight(entry.position, entry.name, entry.W, entry.group) for entry in self._entries()]
        if self._plan is None or not self._plan.fits(weights):
            self._plan = Plan(weights, self.process_group)
        return self._plan

    def _check_changes(self) -> None:
        """Look at the options that were written since the last step."""
        if torch.compiler.is_compiling():
            return
        for number, group in enumerate(self.param_groups):
            check_scheduled(group)
            options = tuple(group[name] for name in CHECKED)
            if self._checked.get(number) != options:
                check_options(group)
                self._checked[number] = options
        warn_of_scales_in(self.param_groups)

    def _entries(self) -> list[Ready]:
        """All weights."""
        entries, compiling = [], torch.compiler.is_compiling()
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
            limits: dict[torch.dtype, float] = {}
            for name, W in zip(names, group["params"], strict=True):
                dtype = _dtype(W, group)
                if dtype not in limits:
                    limits[dtype] = min(largest_gradient({**group, **block}, dtype) for block in group["blocks"] or ({},))
                unread = group["capturable"] or compiling or W.device.type != "cpu"
                entries.append(Ready(len(entries), number, name, W, group, limits[dtype], unread))
        return entries

    def _ready(self, plan: Plan | None) -> list[Ready]:
        """The weights that take part in this step; those that are skipped have been counted, or raised."""
        entries = [entry for entry in self._entries() if entry.W.numel() > 0]
        refuse_sparse((entry.name, entry.W) for entry in entries)
        if astray := [entry.name for entry in entries if entry.W.grad is not None and placements(entry.W.grad) != placements(entry.W)]:
            raise BadGradient(astray, "over ranks placed unlike its weight:", "redistribute the gradient to its weight's placements")
        if flat := next((entry for entry in entries if entry.W.ndim != _dimensions(entry)), None):
            why = f"has the shape {tuple(flat.W.shape)} now, and {_dimensions(flat)} axes when the optimizer was made"
            raise NotShardable(flat.name, why, "FSDP1 flattens weights: use fully_shard, which is FSDP2, and make the optimizer after that")
        by_host = [entry for entry in entries if not entry.unread]
        by_device: dict[torch.device, list[Ready]] = {}
        for entry in entries:
            if entry.unread and (entry.W.grad is not None or (plan is not None and entry.W.requires_grad)):
                by_device.setdefault(entry.W.device, []).append(entry)
        sides = [(members, watched(members)) for members in by_device.values()]
        if by_host:
            sides.insert(0, (by_host, read(by_host)))
        if plan is not None:
            sides = [(members, over_any(members, flags, self.process_group)) for members, flags in sides]
        self._raise_spoilt(sides)
        ready = []
        for members, flags in sides:
            ready += self._good(members, flags) if members[0].unread else self._known(members, flags)
        if not ready and (meta := [entry.name for entry in entries if entry.W.is_meta]):
            raise BadGradient(
                meta, "no", "they are on meta: make the optimizer after model.to_empty(device=...), which makes other weights"
            )
        return ready

    def _raise_spoilt(self, sides: list[tuple[list[Ready], Tensor]]) -> None:
        strict = [(members, flags) for members, flags in sides if any(entry.group["nonfinite"] == "raise" for entry in members)]
        spoilt = [entry for members, flags in strict for entry, wrong in zip(members, flags[1].tolist(), strict=True) if wrong]
        if any(entry.group["nonfinite"] == "raise" for entry in spoilt):
            cure = "nothing was changed; nonfinite='skip' leaves such weights out"
            raise BadGradient([entry.name for entry in spoilt], "NaN or Inf, or too large a number, in the", cure)

    def _known(self, entries: list[Ready], flags: Tensor) -> list[Ready]:
        """The weights to update, as the host knows."""
        ready = []
        for entry, present, spoilt, moves in zip(entries, *flags.tolist(), strict=True):
            if spoilt:
                self._skips[entry.position] = self._skips.get(entry.position, 0) + 1
            elif present:
                entry.idle = not moves and float(entry.group["lr"]) == 0
                ready.append(entry)
        return ready

    def _good(self, entries: list[Ready], flags: Tensor) -> list[Ready]:
        """All weights, each with a flag whether it is updated."""
        present, spoilt, moves = flags
        good = present & ~spoilt
        rates = {entry.number: _number(entry, entry.group["lr"]) for entry in entries}
        if any(isinstance(lr, Tensor) or lr == 0 for lr in rates.values()):
            runs = {key: lr != 0 if isinstance(lr, Tensor) else torch.full_like(good[0], lr != 0) for key, lr in rates.items()}
            good &= moves | torch.stack([runs[entry.number].to(good.device) for entry in entries])
        for entry in entries:
            entry.flags = good
        positions = tuple(entry.position for entry in entries)
        if positions not in self._unread:
            _refuse_capture()
            self._unread[positions] = torch.zeros_like(spoilt, dtype=torch.int32)
        self._unread[positions].add_(spoilt)
        return entries

    def _pieces(self, ready: list[Ready], plan: Plan | None) -> Iterator[Piece]:
        """The parts of the weights that are updated here, lane by lane, with their state."""
        alike: dict[tuple[Any, ...], list[Ready]] = {}
        for entry in ready:
            alike.setdefault((entry.number, entry.W.device, entry.unread), []).append(entry)
        for key, entries in alike.items():
            group = entries[0].group
            blocks = [{**group, **block} for block in group["blocks"] or ({},)]
            self._make_state(entries, blocks)
            if any(o["update"] == "adam" for o in blocks):
                _set_steps(entries)
            self._count(entries)
            gradients = [torch.zeros_like(local(entry.W)) if entry.gradient is None else entry.gradient for entry in entries]
            for number, o in enumerate(blocks):
                lane = Lane((*key, number), o, 0.0, 0.0)
                self._set_lane(lane, entries[0])
                for entry, G in zip(entries, gradients, strict=True):
                    for piece in self._of_block(entry, G, number, lane, plan):
                        if not entry.idle:
                            yield piece

    def _as_before(self, ready: list[Ready]) -> list[Ready]:
        """Take the step of the weights that lie as they did in the last one, and return the others."""
        if self._prepared is None or torch.compiler.is_compiling():
            return ready
        for entry in ready:
            self._attach(entry)
        if layout_of(ready) != self._prepared.layout:
            self._prepared = None
            return ready
        rest = self._prepared.fill(ready, self._set_lane, self._count)
        try:
            for batch in self._prepared.batches:
                batch.update_(self._bounds)
        finally:
            self._prepared.clear()
        return rest

    def _at_once(self, pieces: list[Piece], ready: list[Ready]) -> list[Piece]:
        """Take the step of what the kernels can take, and return the others; how `ready` lie is kept for the next step."""
        fit = [fits(piece) for piece in pieces]
        if not any(fit):
            return pieces
        parted = {piece.entry.position for piece, fine in zip(pieces, fit, strict=True) if not fine}
        whole = [piece for piece in pieces if piece.entry.position not in parted]
        at_once = batches(whole)
        for batch in (*at_once, *batches([p for p, fine in zip(pieces, fit, strict=True) if fine and p.entry.position in parted])):
            batch.update_(self._bounds)
        if whole and ready and self._prepared is None:
            self._prepared = Prepared(layout_of(ready), ready, whole, at_once)
        return [piece for piece, fine in zip(pieces, fit, strict=True) if not fine]

    def _set_lane(self, lane: Lane, entry: Ready) -> None:
        """Bring the options of a lane up to date, from a weight of it."""
        lane.o = {**entry.group, **(entry.group["blocks"] or ({},))[lane.key[-1]]}
        lane.lr = _number(entry, lane.o["lr"]) * lane.o["lr_scale"]
        lane.decay = _number(entry, lane.o["weight_decay"]) * lane.o["wd_scale"]

    def _count(self, entries: list[Ready]) -> None:
        """Count the step of weights of one group."""
        group = entries[0].group
        blocks = [{**group, **block} for block in group["blocks"] or ({},)]
        if any(o["update"] == "adam" for o in blocks):
            counters, flags = [entry.state["step"] for entry in entries], entries[0].flags
            if flags is None:
                for entry, counter in zip(entries, counters, strict=True):
                    counter += not entry.idle
            else:
                good = flags.index_select(0, table(tuple(entry.at for entry in entries), flags.device))
                torch._foreach_add_(counters, list(good.float().unbind()))
        if any(keeps_vectors(o) for o in blocks):
            for entry in entries:
                entry.state[LOOKS] = min(entry.state.get(LOOKS, 0) + (not entry.idle), WARM)

    def _attach(self, entry: Ready) -> None:
        """Give a weight its state, and what follows from it before the step."""
        entry.state = self.state[entry.W]
        entry.warm = entry.state.get(LOOKS, 0) >= WARM

    def _of_block(self, entry: Ready, G: Tensor, number: int, lane: Lane, plan: Plan | None) -> Iterator[Piece]:
        """The pieces of one block of one weight."""
        state, o, here = entry.state, lane.o, local(entry.W)
        names = buffers_of(o)
        tensors = [here, G, *(local(state[name]) for name in names), *([local(state[LOW])] if LOW in state else [])]
        axes = o.get("axes")

        def piece(views: list[Tensor], sizes: tuple[int, int, int], *place: Any) -> Piece:
            low = views.pop() if LOW in state else None
            held = dict(zip(names, views[2:], strict=True))
            vectors = local(state[f"basis{number}"]) if keeps_vectors(o) else None
            return Piece(views[0], views[1], held, low, lane, entry, sizes, vectors, *place)

        parts = plan.runs.get((entry.position, number)) if plan is not None else None
        if parts is not None and plan is not None:
            if keeps_vectors(o) and f"basis{number}" not in state:
                state[f"basis{number}"] = plan.empty_basis(entry.position, number)
            for unit_number, run, unit in parts:
                yield piece([run.view(T) for T in tensors], unit.sizes, unit_number, run)
            return
        sizes = (1, here.size(0), here.size(1)) if o["map"] is not None and axes is None else (1, 1, here.numel())
        if axes is not None and (o["map"] is not None or not covers(axes, entry.W.shape)):
            sizes = block_view(here, axes)[1]
            tensors = [block_view(T, axes)[0] for T in tensors]
        if keeps_vectors(o) and f"basis{number}" not in state:
            state[f"basis{number}"] = empty_basis(here, sizes)
        yield piece(tensors, sizes)

    def _make_state(self, entries: list[Ready], blocks: list[dict[str, Any]]) -> None:
        """Buffers of zeros with the weight's shape, device and strides."""
        names = list(dict.fromkeys(name for o in blocks for name in buffers_of(o)))
        counts = any(o["update"] == "adam" for o in blocks)
        for entry in entries:
            self._attach(entry)
            W, state = entry.W, entry.state
            wanted = [*names, LOW] if _kept(W, entry.group) else names
            if LOW not in wanted:
                state.pop(LOW, None)  # the weight has become fp32, or is no longer kept to it
            for name in wanted:
                if name not in state:
                    _refuse_capture()
                    dtype = torch.int16 if name == LOW else _dtype(W, entry.group)
                    state[name] = torch.zeros_like(W, dtype=dtype, memory_format=torch.preserve_format)
            if counts and ("step" not in state or (entry.unread and state["step"].device != W.device)):
                _refuse_capture()
                device = W.device if entry.unread else torch.device("cpu")
                state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=device)


def _set_steps(entries: list[Ready]) -> None:
    """Which step of each weight this is, if it is taken."""
    steps = torch._foreach_add([entry.state["step"] for entry in entries], 1)
    for entry, step in zip(entries, steps, strict=True):
        entry.step = step.item() if entry.flags is None else step


def _number(entry: Ready, value: float | Tensor) -> float | Tensor:
    """A number the host may know, or a 0-d tensor it may not read."""
    if not isinstance(value, Tensor):
        return float(value)
    readable = not entry.unread or (value.device.type == "cpu" and entry.W.device.type != "cpu" and not entry.group["capturable"])
    return value.item() if readable else value.reshape(())


def _dimensions(entry: Ready) -> int:
    """How many axes a weight must have that is taken apart into blocks or mapped."""
    if blocks := entry.group["blocks"]:
        return len(blocks[0]["axes"])
    return entry.W.ndim if entry.group["map"] is None else 2


def _kept(W: Tensor, group: dict[str, Any]) -> bool:
    """Whether a weight is kept to more precision than it has."""
    return group["master"] and W.dtype == torch.bfloat16


def _dtype(W: Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype of a weight's buffers."""
    return torch.float32 if _kept(W, group) else W.dtype


def _refuse_capture() -> None:
    """State made while a CUDA graph is captured would be made anew by every replay.

    Raises:
        NotReady: if one is.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise NotReady
