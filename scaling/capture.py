"""Any nn.Module -> one fx graph of ATen operators; the only file that knows how torch traces.

One run of the model is recorded by a dispatch mode, under inference mode so that `linear`, `einsum`, `scaled_dot_product_attention`
stay whole operators. Float tensors are fake (no memory, no arithmetic); ints and bools are real, so that Python control flow on token
ids, masks and positions just works. An int or bool that would depend on a float (a router's top-k) is made up, and counted.
"""

from __future__ import annotations

import copy
import linecache
import math
import operator
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from scaling.errors import CaptureFailed
from scaling.kept import Kept, kept
from scaling.operators import written_out
from scaling.records import Source

__all__ = ["Recording", "record", "unwrap"]

aten = torch.ops.aten

SAME_VALUE = {
    "alias",
    "clone",
    "contiguous",
    "detach",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "lift_fresh",
    "to",
    "_to_copy",
    "type_as",
}
"""Operators that hand their first input on: no node, so that graphs of several widths agree."""

PLACED = {"slice": aten.slice_scatter.default, "select": aten.select_scatter.default}
"""Views of a part, and what a write into them makes of the whole: `out[:, :k] = a` is a value of `out`."""

LOOPS = 512
"""Made-up answers at one line of the user's file after which others are given: a loop that ends where a float says so must end (and one
over each of a few hundred detections not change its mind)."""

OUTSIDE = (
    "what is computed outside of torch (NumPy, ctypes) cannot be followed: compute it with torch operators, make it a"
    " torch.library.custom_op, or hand it in as an input"
)
LEFT_TORCH = ("numpy() is not supported", "Cannot access data pointer")
"""What torch says of a tensor without data that is asked for it."""
INSIDE = (
    "the forward differentiates, and it is recorded without gradients: derive the module whose output it differentiates, with that module's"
    " own inputs (its weights are the same ones, so the table is this model's too)"
)
WITHOUT_GRADIENTS = ("does not require grad", "requires_grad=True on inference tensor", "Inference tensors cannot be saved for backward")
"""What torch says of a gradient asked for where none is kept."""
CURES = ((OUTSIDE, LEFT_TORCH), (INSIDE, WITHOUT_GRADIENTS))

PYTHON_VALUES = {"item": float, "_local_scalar_dense": float, "is_nonzero": bool, "equal": bool, "allclose": bool}
"""Operators that hand a Python number to the forward: made up from what a comparison is taken to say."""

REAL_LIMIT = 2**22
"""Elements up to which a float tensor that a factory makes is kept real (`linspace(...).tolist()` works on it)."""

REAL_MOST = 2**28
"""Elements beyond which a result on real tensors is not computed."""

_PLAIN = (int, float, str, complex, type(None), torch.Size, torch.dtype, torch.device)
_TORCH = f"{Path(str(torch.__file__)).parent}{os.sep}"  # and not torchvision
_HERE = str(Path(__file__).parent)


@dataclass(frozen=True)
class Recording:
    """One run of a model: `graph` has placeholders (inputs), get_attr (weights, buffers, constants) and ATen operators.

    On every node: `meta["val"]` (a fake or meta tensor, or a tuple), `meta["source"]`; on a weight's: `meta["names"]`, `meta["trainable"]`.
    `made_up` counts the ints that would have depended on floats; `names` has the model's parameters in its own order.
    """

    graph: fx.Graph
    made_up: int
    model: str
    names: tuple[str, ...]


@dataclass
class _State:
    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[int, fx.Node] = field(default_factory=dict)
    storages: dict[int, fx.Node] = field(default_factory=dict)
    views: dict[int, tuple[Tensor, str, tuple, dict]] = field(default_factory=dict)
    keep: list[Tensor] = field(default_factory=list)
    made_up: int = 0
    modules: list[str] = field(default_factory=list)
    last: tuple[str, tuple[fx.Node, ...], str] | None = None


