"""What is computed in the precision it states, wherever it is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["outside_autocast"]

P = ParamSpec("P")
R = TypeVar("R")

DEVICES = ("cpu", "cuda", "xpu", "mps")


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function without autocast, which would round the operands of its products to half precision.

    Training loops often have all of a step, the optimizer's too, within `torch.autocast`.
    """

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return outside(*args, **kwargs)
        return function(*args, **kwargs)

    return outside
