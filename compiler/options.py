"""The options of a parameter group: their defaults, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable
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

__all__ = ["NEW_OPTIONS", "check_group"]

NEW_OPTIONS: dict[str, Any] = {
    "update": "momentum",
    "map": "msign",
    "weight_decay": 0.0,
    "momentum": 0.95,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "clip": 1.0,
    "lr_factor": 1.0,
    "wd_factor": 1.0,
    "eps_factor": 1.0,
    "clip_factor": 1.0,
    "norm_factor": 1.0,
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
    "lr_factor": (0, math.inf),
    "wd_factor": (0, math.inf),
    "eps_factor": (0, math.inf),
    "clip_factor": (0, math.inf),
    "norm_factor": (0, math.inf),
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


def check_group(group: dict[str, Any]) -> None:
    """Refuse a parameter group that makes no sense.

    Raises:
        BadOption: for an option out of range.
        UnknownName: for an unknown name.
        NotAMatrix: for a weight under a map that is not a matrix, or not real.
        NotShardable: for a weight that lies over ranks in a way that is not supported.
    """
    for block in group["blocks"] or ({},):
        _check_options({**group, **block})
    names = group.get("param_names", [f"number {i} of its group" for i in range(len(group["params"]))])
    for name, W in zip(names, group["params"], strict=True):
        if not W.is_floating_point():
            raise NotAMatrix(W.shape, f"weight {name}, {W.dtype},", "only real floating point weights can be updated")
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


def _check_options(o: dict[str, Any]) -> None:
    for name, known in CHOICES.items():
        if o[name] not in known:
            raise UnknownName(name, o[name], [str(x) for x in known])
    for name in ("lr", "weight_decay"):
        if isinstance(o[name], Tensor) and o[name].numel() != 1:
            raise BadOption(name, o[name], f"a tensor {name} has one element")
    for name, (low, high) in RANGES.items():
        if isinstance(o[name], str) or not low <= float(o[name]) < high:  # as YAML reads 1e-3
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
