"""The options of a parameter group: their defaults, and what is refused."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from compiler.blocks import check_axes
from compiler.coefficients import SCHEDULES
from compiler.distributed import TRAVEL
from compiler.errors import BadOption, NotAMatrix
from compiler.maps import MAPS
from compiler.shards import sharding_of
from compiler.updates import UPDATES
from scaling.errors import UnknownName

__all__ = [
    "NEW_OPTIONS",
    "SCHEDULED",
    "check_group",
    "check_names",
    "check_options",
    "check_scheduled",
    "in_plain_numbers",
    "names_of",
    "warn_of_scales_in",
]

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
    "capturable": False,
    "master": False,
    "workspace": 2**30,
    "blocks": None,
}
"""What a group, or a checkpoint from before an option existed, gets by default."""

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
    "workspace": (0, math.inf),
}
"""Option -> [from, below)."""

CHOICES: dict[str, Iterable[Any]] = {
    "update": UPDATES,
    "map": (*MAPS, None),
    "accuracy": SCHEDULES,
    "nonfinite": ("skip", "raise"),
    "travel": TRAVEL,
}

SWITCHES = ("strict", "maximize", "capturable", "master")

SCHEDULED = ("lr", "weight_decay")
"""What a schedule writes, and may be a tensor."""

WHOLE = ("nonfinite", "maximize", "capturable", "master", "workspace", "blocks")
"""Options of a weight that no block has for itself."""


def check_group(group: dict[str, Any]) -> None:
    """Refuse a parameter group that makes no sense.

    Raises:
        BadOption: for an option out of range.
        UnknownName: for an unknown name.
        NotAMatrix: for a weight under a map that is not a matrix, or not real.
        NotShardable: for a weight that lies over ranks in a way that is not supported.
    """
    check_options(group)
    for name in SCHEDULED:
        if isinstance(group[name], Tensor):
            _check_range(name, float(group[name].detach()))
    for name, W in zip(names_of(group), group["params"], strict=True):
        if not W.is_floating_point() or torch.finfo(W.dtype).bits < 16:
            raise NotAMatrix(W.shape, f"weight {name}, {W.dtype},", "only real floating point weights of 16 bits or more can be updated")
        if group["master"] and W.dtype == torch.float16:
            raise BadOption("master", group["master"], f"weight {name} is fp16: keep it in fp32 under autocast, or in bf16")
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


def names_of(group: dict[str, Any]) -> list[str]:
    """The names of its weights, for errors."""
    return group.get("param_names") or [f"number {i} of its group" for i in range(len(group["params"]))]


def check_options(group: dict[str, Any]) -> None:
    """Refuse options, of a group or a block of it, that make no sense; what a tensor holds is not asked.

    Raises:
        BadOption: for an option out of range.
        UnknownName: for an unknown name.
    """
    for block in group["blocks"] or ({},):
        for key in block:
            if key != "axes" and (key not in ("lr", *NEW_OPTIONS) or key in WHOLE):
                raise UnknownName("option of a block", key, ["axes", "lr", *(name for name in NEW_OPTIONS if name not in WHOLE)])
        _check_values({**group, **block})


def check_scheduled(group: dict[str, Any]) -> None:
    """Refuse an lr or weight decay that a schedule has written and that makes no sense; what a tensor holds is not asked."""
    for name in SCHEDULED:
        if not isinstance(group[name], Tensor):
            _check_range(name, group[name])


def warn_of_scales_in(groups: Sequence[dict[str, Any]]) -> None:
    """Say so where rates were multiplied by lr_scale outside, as timm's schedulers, MAE and many loops do where a group has that key."""
    rates = [(group["lr"], group["lr_scale"]) for group in groups]
    if len({lr for lr, _ in rates if not isinstance(lr, Tensor)}) < 2 or any(isinstance(lr, Tensor) or scale == 0 for lr, scale in rates):
        return
    nominal = [lr / scale for lr, scale in rates]
    if max(nominal) - min(nominal) < 1e-6 * max(nominal):
        message = (
            "every group's lr is multiplied by its lr_scale already, and step() does that once more: write the same lr into all groups"
        )
        warnings.warn(message, stacklevel=6)  # past what torch wraps step() in


def check_names(group: dict[str, Any]) -> None:
    """Refuse a misspelt option, or one of torch's optimizers that is on; a group may hold what else its owner likes.

    Raises:
        UnknownName: for such a name.
    """
    known = ["lr", *NEW_OPTIONS]
    for key, value in group.items():
        if key in (*known, "params", "param_names"):
            continue
        if key == "process_group" or (key in _torchs_options() and value) or get_close_matches(key, known, cutoff=0.85):
            raise UnknownName("option of a group", key, known)


@cache
def _torchs_options() -> frozenset[str]:
    classes = [value for value in vars(torch.optim).values() if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)]
    return frozenset(name for cls in classes for name in inspect.signature(cls).parameters)


def in_plain_numbers(o: dict[str, Any]) -> dict[str, Any]:
    """The options that are numbers of another kind (numpy's, sympy's), as floats: a checkpoint should load without these packages."""
    return {name: float(o[name]) for name in RANGES if name in o and type(o[name]) not in (int, float) and not isinstance(o[name], Tensor)}


def _check_values(o: dict[str, Any]) -> None:
    for name, known in CHOICES.items():
        if o[name] not in tuple(known):
            raise UnknownName(name, o[name], [str(x) for x in known])
    for name in SWITCHES:
        if not isinstance(o[name], int) or o[name] not in (0, 1):
            raise BadOption(name, o[name], "True or False")
    for name in RANGES:
        if name not in SCHEDULED or not isinstance(o[name], Tensor):
            _check_range(name, o[name])
        elif o[name].numel() != 1:
            raise BadOption(name, o[name], f"a tensor {name} has one element")
    betas = o["betas"]
    if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(isinstance(beta, Real) and 0 <= beta < 1 for beta in betas):  # pyright: ignore[reportOperatorIssue]
        raise BadOption("betas", betas, "two numbers in [0, 1)")


def _check_range(name: str, value: Any) -> None:
    low, high = RANGES[name]
    if not isinstance(value, Real) or not low <= float(value) < high:
        raise BadOption(name, value, f"a finite number of at least {low:g}" if high == math.inf else f"a number in [{low:g}, {high:g})")


def _check_blocks(name: str, blocks: list[dict[str, Any]], W: Tensor) -> None:
    taken = 0
    for block in blocks:
        check_axes(block["axes"], W.shape)
        taken += math.prod(stop - start for axis in block["axes"] for _, _, start, stop in axis)
    if taken != W.numel():
        raise BadOption("blocks", [block["axes"] for block in blocks], f"they hold {taken} of the {W.numel()} entries of weight {name}")
