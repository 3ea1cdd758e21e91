"""What an optimizer does to a weight, found by trying: a copy of it is stepped on made-up gradients.

No optimizer is known by name. Of an update only its degree p in the gradient and its size matter (THEORY 1.4, 1.6), and both show on
gradients of entries ±s that are products of signs over the axes. These have rank one however axes are grouped into a matrix, as the
theory takes gradients to be, and there sign, msign and G/‖G‖ have one direction and differ in size only.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from scaling.errors import CannotMeasure
from scaling.observed import entries
from scaling.records import ScalingTable

__all__ = ["Response", "memberships", "optimizers_in", "responses"]

STEPS = 2
"""How often a copy is stepped, of which the last step is read off: ADOPT's first one moves nothing."""
WARM = 6
"""The same where the update is 0 or linear in the gradient: RAdam takes SGD's steps, or none, before its sixth."""
LARGE = 1024.0
"""The larger of the two sizes of gradient entries whose updates tell the degree; far above any ε."""
DECADES = 16
"""How many powers of ten the entries of the gradient span that tells rows and ε apart."""


@dataclass(frozen=True)
class Response:
    """How one block of a weight is updated at one width.

    `rate`: RMS entry of the update where the gradient's entries are ±1, continued by `degree` from larger ones. `apart`: whether each
    index of some axis (row, column) is updated by itself. `eps`: the size of gradient entries whose update is halved, 0 if none was seen.
    `decay`: the fraction of the weight decayed per step; `coupled`: whether lr multiplies it; `l2`: whether it instead goes through what
    is done to the gradient.
    """

    optimizer: str
    degree: sympy.Expr
    rate: float
    apart: bool
    eps: float
    decay: float
    coupled: bool
    l2: bool


# --- what `build` returned ----------------------------------------------------------------------------------------------------------


def optimizers_in(given: object) -> list[Any]:
    """The optimizers that `build` returned: one, several in a list, tuple or dict, or those that an object of the user's own holds.

    Raises:
        CannotMeasure: if there is none.
    """
    if isinstance(given, torch.optim.Optimizer):
        return [given]
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, (list, tuple)):
        return [one for part in given for one in optimizers_in(part)]
    held = [one for value in vars(given).values() for one in _held(value)] if hasattr(given, "__dict__") else []
    if held:
        return held
    if not (hasattr(given, "param_groups") and hasattr(given, "step")):
        what = f"build returned a {type(given).__name__} in place of an optimizer"
        raise CannotMeasure(what, "return model, optimizer; several optimizers as a list")
    return [given]


def _held(value: object) -> Iterator[torch.optim.Optimizer]:
    if isinstance(value, torch.optim.Optimizer):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _held(part)


def memberships(model: nn.Module, optimizers: Iterable[Any]) -> dict[str, tuple[str, ...]]:
    """Trainable weight -> the class of the optimizer of each param group that has it; () where none has it."""
    by_id = {id(weight): name for name, weight in model.named_parameters() if weight.requires_grad}
    found: dict[str, tuple[str, ...]] = dict.fromkeys(by_id.values(), ())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if id(weight) in by_id:
                    found[by_id[id(weight)]] += (type(optimizer).__name__,)
    return found


# --- trying it ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Move:
    """One weight before the last step, what the step did to it, and the gradient it was done with."""

    before: Tensor
    change: Tensor
    gradient: Tensor


Gradient = Callable[[Tensor], Tensor]


def responses(model: nn.Module, optimizers: Iterable[Any], table: ScalingTable, width: int) -> dict[str, tuple[Response, ...]]:
    """Weight -> one `Response` per block of its rule, at the width of this model. Model and optimizers are left as they are.

    Raises:
        CannotMeasure: if an optimizer cannot be stepped.
    """
    found: dict[str, tuple[Response, ...]] = {}
    names = {id(model.get_parameter(rule.name)): rule for rule in table}
    for optimizer in optimizers:
        members = [(i, w) for i, group in enumerate(optimizer.param_groups) for w in group["params"] if id(w) in names]
        alike: dict[tuple, Tensor] = {}
        for i, weight in members:
            alike.setdefault(_kind(i, weight), weight)
        tried = _try(optimizer, list(alike.values()))
        seen: dict[tuple, Response] = {}
        for i, weight in members:
            kind, rule, group = _kind(i, weight), names[id(weight)], optimizer.param_groups[i]
            for block in rule.blocks:
                if (kind, block.axes) not in seen:
                    part = partial(entries, block=block, width=width)
                    trial = tried[id(alike[kind])]
                    seen[kind, block.axes] = trial.response(type(optimizer).__name__, part, _beside(optimizer, group))
            found[rule.name] = tuple(seen[kind, block.axes] for block in rule.blocks)
    return found


