"""What a state dict must be to be loaded, and what is loaded of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compiler.bits import LOW
from compiler.errors import BadState
from compiler.options import NEW_OPTIONS, check_group
from compiler.shards import local
from compiler.updates import BUFFERS

__all__ = ["check_state", "exactly", "without_gaps"]

Groups = Sequence[Mapping[str, Any]]

SHAPED = ("momentum_buffer", LOW, *(name for names in BUFFERS.values() for name in names))
"""State of the weight's shape."""


def check_state(state_dict: Mapping[str, Any], groups: Groups) -> None:
    """Refuse what was saved by another class, or for other weights; torch itself compares the numbers of groups and weights.

    Raises:
        BadState: for such a state. BadOption, UnknownName, NotAMatrix: for options that make no sense for these weights.
    """
    saved = state_dict["param_groups"]
    for group in saved:
        if missing := [name for name in ("update", "map") if name not in group]:
            strange = sorted(set(group) - {"params", "param_names", "lr", *NEW_OPTIONS})
            what = f"this is not the state of a SpectralOptimizer: a group is without {' and '.join(missing)}"
            cure = "load it into an optimizer of the class that saved it, or begin with a new state"
            raise BadState(f"{what}, but has {', '.join(strange)}" if strange else what, cure)
    theirs, ours = _names(saved), _names(groups)
    if theirs != ours and sorted(theirs) == sorted(ours):
        what = "the state was saved for these weights in another order, and torch loads by position"
        raise BadState(what, "use torch.distributed.checkpoint.state_dict, which goes by name, to save and to load")
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        return
    for theirs, ours in zip(saved, groups, strict=True):
        check_group({**NEW_OPTIONS, **ours, **theirs, "params": ours["params"]})
    for key, W in _pairs(state_dict, groups):
        for name, value in state_dict["state"].get(key, {}).items():
            if name in SHAPED and value.shape != W.shape:
                what = f"{name} of weight number {key} has shape {tuple(value.shape)}, the weight {tuple(W.shape)}"
                raise BadState(what, "build model and groups as when it was saved")


def without_gaps(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Without the empty dicts that torch.distributed.checkpoint's flattened form has for what was not saved, as it was not there yet."""
    kept = {key: {name: value for name, value in state.items() if value != {}} for key, state in state_dict["state"].items()}
    return {**state_dict, "state": {key: state for key, state in kept.items() if state}}


def exactly(
    state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]], scheduled: Groups
) -> None:
    """Undo that torch has cast the loaded state to the dtype of its weight, and has it share memory with the state dict.

    `scheduled` are lr and weight decay of every group from before: a step that was compiled for a tensor would be compiled anew for
    every float, and a tensor on a CPU cannot be captured on another device.
    """
    for group, before in zip(groups, scheduled, strict=True):
        for name, value in before.items():
            group[name] = torch.full_like(value, float(group[name])) if isinstance(value, Tensor) else float(group[name])
    for key, W in _pairs(state_dict, groups):
        for name, value in state_dict["state"].get(key, {}).items():
            now = state[W].get(name)
            if not isinstance(value, Tensor) or not isinstance(now, Tensor):
                continue
            if now.dtype != value.dtype or local(now).data_ptr() == local(value).data_ptr():
                state[W][name] = value.to(now.device, copy=True)


def _names(groups: Groups) -> list[str]:
    return [name for group in groups for name in group.get("param_names", ())]


def _pairs(state_dict: Mapping[str, Any], groups: Groups) -> Iterator[tuple[Any, Tensor]]:
    """The key of each weight in a state dict, and the weight."""
    for theirs, ours in zip(state_dict["param_groups"], groups, strict=True):
        yield from zip(theirs["params"], ours["params"], strict=True)
