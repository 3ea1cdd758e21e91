"""The record of one hand-written model and the few layers that many of them share."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Handwritten:
    """`build(d)` makes the model, `inputs(d)` its positional arguments.

    `roles` is read from the model by hand: "role: pattern pattern …" lines; the first pattern that fits a name counts. `unreached` names
    the weights that no forward can reach.
    """

    build: Callable[[int], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    roles: str
    unreached: tuple[str, ...] = ()
    kwargs: Callable[[int], dict[str, Any]] = lambda d: {}

    def role(self, name: str) -> str:
        """The role of a weight, by the first pattern that fits."""
        for line in self.roles.strip().splitlines():
            role, patterns = line.split(":")
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split()):
                return role.strip()
        raise KeyError(name)


def tokens(*shape, below=11):
    """Token ids of the given shape, all below `below`."""
    return (torch.arange(torch.Size(shape).numel()) * 7 % below).reshape(shape)


def floats(*shape):
    """A float input: capture never looks at its values."""
    return torch.zeros(shape)


class Ends(nn.Module):
    """inputs -> d -> the inner module -> d -> outputs: what turns a layer into a model."""

    def __init__(self, d, inner, inputs=7, outputs=5):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(inputs, d), inner, nn.Linear(d, outputs)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


ENDS = """
input: first.weight
output: last.weight
scalar: last.bias
vector: first.bias
"""


def between(inner, shape=(3, 6, 7), roles="", **more):
    """An entry whose inner module maps (…, d) to (…, d)."""
    return Handwritten(lambda d: Ends(d, inner(d)), lambda d: (floats(*shape),), ENDS + roles, **more)