def _kind(group: int, weight: Tensor) -> tuple:
    """Weights of one group and shape are updated alike; an update may depend on the weight's own size, as LARS's does."""
    size = float(weight.detach().double().square().mean().sqrt()) if weight.numel() else 0.0
    return group, tuple(weight.shape), round(2 * math.log2(size)) if 0 < size < math.inf else None


def _beside(optimizer: Any, group: Mapping[str, Any]) -> float:
    """The factor that a group only carries, and the training loop multiplies its lr by (nanoGPT-mup, Megatron): torch ignores it."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return 1.0
    return float(group.get("lr_scale", 1.0)) * float(group.get("lr_mult", 1.0))


@dataclass(frozen=True, eq=False)
class _Trial:
    """What was seen of one weight: steps on a zero gradient at lr and 2·lr, on gradients ±1 and ±LARGE, and on one of many sizes."""

    idle: _Move
    idle_twice: _Move
    small: _Move
    large: _Move
    spread: _Move

    def response(self, optimizer: str, part: Callable[[Tensor], Tensor], beside: float) -> Response:
        decay, l2 = self._decay()
        kept = 0.0 if l2 else decay

        def update(move: _Move) -> Tensor:
            return part(move.change + kept * move.before)

        small, large = (_rms(update(move)) for move in (self.small, self.large))
        if not math.isfinite(small + large + decay):
            what = f"a step of {optimizer} on a made-up gradient is not finite"
            raise CannotMeasure(what, "check what its options make of gradients of entries ±1")
        power = math.log(large / small) / math.log(LARGE) if small and large else 0.0
        degree = sympy.Rational(round(4 * power), 4)
        coupled = decay == 0 or abs(_along(self.idle_twice) / decay - 2) < 0.5
        eps = _eps(part(self.spread.gradient).abs(), update(self.spread).abs(), large) if degree == 0 and not l2 else 0.0
        return Response(
            optimizer=optimizer,
            degree=degree,
            rate=large / LARGE ** float(degree) * beside,
            apart=degree != 0 or _apart(self.spread, kept),
            eps=eps,
            decay=decay * (beside if coupled else 1.0),
            coupled=coupled,
            l2=l2,
        )

    def _decay(self) -> tuple[float, bool]:
        """The fraction decayed per step; and whether the step on a zero gradient is instead a full one: an L2 term, normalised."""
        share, change = _along(self.idle), _rms(self.idle.change)
        if _rms(self.idle.change + share * self.idle.before) <= 0.1 * change:
            return (share if share > 0 else 0.0), False
        return 0.0, change > 0.1 * _rms(self.large.change)


def _along(move: _Move) -> float:
    return float(-(move.change * move.before).sum() / move.before.square().sum())


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _eps(gradient: Tensor, update: Tensor, full: float) -> float:
    """The size of gradient entries at which half of the full update is left; 0 if entries do not go each by itself, or are too few."""
    if full == 0 or gradient.numel() < DECADES:
        return 0.0
    gradient, share = gradient.flatten(), update.flatten() / full
    high = share[gradient >= 0.1 * LARGE]
    if not len(high) or not 0.5 < float(high.median()) < 2:
        return 0.0
    between = (share > 0.02) & (share < 0.98)
    if bool(between.any()):
        return float((gradient[between] * (1 / share[between] - 1)).median())
    low = gradient[share <= 0.02]
    return float(low.max()) if len(low) else 0.0


def _apart(move: _Move, kept: float) -> bool:
    """Whether the indices of an axis whose gradients are of many sizes are all moved as far."""
    if move.change.ndim < 2:
        return True
    change = move.change + kept * move.before
    return any(_alike(move.gradient.movedim(axis, 0), change.movedim(axis, 0)) for axis, n in enumerate(change.shape) if n > 1)


def _alike(gradient: Tensor, change: Tensor) -> bool:
    sizes, moved = (values.flatten(1).norm(dim=1) for values in (gradient, change))
    moved = moved[sizes >= 1e-3 * sizes.max()]
    return len(moved) > 1 and bool(moved.min() > 0.5 * moved.max())


# --- gradients ----------------------------------------------------------------------------------------------------------------------


def _signs(weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    out = torch.ones(())
    for n in weight.shape:
        out = out.unsqueeze(-1) * (torch.randint(0, 2, (n,), generator=generator) * 2 - 1)
    return out.to(weight)


def _spread(weight: Tensor) -> Tensor:
    """Entries from LARGE down over DECADES powers of ten, still a product over the axes."""
    out = torch.full((), LARGE, dtype=torch.float64)
    long = [n for n in weight.shape if n > 1]
    for n in weight.shape:
        powers = torch.linspace(0, -DECADES / max(len(long), 1), n, dtype=torch.float64)
        out = out.unsqueeze(-1) * 10**powers
    return out.to(weight) * _signs(weight)


def _noise(weight: Tensor) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(weight)


GRADIENTS: tuple[Gradient, ...] = (_signs, lambda weight: LARGE * _signs(weight), _spread)


# --- copies -------------------------------------------------------------------------------------------------------------------------


def _try(optimizer: Any, chosen: Sequence[Tensor]) -> dict[int, _Trial]:
    """Id of a weight -> its trial. In double precision where the optimizer takes it."""
    failures = []
    ways = ((torch.float64, False), (torch.float32, False), (torch.float32, True))
    for dtype, closure in ways if chosen else ():
        try:
            idle, idle_twice = (_moves(optimizer, chosen, torch.zeros_like, dtype, closure=closure, start=_noise, lr=lr) for lr in (1, 2))
            seen = [_moves(optimizer, chosen, gradient, dtype, closure=closure) for gradient in GRADIENTS]
            cold = [w for w in chosen if not 0 < _rms(seen[1][id(w)].change) < LARGE**0.5 * _rms(seen[0][id(w)].change)]
            for moves, gradient in zip(seen, GRADIENTS, strict=True) if cold else ():
                moves |= _moves(optimizer, cold, gradient, dtype, closure=closure, steps=WARM)
            return {key: _Trial(idle[key], idle_twice[key], *(moves[key] for moves in seen)) for key in idle}
        except Exception as error:
            failures.append(error)
    if failures:
        what = f"a copy of {type(optimizer).__name__} could not be stepped: {type(failures[-1]).__name__}: {failures[-1]}"
        cure = "lint steps a copy of the optimizer on made-up gradients to see what it does; return one whose step() needs nothing else"
        raise CannotMeasure(what, cure) from failures[0]
    return {}


def _moves(
    optimizer: Any,
    chosen: Sequence[Tensor],
    gradient: Gradient,
    dtype: torch.dtype,
    *,
    closure: bool,
    start: Gradient | None = None,
    steps: int = STEPS,
    lr: int = 1,
) -> dict[int, _Move]:
    """What the last of some steps of a copy does to weights, at `lr` times its learning rate."""
    twin, copies = _copied(optimizer, dtype)
    for group in twin.param_groups if lr != 1 else ():
        if "lr" in group:
            group["lr"] = group["lr"] * lr
    weights = {id(weight): copies[id(weight)] for weight in chosen}
    gradients = {key: gradient(weight.detach()) for key, weight in weights.items()}
    if start is not None:
        for weight in weights.values():
            weight.data.copy_(start(weight.data))

    def step() -> dict[int, _Move]:
        for key, weight in weights.items():
            weight.grad = gradients[key].clone()
        before = {key: weight.detach().clone() for key, weight in weights.items()}
        twin.step(lambda: torch.zeros(())) if closure else twin.step()
        return {key: _Move(before[key], weight.detach() - before[key], gradients[key]) for key, weight in weights.items()}

    with torch.random.fork_rng(devices=[]):
        return [step() for _ in range(steps)][-1]


def _copied(optimizer: Any, dtype: torch.dtype) -> tuple[Any, Mapping[int, Tensor]]:
    """A copy of an optimizer, on copies of its weights: id of a weight -> its copy.

    `copy.deepcopy` would lose attributes: torch's Optimizer pickles only groups and state. A `step` that a scheduler has wrapped would
    step the original; hooks would, too. A warm-up that starts at 0 is undone.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    copies = {id(weight): nn.Parameter(weight.detach().to(dtype, copy=True)) for weight in weights if weight.is_floating_point()}
    twin = object.__new__(type(optimizer))
    memo: dict[int, Any] = {**copies, id(optimizer): twin}
    for key, value in vars(optimizer).items():
        if key == "step":
            continue
        try:
            twin.__dict__[key] = OrderedDict() if key.endswith("_hooks") else copy.deepcopy(value, memo)
        except Exception:  # what cannot be copied (a process group, a stream) is shared
            twin.__dict__[key] = value
    for group in twin.param_groups:
        if float(group.get("lr", 1.0)) == 0 and group.get("initial_lr"):
            group["lr"] = group["initial_lr"]
    if callable(getattr(twin, "train", None)):  # schedule-free optimizers have modes
        twin.train()
    for state in getattr(twin, "state", {}).values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
                state[key] = value.to(dtype)
    return twin, copies
