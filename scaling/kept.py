"""What a forward changes beside its result, and how it is put back.

Attributes, containers and plain tensors of the model and of its inputs; training flags, random states, torch's settings.
"""

from __future__ import annotations

import logging
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

__all__ = ["Kept", "kept", "random_states_kept"]

DEPTH, LENGTH = 6, 10_000
"""Objects are followed this many attributes deep; longer containers are data, not the state of a model."""


class Kept:
    """The objects that a model and its inputs are made of, as they were when this was made."""

    def __init__(self, *roots: Any) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._storages: set[int] = set()
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: set[int] = set()
        level = [part for root in roots for part in (*(root.modules() if isinstance(root, nn.Module) else ()), root)]
        for _ in range(DEPTH + 1):  # all of one level first: what is seen is seen from the nearest
            level = [held for value in level for held in self._visited(value)]

    def before_write(self, tensor: Tensor) -> None:
        """To be called before a real tensor is written in place: one of the user's is copied first."""
        storage = _storage(tensor)
        if storage in self._storages and storage not in self._written:
            self._written[storage] = tensor, tensor.detach().clone()

    def restore(self) -> None:
        """Puts everything back."""
        for container, before in self._containers:
            _put_back(container, before)
        with torch.no_grad():
            for tensor, before in self._written.values():
                tensor.copy_(before)

    def _visited(self, value: Any) -> Iterable[Any]:
        """What a value that was not seen yet holds."""
        if id(value) in self._seen:
            return ()
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._storages.add(_storage(value))
        elif isinstance(value, (dict, list, set, deque)):
            if len(value) <= LENGTH:
                self._containers.append((value, value.copy()))
                return tuple(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, tuple):
            return value
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, _OTHER):
            return self._visited(vars(value))
        return ()


_OTHER = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, torch.dtype, torch.device)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def _put_back(container: Any, before: Any) -> None:
    if isinstance(container, dict):
        if len(container) != len(before) or any(container.get(key, container) is not value for key, value in before.items()):
            container.clear()
            container.update(before)
    elif isinstance(container, set):
        if container != before:
            container.clear()
            container |= before
    elif len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
        container.clear()
        container.extend(before)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's generators (on the CPU) go on afterwards as if nothing had happened."""
    numpy = sys.modules.get("numpy")
    python, other = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(other)


def _as_it_is(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
    """In place of moving and casting a module in a forward (an expert to the device of its tokens): the weights stand in as they are."""
    return module


@contextmanager
def kept(model: nn.Module, *inputs: Any) -> Iterator[Kept]:
    """Inside, the model is in eval mode, seeded, with torch's fused attention path off; afterwards all is as it was."""
    found = Kept(model, *inputs)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    noisy = logging.getLogger("torch._subclasses.fake_tensor")  # it logs what a failing operator then raises
    with ExitStack() as stack:
        stack.callback(noisy.setLevel, noisy.level)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        stack.callback(found.restore)
        noisy.setLevel(logging.CRITICAL)
        stack.enter_context(random_states_kept())
        random.seed(0)  # layers that are dropped at random are the same ones at every width
        torch.manual_seed(0)
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _as_it_is))
        for module in model.modules():
            module.training = False
        yield found
