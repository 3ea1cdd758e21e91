"""Inputs made up for a model that came without: a first guess, then what the first consumer of each input says it must be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from scaling.capture import Recording, record, unwrap
from scaling.errors import CannotMakeInputs, CaptureFailed
from scaling.graph import operator_name
from scaling.huggingface import calls, completed

__all__ = ["Inputs", "made_up"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
BATCH, LENGTH = 2, 8
IMAGES = (32, 28, 64, 224, 96, 256, 16)
VIDEOS = ((16, 32, 32), (8, 64, 64), (16, 224, 224))
ATTEMPTS = 32
UNPACKED = {
    3: ((BATCH, LENGTH, 64),),
    4: tuple((BATCH, channels, n, n) for n in IMAGES[:2] for channels in (3, 1, 4)),
    5: tuple((1, 3, *size) for size in VIDEOS),
}
"""Shapes of an input that is known by its number of axes alone."""


def made_up(model: nn.Module) -> tuple[Inputs, Recording]:
    """Inputs on which the model runs, and the recording of that run.

    In this order: what a Hugging Face model's `main_input_name` and config say; the model's `dummy_inputs`, Lightning's
    `example_input_array`, the `input_size` of timm's configs; a dialogue with the model, in which the operator that fails tells what its
    input must be (linear: float features, embedding: int64 ids, conv2d: an image).

    Raises:
        CannotMakeInputs: with what was tried and how the last attempt ended.
    """
    with torch.device("cpu"):
        return _made_up(unwrap(model))


def _made_up(model: nn.Module) -> tuple[Inputs, Recording]:
    tried, last, where = [], "", ""
    seen = set()
    for inputs in (*(((), call) for call in calls(model)), *_dummy(model)):
        for _ in range(ATTEMPTS):  # again with an image's placeholders, or with what was left out
            if (kind := frozenset(_shown(inputs))) in seen:
                break
            seen.add(kind)
            try:
                return inputs, record(model, *inputs)
            except CaptureFailed as failure:
                tried.append(_described(inputs))
                last, where = failure.cause, failure.where
                more = completed(model, inputs[1], failure, last)
                if more is None:
                    break
                inputs = (), more
    features = dict.fromkeys(weight.shape[1] for weight in model.parameters() if weight.dim() == 2)
    guesses = tuple(shape for n in list(features)[:3] for shape in ((BATCH, LENGTH, n), (BATCH, n)))
    kernel = next((weight.shape for weight in model.parameters() if weight.dim() == 4), None)  # of a model that asks for its size first
    images = tuple((BATCH, kernel[1], n, n) for n in (*IMAGES, 160, 240, 299, 384)) if kernel is not None else ()
    cube = next((weight.shape for weight in model.parameters() if weight.dim() == 5), None)
    videos = tuple((1, cube[1], *size) for size in VIDEOS) if cube is not None else ()
    wanted = [_Wanted(name, shapes=((BATCH, LENGTH), *guesses, (LENGTH,), (BATCH,), *videos, *images)) for name in _required(model)]
    for _ in range(ATTEMPTS if wanted else 0):
        inputs = tuple(want.tensor() for want in wanted), {}
        try:
            return inputs, record(model, *inputs)
        except CaptureFailed as failure:
            tried.append(_described(inputs, [want.name for want in wanted]))
            last, where = failure.cause, failure.where
            answered = _answered(wanted, getattr(failure, "last", None), last)
            if answered is None:
                break
            wanted = answered
    raise CannotMakeInputs(
        type(model).__name__,
        str(inspect.signature(model.forward)),
        tried[-3:],
        last or "it takes no tensor that could be guessed",
        where,
        _required(model),
    )


def _described(inputs: Inputs, names: Sequence[str] = ()) -> str:
    return ", ".join(_shown(inputs, names))


def _shown(inputs: Inputs, names: Sequence[str] = ()) -> list[str]:
    named = [*zip_longest(names[: len(inputs[0])], inputs[0]), *inputs[1].items()]
    shown = [f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" if isinstance(v, Tensor) else repr(v) for _, v in named]
    return [f"{name}={value}" if name else value for (name, _), value in zip(named, shown, strict=True)]


def _required(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]


# models that say it themselves


def _ids(*shape: int) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 3 + 1).reshape(shape)


def _dummy(model: nn.Module) -> Iterator[Inputs]:
    for dummy in (getattr(model, name, None) for name in ("dummy_inputs", "example_input_array")):
        if isinstance(dummy, dict):
            yield (), dict(dummy)
        elif isinstance(dummy, (tuple, list)):
            yield tuple(dummy), {}
        elif isinstance(dummy, Tensor):
            yield (dummy,), {}
    for config in (getattr(model, name, None) for name in ("pretrained_cfg", "default_cfg")):
        size = config.get("input_size") if isinstance(config, dict) else None
        if isinstance(size, (tuple, list)) and len(_required(model)) == 1:
            yield (torch.zeros(BATCH, *size),), {}


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
        if self.kind == INDICES:
            return _ids(*shape) % BATCH if len(shape) > 1 else torch.ones(shape, dtype=torch.long)  # rows that are there, lengths above 0
        return _ids(*shape) if self.integer else torch.zeros(shape)

    def told(self, kind: str, shapes: tuple[tuple[int, ...], ...], *, integer: bool = False) -> _Wanted:
        return replace(self, kind=kind, shapes=shapes, integer=integer, at=0)


INDICES = "indices"
SIZES = ("size of tensor", "Sizes of tensors", "same number of dimensions", "cannot be multiplied")
"""What torch says of operands whose sizes do not fit each other."""
INTEGERS = (
    "used as indices",
    "int64 for index",
    "tuple index out of range",
    "numpy() is not supported",
    "Length of all samples",
    "'lengths'",
)
"""What torch says where an input should have been integers: indices of rows, ids for NumPy, lengths."""


def _answered(wanted: list[_Wanted], last: tuple[str, tuple[fx.Node, ...], str] | None, said: str) -> list[_Wanted] | None:
    """The wishes after an attempt that ended at the operator `last` with these words; None if nothing is left to try."""
    told = (
        _told_by(wanted, last)
        or _told_by_sizes(wanted, said)
        or _told_by_neighbours(wanted, last, said)
        or _told_by_words(wanted, last, said)
        or _told_by_unpacking(wanted, said)
    )
    if told is not None:
        index, better = told
        return [*wanted[:index], better, *wanted[index + 1 :]]
    concerned = _concerned(wanted, last, said)
    for turn in dict.fromkeys((concerned, tuple(range(len(wanted))))):
        for index in reversed(turn):
            want = wanted[index]
            if want.at + 1 < len(want.shapes):
                later = {i for i in turn if i > index}
                stepped = [replace(w, at=0) if i in later else w for i, w in enumerate(wanted)]
                stepped[index] = replace(want, at=want.at + 1)
                return stepped
    return None


def _concerned(wanted: list[_Wanted], last: tuple[str, tuple[fx.Node, ...], str] | None, said: str) -> tuple[int, ...]:
    """The inputs that the operands of a failing operator were made from; all where the sizes of no operator are to blame."""
    if not any(text in said for text in SIZES):
        return tuple(range(len(wanted)))
    seen, todo = set(), list((last or ("", (), ""))[1])
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return tuple(sorted(i for node in seen if node.op == "placeholder" and (i := _input_of(node)) is not None and i < len(wanted)))


def _told_by(wanted: list[_Wanted], last: tuple[str, tuple[fx.Node, ...], str] | None) -> tuple[int, _Wanted] | None:
    """By the first operator that an input met: the weight beside it says the shape."""
    _, nodes, name = last or ("", (), "")
    weights = [node for node in nodes if node.meta.get("names")]
    for node in nodes:
        index = _input_of(node)
        if index is not None and index < len(wanted) and weights:
            better = _from_consumer(wanted[index], name, weights[0].meta["val"])
            if better is not None and better.kind != wanted[index].kind:
                return index, better
    return None


def _told_by_sizes(wanted: list[_Wanted], said: str) -> tuple[int, _Wanted] | None:
    """By a product that came out too long or short: features of which some are made (a position's sines) are as many times fewer."""
    found = re.search(r"cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)", said)
    if found is None:
        return None
    got, right = int(found[1]), int(found[2])
    for index, want in enumerate(wanted):
        shape = want.shapes[want.at]
        kind = f"{want.kind}, {right} features"
        if want.integer or len(shape) not in {1, 2, 3} or got % shape[-1] or right * shape[-1] % got or kind.count("features") > 2:
            continue
        features = right * shape[-1] // got
        if features != shape[-1]:
            return index, want.told(kind, ((BATCH, features), (BATCH, LENGTH, features)))
    return None


def _told_by_neighbours(wanted: list[_Wanted], last: tuple[str, tuple[fx.Node, ...], str] | None, said: str) -> tuple[int, _Wanted] | None:
    """By what an input is put beside: it is as long along every other axis, and as wide as a product further on lacks."""
    _, nodes, name = last or ("", (), "")
    more = 0
    lacks = re.search(r"cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)", said)
    if lacks is not None:
        nodes = next((tuple(node.all_input_nodes) for node in nodes if operator_name(node) == "aten.cat"), ())
        more = int(lacks[2]) - int(lacks[1])
    elif name != "cat" or not any(text in said for text in SIZES):
        return None
    beside = next((list(node.meta["val"].shape) for node in nodes if _input_of(node) is None), None)
    if not beside:
        return None
    for node in nodes:
        index = _input_of(node)
        if index is None or index >= len(wanted) or wanted[index].integer or wanted[index].kind.count("beside") > 1:
            continue
        have = wanted[index].shapes[wanted[index].at]
        shape = (*beside[:-1], have[-1] + more)
        if shape[-1] > 0 and shape != have:
            return index, wanted[index].told(f"{wanted[index].kind} beside {beside}", (shape,))
    return None


def _told_by_unpacking(wanted: list[_Wanted], said: str) -> tuple[int, _Wanted] | None:
    """By a shape that is unpacked into more names than it has axes: four are those of an image, five those of a video."""
    found = re.search(r"not enough values to unpack \(expected (\d), got (\d)\)", said)
    if found is None:
        return None
    axes, had = int(found[1]), int(found[2])
    for index, want in enumerate(wanted):
        shapes = tuple(shape for shape in want.shapes if len(shape) == axes) or UNPACKED.get(axes)
        if shapes and not want.kind and len(want.shapes[want.at]) == had:
            return index, want.told(f"{axes} axes", shapes)
    return None


def _told_by_words(wanted: list[_Wanted], last: tuple[str, tuple[fx.Node, ...], str] | None, said: str) -> tuple[int, _Wanted] | None:
    """By an error that asks for integers: the input at that operator, or the last one that nothing is known of."""
    if not any(text in said for text in INTEGERS):
        return None
    at = [index for node in (last or ("", (), ""))[1] if (index := _input_of(node)) is not None and index < len(wanted)]
    unknown = [index for index in reversed(range(len(wanted))) if not wanted[index].kind]
    for index in (*reversed(at), *unknown):
        if not wanted[index].integer:
            return index, wanted[index].told(INDICES, ((BATCH, LENGTH), (LENGTH,), (BATCH,)), integer=True)
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
        sizes = {1: ((64,), (1024,)), 2: tuple((n, n) for n in IMAGES), 3: VIDEOS}[len(shape) - 2]
        return want.told(kind, tuple((BATCH, channels, *size) for size in sizes))
    if operator in {"batch_norm", "instance_norm", "group_norm"}:
        return want.told(kind, ((BATCH, *shape), *((BATCH, *shape, n, n) for n in IMAGES), (BATCH, *shape, 64)))
    if operator in {"lstm", "gru", "rnn_tanh", "rnn_relu"}:
        return want.told(kind, ((LENGTH, BATCH, shape[-1]),))
    return None
