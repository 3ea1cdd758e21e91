"""Inputs made up for a model that came without: a first guess, then what the first consumer of each input says it must be."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from scaling.capture import Recording, record, unwrap
from scaling.errors import CannotMakeInputs, CaptureFailed
from scaling.huggingface import calls, with_placeholders

__all__ = ["Inputs", "made_up"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
BATCH, LENGTH = 2, 8
IMAGES = (32, 28, 64, 224, 96, 256)
ATTEMPTS = 24


def made_up(model: nn.Module) -> tuple[Inputs, Recording]:
    """Inputs on which the model runs, and the recording of that run.

    In this order: the model's `dummy_inputs`; what a Hugging Face model's `main_input_name` and config say; a dialogue with the model, in
    which the operator that fails tells what its input must be (linear: float features, embedding: int64 ids, conv2d: an image).

    Raises:
        CannotMakeInputs: with what was tried and how the last attempt ended.
    """
    with torch.device("cpu"):
        return _made_up(unwrap(model))


def _made_up(model: nn.Module) -> tuple[Inputs, Recording]:
    tried, last = [], ""
    for inputs in (*(((), call) for call in calls(model)), *_dummy(model)):
        for _ in range(4):  # again with the placeholders that an image or a sound needs
            try:
                return inputs, record(model, *inputs)
            except CaptureFailed as failure:
                tried.append(_described(inputs))
                last = failure.cause
                more = with_placeholders(model, inputs[1], last)
                if more is None:
                    break
                inputs = (), more
    features = dict.fromkeys(weight.shape[1] for weight in model.parameters() if weight.dim() == 2)
    guesses = tuple(shape for n in list(features)[:3] for shape in ((BATCH, LENGTH, n), (BATCH, n)))
    kernel = next((weight.shape for weight in model.parameters() if weight.dim() == 4), None)  # of a model that asks for its size first
    images = tuple((BATCH, kernel[1], n, n) for n in (*IMAGES, 160, 240, 299, 384)) if kernel is not None else ()
    wanted = [_Wanted(name, shapes=((BATCH, LENGTH), *guesses, (LENGTH,), *images)) for name in _required(model)]
    for _ in range(ATTEMPTS if wanted else 0):
        inputs = tuple(want.tensor() for want in wanted), {}
        try:
            return inputs, record(model, *inputs)
        except CaptureFailed as failure:
            tried.append(_described(inputs))
            last = failure.cause
            answered = _answered(wanted, getattr(failure, "last", None))
            if answered is None:
                break
            wanted = answered
    raise CannotMakeInputs(
        type(model).__name__, str(inspect.signature(model.forward)), tried[-3:], last or "it takes no tensor that could be guessed"
    )


def _described(inputs: Inputs) -> str:
    named = [*((None, value) for value in inputs[0]), *inputs[1].items()]
    shown = [f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" if isinstance(v, Tensor) else repr(v) for _, v in named]
    return ", ".join(f"{name}={value}" if name else value for (name, _), value in zip(named, shown, strict=True))


def _required(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]


# models that say it themselves


def _ids(*shape: int) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 3 + 1).reshape(shape)


def _dummy(model: nn.Module) -> Iterator[Inputs]:
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, dict):
        yield (), dict(dummy)
    elif isinstance(dummy, (tuple, list)):
        yield tuple(dummy), {}
    elif isinstance(dummy, Tensor):
        yield (dummy,), {}


# the dialogue


@dataclass(frozen=True)
class _Wanted:
    """What is known of one input: the shapes and dtype to try, in order."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    kind: str = ""
    integer: bool = False
    at: int = 0

    def tensor(self) -> Tensor:
        shape = self.shapes[self.at]
        return _ids(*shape) if self.integer else torch.zeros(shape)

    def told(self, kind: str, shapes: tuple[tuple[int, ...], ...], *, integer: bool = False) -> _Wanted:
        return replace(self, kind=kind, shapes=shapes, integer=integer, at=0)


def _answered(wanted: list[_Wanted], last: tuple[str, tuple[fx.Node, ...], str] | None) -> list[_Wanted] | None:
    """The wishes after an attempt that ended at the operator `last`; None if nothing is left to try."""
    if last is not None:
        _, nodes, name = last
        for node in nodes:
            index = _input_of(node)
            weights = [n for n in nodes if n.meta.get("names")]
            if index is not None and index < len(wanted) and weights:
                better = _from_consumer(wanted[index], name, weights[0].meta["val"])
                if better is not None and better.kind != wanted[index].kind:
                    return [*wanted[:index], better, *wanted[index + 1 :]]
    for index in reversed(range(len(wanted))):
        want = wanted[index]
        if want.at + 1 < len(want.shapes):
            return [*wanted[:index], replace(want, at=want.at + 1), *(replace(w, at=0) for w in wanted[index + 1 :])]
    return None


def _input_of(node: fx.Node) -> int | None:
    """The input that a value was made from by views alone."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return int(str(node.target).removeprefix("input_")) if node.op == "placeholder" else None


def _from_consumer(want: _Wanted, operator: str, weight: Tensor) -> _Wanted | None:
    shape = list(weight.shape)
    kind = f"{operator}{shape}"
    if operator in {"embedding", "embedding_bag"}:
        return want.told(kind, ((BATCH, LENGTH), (LENGTH,), (BATCH,)), integer=True)
    if operator in {"linear", "layer_norm", "rms_norm"}:
        return want.told(kind, tuple((*lead, shape[-1]) for lead in ((BATCH,), (BATCH, LENGTH), (BATCH, LENGTH, LENGTH))))
    if operator in {"addmm", "matmul", "mm", "bmm"} and len(shape) >= 2:
        return want.told(kind, ((BATCH, shape[-2]), (BATCH, LENGTH, shape[-2])))
    if operator.startswith("conv") and len(shape) > 2:
        channels = shape[0] if "transpose" in operator else shape[1]
        sizes = {1: ((64,), (1024,)), 2: tuple((n, n) for n in IMAGES), 3: ((16, 32, 32), (8, 64, 64))}[len(shape) - 2]
        return want.told(kind, tuple((BATCH, channels, *size) for size in sizes))
    if operator in {"batch_norm", "instance_norm", "group_norm"}:
        return want.told(kind, ((BATCH, *shape), *((BATCH, *shape, n, n) for n in IMAGES), (BATCH, *shape, 64)))
    if operator in {"lstm", "gru", "rnn_tanh", "rnn_relu"}:
        return want.told(kind, ((LENGTH, BATCH, shape[-1]),))
    return None