def record(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Recording:
    """Records one run of `model(*args, **kwargs)`.

    The model is as it was afterwards: weights, buffers, training flags, RNG. Trainable weights that the run does not use are looked for
    again with every made-up comparison False, then in training mode, and the runs are one graph.

    Raises:
        CaptureFailed: if the model's forward raises; with the line of the user's file.
    """
    model = unwrap(model)
    with kept(model, args, kwargs) as before, _Swapped(model, before) as swapped:
        state = _first_that_runs(model, swapped, args, kwargs)
        if state.made_up and _unused(model, state):
            _once_more(model, swapped, state, args, kwargs, truth=False)
        if _unused(model, state):  # heads that only run in training
            for module in model.modules():
                module.training = True
            _once_more(model, swapped, state, args, kwargs, truth=True)
    state.graph.lint()
    names = tuple(name for name, _ in model.named_parameters())
    return Recording(graph=state.graph, made_up=state.made_up, model=type(model).__name__, names=names)


def _unused(model: nn.Module, state: _State) -> bool:
    used = {name for node in state.graph.nodes if node.users for name in node.meta.get("names", ())}
    return any(weight.requires_grad and name not in used for name, weight in model.named_parameters())


def _once_more(model: nn.Module, swapped: _Swapped, state: _State, args: Sequence[Any], kwargs: dict[str, Any], *, truth: bool) -> None:
    """A second run into the same graph, for weights that the first did not reach; one that raises has nothing to add."""
    before, made_up, stored = set(state.graph.nodes), state.made_up, dict(state.storages)
    try:
        with torch.inference_mode():
            _run(model, swapped, state, args, kwargs, truth=truth)
    except Exception:  # whatever the user's forward raises
        for node in reversed(state.graph.nodes):
            if node not in before:
                state.graph.erase_node(node)
        state.nodes = {key: node for key, node in state.nodes.items() if node in before}
        state.made_up, state.storages = made_up, stored


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module below `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None
        )
        if inner is None:
            return model
        model = inner


def _first_that_runs(model: nn.Module, swapped: _Swapped, args: Sequence[Any], kwargs: dict[str, Any]) -> _State:
    first: Exception | None = None
    for mode in (torch.inference_mode, torch.no_grad):  # the second for autograd inside forward
        state = _State()
        try:
            with mode():
                _run(model, swapped, state, args, kwargs, truth=True)
        except Exception as error:  # whatever the user's forward raises
            first = first or _failed(model, error, state)
        else:
            return state
    assert first is not None
    raise first


def _failed(model: nn.Module, error: Exception, state: _State) -> Exception:
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    users = [place for place in frames if not place[0].startswith((_TORCH, _HERE))] or frames
    file, line = users[-1]
    failure = CaptureFailed(
        type(model).__name__,
        f"{file}:{line}: {linecache.getline(file, line).strip()}",
        f"{type(error).__name__}: {error}",
        **next(({"cure": cure} for cure, texts in CURES if any(text in str(error) for text in texts)), {}),
    )
    failure.__cause__ = error
    failure.last = state.last  # pyright: ignore[reportAttributeAccessIssue] - what inputs.py learns the first consumers from
    return failure


def _run(model: nn.Module, swapped: _Swapped, state: _State, args: Sequence[Any], kwargs: dict[str, Any], *, truth: bool) -> None:
    recorder = _Recorder(swapped, state, truth=truth)
    inputs = _mapped(recorder.placeholder, (tuple(args), dict(kwargs)))
    with recorder, _module_paths(model, state.modules):
        output = model(*inputs[0], **inputs[1])
    before: list[fx.Node] = []
    for old in [node for node in state.graph.nodes if node.op == "output"]:
        before += old.all_input_nodes
        state.graph.erase_node(old)
    results = tuple(dict.fromkeys([*before, *(state.nodes[id(tensor)] for tensor in _tensors(output) if id(tensor) in state.nodes)]))
    node = state.graph.output(results)
    node.meta["val"] = tuple(result.meta["val"] for result in results)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with every tensor replaced, in copies of the objects (dataclasses) that hold one."""

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if any(isinstance(x, Tensor) for x in getattr(leaf, "__dict__", {}).values()) and not isinstance(leaf, (type, nn.Module)):
            leaf = copy.copy(leaf)
            vars(leaf).update({name: replaced(x) for name, x in vars(leaf).items()})
        return leaf

    return tree_map(replaced, value)


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and depth < 3 and not isinstance(leaf, (type, nn.Module)):
            yield from _tensors(vars(leaf), depth + 1)


class _Swapped:
    """Context: every float parameter and buffer of the model is a fake CPU tensor, every other buffer a copy; undone on exit."""

    def __init__(self, model: nn.Module, kept: Kept) -> None:
        self.model, self.kept = model, kept
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.replacements: dict[int, Tensor] = {}
        self.attributes: dict[int, tuple[tuple[str, ...], bool, bool]] = {}
        self.numbers: dict[int, float] = {}
        self._undo: list[tuple[dict[str, Any], str, Tensor]] = []

    def __enter__(self) -> _Swapped:
        names: dict[int, list[str]] = {}
        for collect in (self.model.named_parameters, self.model.named_buffers):
            for name, tensor in collect(remove_duplicate=False):
                names.setdefault(id(tensor), []).append(name)
        for module in self.model.modules():
            for table in cast("tuple[dict[str, Any], ...]", (module._parameters, module._buffers)):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    self._undo.append((table, name, tensor))
                    is_weight = table is module._parameters
                    if id(tensor) not in self.replacements:
                        self.replacements[id(tensor)] = self._replacement(tensor, is_weight=is_weight)
                        vars(self.replacements[id(tensor)]).update(vars(tensor))  # what others keep on a weight (mup's infshape)
                    new = self.replacements[id(tensor)]
                    self.attributes[id(new)] = tuple(names.get(id(tensor), (name,))), is_weight, is_weight and tensor.requires_grad
                    if not is_weight and tensor.numel() == 1 and tensor.is_floating_point() and not tensor.is_meta:
                        self.numbers[id(new)] = float(tensor)  # a scale kept in a buffer
                    table[name] = new
        return self

    def _replacement(self, tensor: Tensor, *, is_weight: bool) -> Tensor:
        if not tensor.is_floating_point() and not tensor.is_complex():
            return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().to("cpu", copy=True)
        fake = self.faked(tensor)
        return nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_weight else fake

    def faked(self, tensor: Tensor) -> Tensor:
        with self.fake:
            if tensor.layout != torch.strided:
                return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    def __exit__(self, *_: object) -> None:
        for table, name, tensor in self._undo:
            table[name] = tensor


class _Recorder(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, swapped: _Swapped, state: _State, *, truth: bool) -> None:
        super().__init__()
        self.swapped, self.state, self.truth = swapped, state, truth
        self.fake = swapped.fake
        self.inputs = 0
        self.answers: Counter[tuple[str, int]] = Counter()

    # nodes of tensors

    def placeholder(self, tensor: Tensor) -> Tensor:
        is_float = tensor.is_floating_point() or tensor.is_complex()
        value = self.swapped.faked(tensor) if is_float else tensor.detach().to("cpu", copy=True)
        known = [node for node in self.state.graph.nodes if node.op == "placeholder"]
        index, self.inputs = self.inputs, self.inputs + 1
        if index < len(known):  # a second run: the same inputs again
            return self._bind(value, known[index])
        return self._bind(value, self._described(self.state.graph.placeholder(f"input_{index}"), value))

    def _bind(self, tensor: Tensor, node: fx.Node) -> Tensor:
        self.state.nodes[id(tensor)] = node
        self.state.keep.append(tensor)
        return tensor

    def _described(self, node: fx.Node, value: Any) -> fx.Node:
        source = _source(self.state.modules[-1] if self.state.modules else "")
        node.meta.update(val=value, source=source, stack_trace=f'File "{source.file}", line {source.line}\n    {source.code}')
        return node

    def _attribute(self, target: str, value: Tensor) -> fx.Node:
        graph = self.state.graph
        first = next(iter(graph.nodes), None)
        with graph.inserting_before(first) if first is not None else graph.inserting_after(None):
            node = graph.create_node("get_attr", target)
        return self._described(node, value)

    @staticmethod
    def _storage(tensor: Tensor) -> int:
        try:
            return tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return 0

    def _node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self.state.nodes:
            return self.state.nodes[id(tensor)]
        storage = self._storage(tensor)
        if not isinstance(tensor, FakeTensor) and storage in self.state.storages:
            written = self.state.storages[storage]
            if written.meta["val"].shape == tensor.shape:
                return written
            seen = self.state.graph.call_function(aten.as_strided.default, (written, list(tensor.shape), list(tensor.stride())))
            self._bind(tensor, self._described(seen, tensor))  # another view of what was written in place
            return seen
        names, is_weight, trainable = self.swapped.attributes.get(id(tensor), ((), False, False))
        node = self._attribute(names[0] if names else f"constant_{len(self.state.graph.nodes)}", tensor)
        node.meta.update(
            names=names if is_weight else (), trainable=trainable, constant=not names, number=self.swapped.numbers.get(id(tensor))
        )
        self._bind(tensor, node)
        return node

    # running

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        args, kwargs = _over_tensors(self._ours, args), _over_tensors(self._ours, kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        inputs: list[Tensor] = []
        _over_tensors(inputs.append, (args, kwargs))
        if not any(isinstance(tensor, FakeTensor) or self._storage(tensor) in self.state.storages for tensor in inputs):
            return self._real(func, args, kwargs)
        nodes = tuple(self._node(tensor) for tensor in inputs)
        name = _name(func)
        self.state.last = (str(func), nodes, name)
        others = None if name in SAME_VALUE else written_out(func)
        if others is not None:
            with self:
                return others(*args, **kwargs)
        written = _written(func, args)
        if written is not None:
            self._wholes(written)
        shape = () if written is None else tuple(written.shape)
        output = self._execute(func, args, kwargs)
        if written is not None and tuple(written.shape) != shape:
            self._keep_shape(written, shape)
        if written is None and name in SAME_VALUE and isinstance(output, Tensor) and _is_float(output):
            return self._bind(output, nodes[0]) if output is not inputs[0] else output
        output = self._record(func, args, kwargs, output, written)
        self._view(name, args, kwargs, output)
        if written is not None and id(written) in self.state.nodes:
            self._placed(written)
        return output

    def _view(self, name: str, args: tuple, kwargs: dict, output: Any) -> None:
        """Notes of which value the output is a part."""
        if name in PLACED and isinstance(output, Tensor) and _is_float(output):
            self.state.views[id(output)] = args[0], name, args[1:], kwargs
            self.state.keep += [args[0], output]

    def _wholes(self, part: Tensor) -> None:
        """Gives the values that a part belongs to their nodes before it is written: of a constant, as it was made."""
        while id(part) in self.state.views:
            part = self.state.views[id(part)][0]
            self._node(part)

    def _placed(self, part: Tensor) -> None:
        """The values that a written part belongs to, with it in place."""
        while id(part) in self.state.views:
            whole, name, where, kwargs = self.state.views[id(part)]
            node = self.state.graph.call_function(PLACED[name], (self._node(whole), self.state.nodes[id(part)], *where), kwargs)
            self._bind(whole, self._described(node, whole))
            if not isinstance(whole, FakeTensor):
                self.state.storages[self._storage(whole)] = node
            part = whole

    def _keep_shape(self, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """What was recorded of a tensor before `squeeze_` or `t_` gave it another shape."""
        with self.fake:
            before = torch.empty(shape, dtype=tensor.dtype, device="cpu")
        for node in self.state.graph.nodes:
            if node.meta.get("val") is tensor:
                node.meta["val"] = before

    def _ours(self, tensor: Tensor) -> Tensor:
        """The stand-in of a weight that reached an operator past the swap (an LSTM's flat weights), or of a meta constant."""
        if id(tensor) in self.swapped.replacements:
            return self.swapped.replacements[id(tensor)]
        if tensor.is_meta and not isinstance(tensor, FakeTensor):
            fake = self.swapped.replacements[id(tensor)] = self.swapped.faked(tensor)
            self.state.keep += [tensor, fake]
            return fake
        return tensor

    def _real(self, func: Any, args: tuple, kwargs: dict) -> Any:
        for tensor in _all_written(func, args, kwargs):
            self.swapped.kept.before_write(tensor)
        size = args[0] if args else kwargs.get("size")
        if (
            isinstance(size, (list, tuple))
            and size
            and all(isinstance(n, int) for n in size)
            and torch.Size(size).numel() > REAL_LIMIT
            and not func._schema.is_mutable
        ):
            with self.fake:
                output = func(*args, **kwargs)
            if isinstance(output, Tensor) and _is_float(output):
                return output
        made = self._too_large(func, args, kwargs)
        if made is not None:
            return made
        output = func(*args, **kwargs)
        self._view(_name(func), args, kwargs, output)
        return output

    def _too_large(self, func: Any, args: tuple, kwargs: dict) -> Tensor | None:
        """One made-up entry in the shape of a result that would not fit (a mask of all pairs of pixels)."""
        sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if math.prod(sizes) <= REAL_MOST or func._schema.is_mutable:
            return None
        fake_args, fake_kwargs = tree_map_only(Tensor, self.swapped.faked, (args, kwargs))
        try:
            with self.fake:
                output = func(*fake_args, **fake_kwargs)
        except DynamicOutputShapeException:  # what a mask picks out is no larger than what it picks from
            return None
        if not isinstance(output, Tensor) or output.numel() <= REAL_MOST:
            return None
        if _is_float(output):
            return output
        self.state.made_up += 1
        return torch.full((), int(self.truth), dtype=output.dtype).expand(output.shape)

    def _execute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if _name(func) in PYTHON_VALUES:
            self.state.made_up += 1
            kind = PYTHON_VALUES[_name(func)]
            return self._answer(self.truth) if kind is bool else self._number()
        try:
            with self.fake:
                output = func(*args, **kwargs)
        except Exception:  # a fake kernel stricter than the real one, or none
            known = self._by_shape(func, args)
            output = self._on_ones(func, args, kwargs) if known is None else known
        if not isinstance(output, (Tensor, tuple, list)):
            return output
        return _over_tensors(lambda tensor: self._value(func, args, kwargs, tensor), output)

    def _asked(self) -> int:
        """How many made-up answers above LOOPS this line of the user's was given."""
        source = _source("")
        self.answers[source.file, source.line] += 1
        asked = self.answers[source.file, source.line] - LOOPS
        if asked > 2 * LOOPS:
            message = "a loop here ends by a float that is not known while the model is recorded, and no answer ended it"
            raise RuntimeError(message)
        return asked

    def _answer(self, usual: bool) -> bool:
        return usual if self._asked() <= 0 else not usual

    def _number(self) -> float:
        """1.0 or 0.0; in a loop that goes on, the other one and then ones beyond any threshold."""
        asked = self._asked()
        return float(self.truth) if asked <= 0 else (float(not self.truth), 1e30, -1e30)[(asked - 1) % 3]

    def _by_shape(self, func: Any, args: tuple) -> Tensor | None:
        """Grouped products, whose kernels want bfloat16: (rows, k) × (experts, k, n) -> (rows, n)."""
        if _name(func) not in {"_grouped_mm", "grouped_mm"} or (args[0].dim(), args[1].dim()) != (2, 3):
            return None
        with self.fake:
            return torch.empty(args[0].shape[0], args[1].shape[2], dtype=args[0].dtype, device="cpu")

    def _on_ones(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Runs the real kernel once on ones and takes the shapes; re-raises where that fails too."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if sum(tensor.numel() for tensor in tensors) > 2**27:
            with self.fake:
                return func(*args, **kwargs)
        real = tree_map_only(Tensor, lambda t: torch.ones(t.shape, dtype=t.dtype) if isinstance(t, FakeTensor) else t, (args, kwargs))
        output = func(*real[0], **real[1])
        return tree_map_only(Tensor, lambda t: self.swapped.faked(t) if _is_float(t) else t, output)

    def _value(self, func: Any, args: tuple, kwargs: dict, tensor: Tensor) -> Tensor:
        """The tensor itself, or a made-up real one where an int or bool follows from floats."""
        if _is_float(tensor) or not isinstance(tensor, FakeTensor):
            return tensor
        shape, dtype, name = tuple(tensor.shape), tensor.dtype, _name(func)
        if "zeros" in name or "empty" in name:
            return torch.zeros(shape, dtype=dtype)
        if "ones" in name:
            return torch.ones(shape, dtype=dtype)
        if "full" in name:
            return torch.full(shape, next(a for a in args if isinstance(a, (int, float, bool))), dtype=dtype)
        self.state.made_up += 1
        if dtype == torch.bool:
            return torch.full(shape, self._answer(self.truth and name not in {"isnan", "isinf", "ne"}), dtype=dtype)
        if name in {"topk", "sort", "argsort"} and shape and tensor.numel():
            source = args[0].shape
            axis = args[2] if name == "topk" and len(args) > 2 else kwargs.get("dim", -1)
            n, k = source[axis] or 1, shape[axis]
            rows = torch.arange(tensor.numel() // max(k, 1)).reshape([*shape[:axis], *shape[axis:][1:]] if axis != -1 else shape[:-1])
            ranks = torch.arange(1, k + 1)  # from 1: forwards divide by an index (a period is the length over a frequency)
            return ((rows.unsqueeze(axis) * k + ranks.reshape([k] + [1] * (len(shape) - 1 - axis % len(shape)))) % n).to(dtype)
        return torch.zeros(shape, dtype=dtype)

    def _record(self, func: Any, args: tuple, kwargs: dict, output: Any, written: Tensor | None) -> Any:
        values = (output,) if isinstance(output, Tensor) else [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not any(_is_float(value) for value in values):
            return output
        node = self.state.graph.call_function(func, _over_tensors(self._node, args), _over_tensors(self._node, kwargs))
        self._described(node, output)
        if written is not None:
            self.state.nodes[id(written)] = node
            self.state.keep.append(written)
            if not isinstance(written, FakeTensor):
                self.state.storages[self._storage(written)] = node
            return output
        if isinstance(output, Tensor):
            self._bind(output, node)
            return output
        for index, value in enumerate(output):
            if isinstance(value, Tensor) and _is_float(value):
                part = self.state.graph.call_function(operator.getitem, (node, index))
                self._bind(value, self._described(part, value))
        return output


def _over_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """What an operator takes or gives, with the function of every tensor; a pytree's map takes five times as long."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in {list, tuple}:
        return type(value)([_over_tensors(function, item) for item in value])
    if type(value) is dict:
        return {key: _over_tensors(function, item) for key, item in value.items()}
    return value if isinstance(value, _PLAIN) else tree_map_only(Tensor, function, value)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _name(func: Any) -> str:
    return func._schema.name.split("::")[-1].rstrip("_") if hasattr(func, "_schema") else str(func)


def _written(func: Any, args: tuple) -> Tensor | None:
    """The tensor that an in-place operator writes."""
    if not hasattr(func, "_schema") or not func._schema.is_mutable:
        return None
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
            return value
    return None


def _all_written(func: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    if not hasattr(func, "_schema") or not func._schema.is_mutable:
        return
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


# where in the user's file


def _source(module: str) -> Source:
    """The innermost line of the module's own code; a helper of another installed package (einops) is passed over for its caller."""
    frame: FrameType | None = sys._getframe(1)
    inside: list[FrameType] = []
    fallback: tuple[str, int] | None = None
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if (file == __file__ and name == "_run") or (inside and file.startswith(_TORCH) and name == "_call_impl"):
            break
        if not file.startswith((_TORCH, _HERE, "<")):
            inside.append(frame)
        elif not inside and fallback is None and file.startswith(_TORCH) and "/nn/" in file and name != "_call_impl":
            fallback = (file, frame.f_lineno)
        frame = frame.f_back
    if not inside:
        return _line(*(fallback or ("<model>", 0)), module)
    forward = next((frame for frame in reversed(inside) if frame.f_code.co_name == "forward"), inside[-1])
    own = next(frame for frame in inside if _package(frame) == _package(forward))
    return _line(own.f_code.co_filename, own.f_lineno, module)


def _package(frame: FrameType) -> str:
    """The installed package of a frame's file; "" for the user's own files."""
    _, installed, path = frame.f_code.co_filename.rpartition(f"site-packages{os.sep}")
    return path.partition(os.sep)[0] if installed else ""


def _line(file: str, line: int, module: str) -> Source:
    return Source(file=file, line=line, code=linecache.getline(file, line).strip(), module=module)


@contextmanager
def _module_paths(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keeps the dotted path of the module whose forward runs on top of `stack`."""
    paths = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(paths.get(id(module), ""))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        stack.pop()

    handles = (
        torch_module.register_module_forward_pre_hook(enter),
        torch_module.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        stack.clear()
