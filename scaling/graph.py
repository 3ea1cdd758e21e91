"""fx graph -> networkx.DiGraph of operators, weights and inputs; several widths of one model become one graph with several shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import networkx as nx
from torch import Tensor, fx

from scaling.errors import GraphsDiffer
from scaling.records import Source

if TYPE_CHECKING:  # the recorder asks the table of operators, which asks for calls
    from scaling.capture import Recording

__all__ = ["Call", "LayerGraph", "Size", "align", "name_of", "operator_name"]

Size = tuple[int, ...]
"""The length of one axis, at each width the model was recorded at."""


@dataclass(frozen=True, eq=False)
class Call:
    """One node, seen at every width: an operator, a weight, an input or a constant."""

    nodes: tuple[fx.Node, ...]
    values: tuple[Any, ...]

    @property
    def node(self) -> fx.Node:
        """The node at the first width."""
        return self.nodes[0]

    @property
    def name(self) -> str:
        """The operator without overload ("aten.linear"), or the target of an input or weight."""
        return operator_name(self.node)

    @property
    def source(self) -> Source:
        """The user's line."""
        return self.node.meta["source"]

    @property
    def names(self) -> tuple[str, ...]:
        """All names of a weight; () for anything else."""
        return self.node.meta.get("names", ())

    @cached_property
    def shape(self) -> tuple[Size, ...]:
        """The shape of the value (of its first tensor, where there are several), an axis as its length at each width."""
        tensors = [value if isinstance(value, Tensor) else next((v for v in value if isinstance(v, Tensor)), None) for value in self.values]
        return tuple(zip(*(tuple(int(n) for n in tensor.shape) for tensor in tensors if tensor is not None), strict=True))

    @cached_property
    def arguments(self) -> dict[str, tuple[Any, ...]]:
        """Argument name -> its value at each width, defaults filled in."""
        schema = getattr(self.node.target, "_schema", None)
        if schema is None:
            return {str(i): tuple(node.args[i] for node in self.nodes) for i in range(len(self.node.args))}
        out = {}
        for position, argument in enumerate(schema.arguments):
            out[argument.name] = tuple(
                node.kwargs.get(argument.name, node.args[position] if position < len(node.args) else argument.default_value)
                for node in self.nodes
            )
        return out

    def get(self, name: str, default: Any = None) -> Any:
        """An argument at the first width."""
        return self.arguments.get(name, (default,))[0]

    def over_widths(self, name: str) -> tuple[Any, ...]:
        """An argument at every width."""
        return self.arguments[name]

    @cached_property
    def tensors(self) -> tuple[fx.Node | None, ...]:
        """The tensor arguments in the schema's order, None where an optional one is absent."""
        schema = getattr(self.node.target, "_schema", None)
        if schema is None:
            return tuple(argument for argument in self.node.args if isinstance(argument, fx.Node))
        out: list[fx.Node | None] = []
        for argument in schema.arguments:
            value = self.get(argument.name)
            if "Tensor[]" in str(argument.type) or (isinstance(value, (list, tuple)) and any(isinstance(x, fx.Node) for x in value)):
                out += [x for x in value if isinstance(x, fx.Node) or x is None]
            elif "Tensor" in str(argument.type):
                out.append(value if isinstance(value, fx.Node) else None)
        return tuple(out)


def operator_name(node: fx.Node) -> str:
    """The operator's name without overload: "aten.linear"."""
    return name_of(node.target)


def name_of(target: Any) -> str:
    """The same, of what a node calls."""
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        namespace, name = packet._qualified_op_name.split("::")
        return f"{namespace}.{name.rstrip('_') if not name.startswith('_') else name}"
    return getattr(target, "__name__", str(target))


COMBINE = {
    *(f"aten.{name}" for name in ("add", "sub", "mul", "div", "matmul", "mm", "bmm", "mv", "dot", "vdot", "outer", "einsum")),
    *(f"aten.{name}" for name in ("subtract", "multiply", "divide", "maximum", "minimum", "where", "lerp")),
    *(f"aten.{name}" for name in ("_weight_norm", "linalg_solve", "linalg_solve_triangular", "linalg_householder_product")),
    *(f"aten.{name}" for name in ("expand_as", "view_as", "reshape_as", "type_as")),  # F.normalize: the norm in the shape of the weight
}
"""Operators that make one weight out of several: weight and spectral norm, rows of length 1, merged adapters."""

SPLITS = {f"aten.{prefix}{name}" for prefix in ("", "unsafe_") for name in ("split", "split_with_sizes", "chunk")} | {"aten.tensor_split"}
"""Operators that take a value apart along one axis."""

GATHERED = {*(f"aten.{name}" for name in ("stack", "cat", "concat", "concatenate"))}
"""Operators that put weights beside each other: a bank of them, rows or columns of one matrix. Each keeps its own entries."""

