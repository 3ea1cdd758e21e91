"""Short training runs of the user's own models, the same for the same seed: what every measurement is made of."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.errors import CannotMeasure
from scaling.records import Record

__all__ = ["Environment", "Loss", "Optimizer", "Saved", "backward", "built", "cross_entropy", "seeded", "update"]

Loss = Callable[[nn.Module, Any], Tensor]


class Optimizer(Protocol):
    """What is asked of an optimizer: `torch.optim.Optimizer`, or anything that has these."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> Any:
        """Clears the gradients."""

    def step(self) -> Any:
        """Updates the weights."""


class Saved(Record):
    """What was measured: it can be written as JSON and read again."""

    def to_json(self) -> str:
        """All of it as JSON; `from_json` is the inverse."""
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote.

        Raises:
            pydantic.ValidationError: if the text is not one.
        """
        return cls.model_validate_json(text)


class Environment(Record):
    """Where numbers were measured."""

    torch: str
    python: str
    machine: str
    device: str
    commit: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The environment of a model: its first weight's device."""
        device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(torch=torch.__version__, python=platform.python_version(), machine=platform.platform(), device=name)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """The generators of torch start from `seed` inside (None: where they are), and go on outside as if nothing had happened."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def built(build: Callable[..., object], *args: float) -> tuple[nn.Module, Optimizer]:
    """`build(*args)`, which must be a pair (model, optimizer).

    Raises:
        CannotMeasure: if it is not.
    """
    pair = build(*args)
    if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], nn.Module) and hasattr(pair[1], "step"):
        return cast("tuple[nn.Module, Optimizer]", pair)
    kind = f"({', '.join(type(one).__name__ for one in pair)})" if isinstance(pair, tuple) else f"a {type(pair).__name__}"
    what = f"build({', '.join(map(str, args))}) returned {kind}, not a pair (model, optimizer)"
    raise CannotMeasure(what, "return model, optimizer")


def backward(model: nn.Module, optimizer: Optimizer, batch: Any, loss: Loss) -> Tensor:
    """Writes the batch's gradients, and only them, to the weights. The loss, detached."""
    optimizer.zero_grad()
    value = loss(model, batch)
    value.backward()
    return value.detach()


def update(model: nn.Module, optimizer: Optimizer, batch: Any, loss: Loss) -> Tensor:
    """One step of training. The loss before it, detached."""
    value = backward(model, optimizer, batch, loss)
    optimizer.step()
    return value


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The loss where none is given: `batch` is `(input, target)`, and `model(input)` has the classes (..., C) on its last axis.

    Raises:
        CannotMeasure: if the batch or the model's output is anything else.
    """
    cure = "pass loss=lambda model, batch: ..."
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise CannotMeasure("a batch is not a pair of tensors (input, target)", cure)
    inputs, target = batch
    output = model(inputs)
    if not isinstance(output, Tensor) or target.is_floating_point() or output.shape[:-1] != target.shape:
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        what = f"cross entropy wants logits (..., classes) and integer targets (...), not {given} and {target.dtype} {tuple(target.shape)}"
        raise CannotMeasure(what, cure)
    return F.cross_entropy(output.flatten(0, -2), target.flatten())
