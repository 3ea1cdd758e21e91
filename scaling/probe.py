"""What the modules of a model return, and what they return of the same inputs with the weights they began with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scaling.maps import full
from scaling.measured import module_of
from scaling.training import seeded

__all__ = ["Probe", "Seen", "changes", "neutral", "rms"]

PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.Size, type(None))


@dataclass
class Seen:
    """What a run returned: module (and call, and place in what it returns) -> tensor.

    `inherited` has what modules with weights of their own would have returned with all of those as at init, `without` with one of them:
    "head by weight", "head by bias".
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    inherited: dict[str, Tensor] = field(default_factory=dict)
    without: dict[str, Tensor] = field(default_factory=dict)

    @property
    def own(self) -> Iterator[tuple[str, float]]:
        """RMS of (W - W₀)x of every weight, x being what its module is given now."""
        for name, tensor in self.without.items():
            yield from ((name, size) for _, size in changes({name: tensor}, {name: self.outputs[module_of(name)]}))


class Probe:
    """A run of a model that is looked at: `run` makes it, `start` has its trainable weights as they were at init."""

    def __init__(self, model: nn.Module, run: Callable[[], object], start: Mapping[nn.Parameter, Tensor]) -> None:
        self.model, self.run, self.start = model, run, start
        self.playing = False
        self.fed: set[str] = set()

    def outputs(self) -> dict[str, Tensor]:
        """Every floating-point tensor with axes that a module returns."""
        return self._run({}).outputs

    def replayed(self) -> Seen:
        """The same, and what modules with trainable weights of their own return with those at init; after `outputs`.

        A weight is that of the innermost module around it that is given tensors. These modules are run again on what they are given now,
        random numbers and buffers included, if it is made of tensors and plain values: a cache would be written to twice.
        """
        owned: dict[str, dict[str, nn.Parameter]] = {}
        for path, weight in self.model.named_parameters(remove_duplicate=False):
            owner = path.rpartition(".")[0]
            while owner and owner not in self.fed:
                owner = owner.rpartition(".")[0]
            if weight in self.start and owner in self.fed:
                owned.setdefault(owner, {})[path[len(owner) + 1 :] if owner else path] = weight
        return self._run(owned)

    def _run(self, owned: Mapping[str, Mapping[str, nn.Parameter]]) -> Seen:
        seen = Seen()
        calls: Counter[str] = Counter()

        def label(name: str) -> str:
            return (name or "(model)") + (f" call {calls[name]}" if calls[name] > 1 else "")

        def before(name: str) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                if self.playing:
                    return
                calls[name] += 1
                if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
                    self.fed.add(name)
                if name not in owned or not _plain((args, kwargs)):
                    return
                inside = [weight for weight in module.parameters() if weight in self.start]
                every = self._with(module, args, kwargs, inside)
                seen.inherited.update((label(name) + path, tensor) for path, tensor in every.items())
                for local, weight in owned[name].items():
                    returned = self._with(module, args, kwargs, [weight]) if len(inside) > 1 else every
                    seen.without.update((f"{label(name)}{path} by {local}", tensor) for path, tensor in returned.items())

            return hook

        def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                if not self.playing:
                    seen.outputs.update((label(name) + path, tensor.detach().clone()) for path, tensor in _tensors(output))

            return hook

        handles = []
        for name, module in self.model.named_modules():
            # before the model's own hooks, which run in the replay too, and after them
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(after(name)))
        try:
            with neutral(self.model):
                self.run()
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _with(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], old: Iterable[nn.Parameter]) -> dict[str, Tensor]:
        """What a module returns with the given weights as at init: place -> tensor."""
        now = {weight: weight.detach().clone() for weight in old}
        self.playing = True
        try:
            with neutral(module, seed=None):
                for weight in now:
                    weight.copy_(self.start[weight])
                returned = module(*_copied(args), **_copied(kwargs))
                return {path: tensor.detach().clone() for path, tensor in _tensors(returned)}
        finally:
            self.playing = False
            with torch.no_grad():
                for weight, value in now.items():
                    weight.copy_(value)


@contextmanager
def neutral(model: nn.Module, seed: int | None = 0) -> Iterator[None]:
    """No gradients, random numbers that are the same each time (None: those that come next), and buffers (BatchNorm's statistics) put back.

    The caller's random state is as before.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), seeded(seed):
        yield
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def rms(tensor: Tensor) -> float:
    """√ of the mean of squares."""
    return float(full(tensor).square().mean().sqrt())


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """RMS of the difference of every tensor that is in both with the same shape; 0 where it is within rounding."""
    for name, old in before.items():
        if name in after and after[name].shape == old.shape:
            change, rounding = rms(full(after[name]) - full(old)), 4 * torch.finfo(old.dtype).eps * rms(old)
            yield name, 0.0 if change <= rounding else change


def _tensors(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.ndim and output.numel():
            yield path, output
    elif isinstance(output, (Mapping, tuple, list)):
        for key, value in output.items() if isinstance(output, Mapping) else enumerate(output):
            yield from _tensors(value, f"{path}[{key}]")


def _plain(value: Any) -> bool:
    """Whether a value is made of tensors and plain values, in tuples, lists and dicts."""
    if type(value) in {tuple, list, dict}:
        return all(map(_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (Tensor, *PLAIN))


def _copied(value: Any) -> Any:
    """The value with every tensor in it copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in {tuple, list}:
        return type(value)(map(_copied, value))
    return {key: _copied(part) for key, part in value.items()} if type(value) is dict else value