LOOKUPS = {"aten.embedding", "aten.embedding_bag", "aten.index_select"}
BATCHED = {"aten.bmm", "aten.matmul"}
CONTRACT = {*(f"aten.{name}" for name in ("linear", "matmul", "mm", "bmm", "einsum", "conv1d", "conv2d", "conv3d"))}
"""Operators that give data if a weight meets a constant in them: the sines of positions, a grid of coordinates."""


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """The layer graph. `digraph` has the fx nodes of the first width; `calls` has each of them at every width, in execution order."""

    digraph: nx.DiGraph
    calls: dict[fx.Node, Call]
    outputs: tuple[fx.Node, ...]
    recordings: tuple[Recording, ...]

    @cached_property
    def weights(self) -> tuple[Call, ...]:
        """The weights that some operator consumes, in the model's order."""
        order = {name: i for i, name in enumerate(self.recordings[0].names)}
        return tuple(sorted((call for call in self.calls.values() if call.names), key=lambda call: order.get(call.names[0], len(order))))

    @cached_property
    def data(self) -> frozenset[fx.Node]:
        """Nodes whose value follows from an input, or from a weight that has been used."""
        return frozenset(node for node, kind in self._kinds.items() if kind == "data")

    def made_of(self, node: fx.Node) -> dict[Call, tuple[fx.Node, ...]]:
        """The weights that a weight-only node is made of, each with the nodes from it to here; the main one (W in W + B·A) first."""
        if self.calls[node].names:
            return {self.calls[node]: (node,)}
        if (row := self._row_taken_apart(node)) is not None:
            inside, way = row
            return {weight: (*path, *way) for source in inside for weight, path in self.made_of(source).items()}
        inputs = sorted((n for n in node.all_input_nodes if n in self.weight_only), key=lambda n: _count(n) != _count(node))
        out: dict[Call, tuple[fx.Node, ...]] = {}
        for source in inputs:
            for weight, path in self.made_of(source).items():
                out.setdefault(weight, (*path, node))
        return out

    def mains(self, node: fx.Node) -> tuple[Call, ...]:
        """The weights whose entries a weight-only node has: all that are put beside each other, W alone of W + B·A."""
        if (row := self._row_taken_apart(node)) is not None:
            return tuple(dict.fromkeys(weight for source in row[0] for weight in self.mains(source)))
        if operator_name(node) in GATHERED:
            beside = (n for n in node.all_input_nodes if n in self.weight_only)
            return tuple(dict.fromkeys(weight for n in beside for weight in self.mains(n)))
        main = next(iter(self.made_of(node)))
        source = next((n for n in node.all_input_nodes if n in self.weight_only and main in self.made_of(n)), None)
        return (main,) if source is None else self.mains(source)

    def _row_taken_apart(self, node: fx.Node) -> tuple[list[fx.Node], tuple[fx.Node, ...]] | None:
        """Of vectors put in one row and taken apart again (the biases of q, k and v): those in this part, and the nodes on the way here."""
        split = node.all_input_nodes[0] if operator_name(node) == "getitem" else None
        if split is None or operator_name(split) not in SPLITS:
            return None
        row, index = split.all_input_nodes[0], node.args[1]
        if operator_name(row) not in GATHERED or row.meta["val"].dim() != 1 or not isinstance(index, int):
            return None
        begin = sum(len(part) for part in split.meta["val"][:index])
        end, start, inside = begin + len(node.meta["val"]), 0, []
        for source in row.all_input_nodes:
            stop = start + len(source.meta["val"])
            if start < end and begin < stop and source in self.weight_only:
                inside.append(source)
            start = stop
        return (inside, (row, split, node)) if inside else None

    @cached_property
    def weight_only(self) -> frozenset[fx.Node]:
        """Weights, and what is made of weights before data is met: a view, a cast, -exp(A_log), g·v/‖v‖, W + B·A, a stack."""
        return frozenset(node for node, kind in self._kinds.items() if kind == "weight")

    @cached_property
    def live(self) -> frozenset[fx.Node]:
        """Nodes that an output follows from; all of them where no output is a float tensor."""
        found, todo = set(self.outputs), list(self.outputs)
        while todo:
            for node in todo.pop().all_input_nodes:
                if node not in found:
                    found.add(node)
                    todo.append(node)
        return frozenset(found or self.calls)

    @cached_property
    def _kinds(self) -> dict[fx.Node, str]:
        kinds: dict[fx.Node, str] = {}
        for node, call in self.calls.items():
            if node.op == "placeholder":
                kinds[node] = "data"
            elif node.op == "get_attr":
                kinds[node] = "weight" if call.names else "constant"
            else:
                inputs = [kinds[n] for n in node.all_input_nodes]
                weights = inputs.count("weight")
                if _is_a_map_looked_up(node, kinds):
                    kinds[node] = "weight"
                elif (
                    "data" in inputs
                    or (weights > 1 and call.name not in COMBINE | GATHERED and not _becomes_a_kernel(node))
                    or (call.name in LOOKUPS and weights)
                    or (call.name in CONTRACT and weights and kinds[node.all_input_nodes[0]] == "constant" and not _becomes_a_kernel(node))
                ):
                    kinds[node] = "data"
                else:
                    kinds[node] = "weight" if weights else "constant"
        return kinds


