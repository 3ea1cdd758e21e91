"""Operators that move, pick or keep values: views, slices, lookups, pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from scaling.graph import SPLITS, Call
from scaling.orders import NOTHING, ZERO, Exponent, Pieces, State, joined, plus, top
from scaling.propagation.context import LARGEST, Context, Result, Values, largest, shape_of
from scaling.propagation.pointwise import even_bounded

__all__ = ["glu", "kept", "lookup", "moves"]


TAKES = {"getitem", "aten.select", "aten.slice", "aten.narrow"}


def _run(call: Call, tensors: dict[fx.Node, Tensor]) -> Tensor | None:
    """The operator itself on labels in place of its tensor arguments; None where it does not run on them."""
    node = call.node

    def given(n: fx.Node) -> Any:
        return tensors[n] if n in tensors else n.meta["val"]

    try:
        if call.name == "getitem":
            source, index = node.args[0], node.args[1]
            assert isinstance(source, fx.Node)
            assert isinstance(index, int)
            target: Any = source.target
            inner = dict.fromkeys(source.all_input_nodes[:1], tensors[source])
            arguments = fx.map_arg((source.args, source.kwargs), lambda n: inner.get(n, n.meta["val"]))
            return target(*arguments[0], **arguments[1])[index]  # pyright: ignore
        arguments = fx.map_arg((node.args, node.kwargs), given)
        function: Any = node.target
        out = function(*arguments[0], **arguments[1])  # pyright: ignore
    except (RuntimeError, TypeError, NotImplementedError, ValueError, IndexError):
        return None
    return out if isinstance(out, Tensor) and tuple(out.shape) == shape_of(call) else None


def moves(context: Context, call: Call, values: Values) -> Result | None:
    """view, permute, cat, slice, …: the operator itself tells where the parts go."""
    sources = [(node, value) for node, value in zip(call.tensors, values, strict=True) if value is not None and node is not None]
    if not sources:
        return None
    if call.name in SPLITS or call.name == "aten.unbind":  # its parts are taken by getitem
        x = sources[0][1]
        return x, lambda d: [d, *(None for _ in values[1:])]
    sources = [(n, v) for n, v in sources if _is_source(n)]
    states: list[State] = []
    labels: dict[fx.Node, Tensor] = {}
    for node, value in sources:
        own = torch.zeros((), dtype=torch.int16) if value.labels is None else value.labels
        labels.setdefault(node, (own + len(states)).expand(_source_shape(node)))
        states += [_taken(call, state) for state in value.parts]
    if len(states) == 1 or len(set(states)) == 1:
        out = Pieces.of(states[0])
    else:
        ran = _run(call, labels)
        out = Pieces.of(joined(states)) if ran is None else Pieces.labelled(states, ran)

    def pull(d: Pieces[Exponent]) -> list[Pieces[Exponent] | None]:
        return [_moved_back(call, node, d) if node in labels else None for node in call.tensors]

    return out, pull


def _is_source(node: fx.Node) -> bool:
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        return any(map(_is_float, value))
    return _is_float(value)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _source_shape(node: fx.Node) -> tuple[int, ...]:
    """A value's shape; of a split, that of what is split."""
    value = node.meta["val"] if isinstance(node.meta["val"], Tensor) else node.all_input_nodes[0].meta["val"]
    return tuple(value.shape)


def _taken(call: Call, state: State) -> State:
    """What a part of a value comes from: that part of the weight's rows."""
    if call.name not in TAKES:
        return state
    if call.name == "getitem":
        part: tuple = ("part", call.node.args[1])
    else:
        part = (call.name, call.get("dim"), call.get("index", None), call.get("start", None), call.get("end", call.get("length", None)))
    return State(state.init, state.mean, state.change, state.after, frozenset((name, (*path, part)) for name, path in state.roots))


def _moved_back(call: Call, node: fx.Node | None, d: Pieces[Exponent]) -> Pieces[Exponent]:
    """The gradient of a source: where an entry went nowhere it is nothing."""
    assert node is not None
    shape = _source_shape(node)
    count = math.prod(shape)
    if (
        (d.labels is None and call.name not in TAKES and call.name not in {"aten.cat", "aten.stack"})
        or count > LARGEST
        or d.parts == (None,)
    ):
        return Pieces.of(d.whole(largest))
    index = torch.arange(1, count + 1).reshape(shape)
    others = {n: torch.zeros(_source_shape(n), dtype=index.dtype) for n in call.node.all_input_nodes if n is not node and _is_source(n)}
    went = _run(call, {node: index, **others})
    if went is None or None in d.parts:
        return Pieces.of(d.whole(largest))
    ranked = sorted({NOTHING, *d.parts})  # pyright: ignore[reportArgumentType]
    rank = torch.tensor([ranked.index(e) for e in d.parts])
    at = rank[0].expand(went.shape) if d.labels is None else rank[d.labels.long()]
    arrived = torch.zeros(count + 1, dtype=torch.long).scatter_reduce(0, went.reshape(-1), at.reshape(-1), "amax")[1:]
    return Pieces.labelled(ranked, arrived.reshape(shape))


def kept(context: Context, call: Call, values: Values) -> Result | None:
    """Pooling, interpolation, padding, cumulative sums over axes that do not grow."""
    x, node = values[0], call.tensors[0]
    if x is None or node is None or context.orders(node) != context.orders(call.node):
        return None
    out = x if x.labels is None else Pieces.of(x.whole(joined))
    return out, lambda d: [Pieces.of(d.whole(largest)), *(None for _ in values[1:])]


def lookup(context: Context, call: Call, values: Values) -> Result | None:
    """Entries chosen by indices: as large as where they come from."""
    table = values[0]
    if table is None:
        return None
    out = table if table.labels is None else Pieces.of(table.whole(joined))
    if table.labels is not None and table.labels.dim() == 2 and bool((table.labels == table.labels[0]).all()):
        out = Pieces.labelled(table.parts, table.labels[0].expand(shape_of(call)))
    return out, lambda d: [Pieces.of(d.whole(largest)), *(None for _ in values[1:])]


def glu(context: Context, call: Call, values: Values) -> Result | None:
    """Half of the value times the sigmoid of the other half."""
    x = values[0]
    if x is None:
        return None
    state = x.whole(joined)
    gate = even_bounded(state)[0]
    out = State.of(plus(state.init, gate.init), state.mean, top(plus(state.change, gate.init), plus(state.init, gate.change)), state.roots)
    return Pieces.of(out), lambda d: [Pieces.of(plus(d.whole(largest), top(ZERO, state.after)))]