def _is_a_map_looked_up(node: fx.Node, kinds: dict[fx.Node, str]) -> bool:
    """Whether this takes matrices by ids out of a bank of them, which a product with data takes as its weight.

    One of their own axes is summed over, another survives: they are maps, as those of a bank that is taken whole. (A vector that is looked
    up and then compared with data is an embedding.)
    """
    if (
        operator_name(node) not in {"aten.index", "aten.index_select"}
        or not node.all_input_nodes
        or kinds[node.all_input_nodes[0]] != "weight"
    ):
        return False
    source = node.all_input_nodes[0].meta["val"]
    if operator_name(node) == "aten.index":
        ids = node.args[1]
        if not isinstance(ids, (list, tuple)) or sum(i is not None for i in ids) != 1:
            return False
        at = next(i for i, x in enumerate(ids) if x is not None)
    else:
        at = int(node.args[1]) % source.dim()  # pyright: ignore[reportArgumentType]
    rank = node.meta["val"].dim() - source.dim() + 1
    own = [i not in range(at, at + rank) for i in range(node.meta["val"].dim())]
    return sum(own) > 1 and _multiplied(node, own)


def _multiplied(node: fx.Node, own: list[bool]) -> bool:
    """Whether all that is done with a value is products that sum over one of its `own` axes and keep another."""
    return bool(node.users) and all(_multiplied_by(user, node, own) for user in node.users)


def _multiplied_by(user: fx.Node, node: fx.Node, own: list[bool]) -> bool:
    name = operator_name(user) if user.op == "call_function" else ""
    if name in {"aten.transpose", "aten.mT"}:
        a, b = user.args[1:] if name == "aten.transpose" else (-2, -1)
        turned = list(own)
        turned[a], turned[b] = own[b], own[a]  # pyright: ignore
        return _multiplied(user, turned)
    if len(user.all_input_nodes) != 2:
        return False
    if name in BATCHED:
        return len(own) > 2 and own[-1] and own[-2]
    if name != "aten.einsum":
        return False
    sides, _, kept = str(user.args[0]).replace(" ", "").partition("->")
    mine, other = sides.split(",") if user.args[1][0] is node else reversed(sides.split(","))  # pyright: ignore
    if "." in sides or len(mine) != len(own):
        return False
    letters = [letter for letter, is_own in zip(mine, own, strict=True) if is_own]
    return any(i in other and i not in kept for i in letters) and any(i in kept and i not in other for i in letters)


def _becomes_a_kernel(node: fx.Node) -> bool:
    """Whether a convolution takes this value as its weight: then it is one, whatever made it (weight standardisation)."""
    while node.op == "call_function" and len(node.users) == 1:
        source, node = node, next(iter(node.users))
        if node.op == "call_function" and operator_name(node).startswith("aten.conv"):
            return len(node.all_input_nodes) > 1 and node.args[1] is source
    return False


def _count(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() if isinstance(value, Tensor) else 0


def align(recordings: Sequence[Recording], labels: Sequence[str]) -> LayerGraph:
    """One graph from recordings of one model at several widths, node by node.

    Raises:
        GraphsDiffer: at the first node where they do not run the same operator on the same values.
    """
    lists = [[node for node in recording.graph.nodes if node.op != "output"] for recording in recordings]
    order = [{node: i for i, node in enumerate(nodes)} for nodes in lists]
    for k, nodes in enumerate(lists[1:], 1):
        for i in range(max(len(nodes), len(lists[0]))):
            ours, theirs = lists[0][i] if i < len(lists[0]) else None, nodes[i] if i < len(nodes) else None
            if ours is None or theirs is None or _shape_of(ours, order[0]) != _shape_of(theirs, order[k]):
                raise GraphsDiffer((labels[0], labels[k]), _said(ours), _said(theirs))
    calls = {}
    digraph = nx.DiGraph()
    for same in zip(*lists, strict=True):
        call = Call(nodes=same, values=tuple(node.meta["val"] for node in same))
        calls[same[0]] = call
        digraph.add_node(same[0], operator=call.name, weight=call.names)
        digraph.add_edges_from((source, same[0]) for source in same[0].all_input_nodes)
    output = next(node for node in recordings[0].graph.nodes if node.op == "output")
    return LayerGraph(digraph=digraph, calls=calls, outputs=tuple(output.all_input_nodes), recordings=tuple(recordings))


def _shape_of(node: fx.Node, order: dict[fx.Node, int]) -> tuple:
    names = node.meta.get("names")
    target = names if names else ("constant" if node.op == "get_attr" else str(node.target))
    rank = len(node.meta["val"].shape) if isinstance(node.meta["val"], Tensor) else None
    return node.op, target, rank, tuple(order[n] for n in node.all_input_nodes)


def _said(node: fx.Node | None) -> str:
    return "nothing more" if node is None else f"{operator_name(node)} at {node.meta['source']}"
