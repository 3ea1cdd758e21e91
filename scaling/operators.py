"""OPERATORS: one rule per operator, mostly a signature like einsum's.

    "aten.linear": "... i, o i, +o -> ... o"

The tensor arguments in the schema's order, an axis per letter: a letter in the inputs but not in the output is summed over; the same
letter is the same dimension. `(g o)` is an axis that is a product, `v!` an axis that is looked up, `e#` a bank of separate maps, `q~` an
axis that is taken apart by index (gates), `_%` one that a kernel slides over; `+` before an operand says that it is added, not multiplied,
and `_` is an axis joined to nothing. From this one line follow both which axes are the same and, for a weight,
which of its axes are summed (fan_in), survive (fan_out) or are shared with the data (copies).

Operators that only move values (view, cat, slice) have a function that says where the axes go.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import fx

from scaling.axes import Axes, Dim, product
from scaling.errors import ScalingError
from scaling.graph import SPLITS, Call, Size, name_of, operator_name

__all__ = ["OPERATORS", "Binding", "Label", "Operator", "bind", "known", "register", "rule_of", "written_out"]


@dataclass(frozen=True)
class Label:
    """A letter of a signature."""

    name: str
    mark: str = ""

    @property
    def looked_up(self) -> bool:
        """Whether it is indexed by ids."""
        return self.mark == "!"


MARKS = {"!": "looked_up", "#": "bank", "~": "indexed", "%": "grid"}
"""What a mark after a letter says of the dimension."""


@dataclass(frozen=True)
class Operand:
    """One side of a comma: per axis the letters it is a product of."""

    axes: tuple[tuple[Label, ...], ...]
    added: bool = False


@dataclass(frozen=True)
class Signature:
    """A parsed signature. `sizes` gives the lengths that products need."""

    inputs: tuple[Operand, ...]
    output: Operand


@dataclass(frozen=True)
class Written:
    """A signature that a call writes: the lengths its products need, and letters that are the same dimension under two names."""

    text: str
    sizes: dict[str, Size] = field(default_factory=dict)
    same: tuple[tuple[str, tuple[str, ...]], ...] = ()


Signed = str | Callable[[Call], Written]
Moves = Callable[[Call, Axes], None]


@dataclass(frozen=True)
class Operator:
    """A rule: either a signature (text, or a function of the call that writes one) or a function that moves axes.

    `linear` is whether scaling the data operands scales the output (what a multiplier can be folded through). `thinned` is by how much
    fewer terms are summed than the signature says (a transposed convolution with a stride).
    """

    signature: Signed | None = None
    moves: Moves | None = None
    linear: bool = False
    thinned: Callable[[Call], int] | None = None


@cache
def parse(text: str) -> Signature:
    """A signature from its text.

    Raises:
        ScalingError: if it is not one.
    """
    if text.count("->") != 1:
        message = f"a signature has one '->', as in '... i, o i -> ... o': {text!r}"
        raise ScalingError(message)
    left, right = text.split("->")
    return Signature(tuple(_operand(part) for part in left.split(",")), _operand(right))


def _operand(text: str) -> Operand:
    text = text.strip()
    added = text.startswith("+")
    axes = []
    for token in re.findall(r"\([^)]*\)|\S+", text.removeprefix("+")):
        names = token.strip("()").split()
        if not all(re.fullmatch(r"\.\.\.|[A-Za-z_]\w*[!#~%]?", name) for name in names):
            message = f"not an axis in a signature: {token!r} in {text!r}"
            raise ScalingError(message)
        axes.append(tuple(Label(name.rstrip("!#~%"), name[-1] if name[-1] in MARKS else "") for name in names))
    return Operand(tuple(axes), added)


ELLIPSIS = (Label("..."),)


def _spread(operand: Operand, rank: int) -> tuple[tuple[Label, ...], ...] | None:
    """The axes with `...` written out as letters counted from the right; None if the rank does not fit."""
    if ELLIPSIS not in operand.axes:
        return operand.axes if len(operand.axes) == rank else None
    at = operand.axes.index(ELLIPSIS)
    count = rank - len(operand.axes) + 1
    if count < 0:
        return None
    batch = tuple((Label(f"*{count - i}"),) for i in range(count))
    return operand.axes[:at] + batch + operand.axes[at + 1 :]


@dataclass(frozen=True)
class Binding:
    """A tensor argument at one call: for each of its axes the letters and the dimensions they stand for."""

    node: fx.Node
    axes: tuple[tuple[tuple[Label, Dim], ...], ...]
    added: bool


def bind(call: Call, axes: Axes) -> tuple[list[Binding], Signature, Written] | None:
    """Reads a call by its operator's signature; None for an operator that has none, or whose signature does not fit."""
    operator = rule_of(call)
    if operator is None or operator.signature is None:
        return None
    written = Written(operator.signature) if isinstance(operator.signature, str) else operator.signature(call)
    signature = parse(written.text)
    bindings = []
    for operand, node in zip(signature.inputs, call.tensors, strict=False):
        if node is None:
            continue
        dims = axes.dims.get(node, ())
        spread = _spread(operand, len(dims))
        if spread is None:
            return None
        bindings.append(
            Binding(node, tuple(_split(axes, labels, dim, written.sizes) for labels, dim in zip(spread, dims, strict=True)), operand.added)
        )
    return bindings, signature, written


def _split(axes: Axes, labels: tuple[Label, ...], dim: Dim, sizes: dict[str, Size]) -> tuple[tuple[Label, Dim], ...]:
    if len(labels) == 1:
        return ((labels[0], dim),)
    whole = axes.size(dim)
    given = [sizes.get(label.name) for label in labels]
    rest = product((size for size in given if size is not None), axes.widths)
    lengths = [size or tuple(a // b for a, b in zip(whole, rest, strict=True)) for size in given]
    parts = axes.regroup([dim], lengths) or tuple(axes.fresh(size) for size in lengths)
    return tuple(zip(labels, parts, strict=True))


def apply(call: Call, axes: Axes) -> bool:
    """Joins and defines the axes of a call; False if no rule fits, and then the outputs' axes are joined to nothing."""
    operator = rule_of(call)
    if operator is not None and operator.moves is not None:
        operator.moves(call, axes)
    elif not _apply_signature(call, axes):
        fresh(call, axes)
        return False
    return True


def _apply_signature(call: Call, axes: Axes) -> bool:
    bound = bind(call, axes)
    if bound is None:
        return False
    bindings, signature, written = bound
    letters: dict[str, Dim] = {}
    for binding in bindings:
        for axis in binding.axes:
            for label, dim in axis:
                if label.name == "g" and any(axes.resolve(other) for _, other in axis if other is not dim):
                    axes.mark(dim, "groups")
                if label.mark:
                    axes.mark(dim, MARKS[label.mark])
                if label.name == "_":
                    continue
                if axes.resolve(letters.get(label.name, ())) and axes.resolve(dim):
                    axes.join(letters[label.name], dim)
                else:
                    letters[label.name] = dim or letters.get(label.name, ())
    for letter, others in written.same:
        if letter in letters and all(other in letters for other in others):
            axes.join(letters[letter], tuple(atom for other in others for atom in letters[other]))
    out = _spread(signature.output, len(call.shape))
    if out is None:
        return False
    unnamed = [dim for axis in bindings[0].axes for label, dim in axis if label.name == "_"] if bindings else []
    grid_facts = {fact for dim in unnamed for atom in axes.leaves(dim) for fact in atom.facts if fact == "input"}
    dims = []
    for labels, size in zip(out, call.shape, strict=True):
        if all(label.name in letters for label in labels):
            dim = tuple(atom for label in labels for atom in letters[label.name])
            dims.append(dim if axes.size(dim) == size else axes.fresh(size))
        else:
            dims.append(axes.fresh(size, *grid_facts))
    axes.dims[call.node] = tuple(dims)
    return True


def fresh(call: Call, axes: Axes, *facts: str) -> None:
    """Gives the value of a call axes of its own."""
    axes.dims[call.node] = tuple(axes.fresh(size, *facts) for size in call.shape)


# signatures that a call writes


def elementwise(call: Call) -> Written:
    """Aligned from the right; an axis of length 1 that is stretched is joined to nothing. Only mul and div multiply."""
    mark = "" if call.name in MULTIPLIES else "+"
    rank = len(call.shape)
    operands = []
    for node in call.tensors:
        shape = _shape(node, call)
        letters = [f"a{rank - len(shape) + i}" for i in range(len(shape))]
        stretched = [size != call.shape[rank - len(shape) + i] for i, size in enumerate(shape)]
        operands.append(mark + " ".join("_" if wide else letter for letter, wide in zip(letters, stretched, strict=True)))
    return Written(f"{', '.join(operands)} -> {' '.join(f'a{i}' for i in range(rank))}")


def _shape(node: fx.Node | None, call: Call) -> tuple[Size, ...]:
    if node is None:
        return ()
    every = zip(*(_values(n) for n in _same(node, call)), strict=True)
    return tuple(every)


def _values(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()


def _same(node: fx.Node, call: Call) -> Sequence[fx.Node]:
    """A tensor argument at every width."""
    at = call.node.all_input_nodes.index(node)
    return [other.all_input_nodes[at] for other in call.nodes]


def linear(call: Call) -> Written:
    """A weight of one axis is a single row."""
    return Written("... i, i -> ..." if len(_shape(call.tensors[1], call)) == 1 else "... i, o i, +o -> ... o")


def matmul(call: Call) -> Written:
    """1-d operands are vectors, leading axes a batch."""
    a, b = (len(_shape(node, call)) for node in call.tensors[:2])
    left = "k" if a == 1 else "... m k"
    right = "k" if b == 1 else "... k n"
    out = " ".join(("..." if max(a, b) > 2 else "", "m" if a > 1 else "", "n" if b > 1 else ""))
    return Written(f"{left}, {right} -> {out}")


def inner(call: Call) -> Written:
    """The last axes of both summed, the others of both in order."""
    a, b = (" ".join(f"{letter}{i}" for i in range(len(_shape(node, call)) - 1)) for node, letter in zip(call.tensors, "ab", strict=True))
    return Written(f"{a} k, {b} k -> {a} {b}")


def addmm(call: Call) -> Written:
    """A bias of one or two axes plus a product."""
    return Written(f"+{'m n' if len(_shape(call.tensors[0], call)) == 2 else 'n'}, m k, k n -> m n")


def einsum(call: Call) -> Written:
    """The equation itself."""
    equation = call.get("equation").replace(" ", "")
    if "->" not in equation:
        letters = re.sub(r"[^A-Za-z]", "", equation)
        equation += "->" + "..." * ("..." in equation) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    spaced = re.sub(r"(\.\.\.|[A-Za-z])", r"\1 ", equation).replace("->", " -> ").replace(",", ", ")
    return Written(spaced)


def tensordot(call: Call) -> Written:
    """The named axes summed in pairs, the others of both in order."""
    sums = [f"k{i}" for i in range(len(call.get("dims_self")))]
    sides, kept = [], []
    for node, name, letter in zip(call.tensors, ("dims_self", "dims_other"), "ab", strict=True):
        letters = [f"{letter}{i}" for i in range(len(_shape(node, call)))]
        for summed, axis in zip(sums, call.get(name), strict=True):
            letters[axis] = summed
        sides.append(" ".join(letters))
        kept += [other for other in letters if other not in sums]
    return Written(f"{', '.join(sides)} -> {' '.join(kept)}")


def convolution(call: Call) -> Written:
    """Channels in `groups` maps; the kernel's taps are summed, the grid is joined to nothing."""
    rank = len(_shape(call.tensors[1], call)) - 2
    batch = "b " if len(call.shape) == rank + 2 else ""
    grid, taps = " ".join(["_%"] * rank), " ".join(f"k{i}" for i in range(rank))
    groups = tuple(call.over_widths("groups"))
    if call.name.startswith("aten.conv_transpose") or call.get("transposed"):
        return Written(f"{batch}(g i) {grid}, (g i) o {taps}, +(g o) -> {batch}(g o) {grid}", {"g": groups})
    return Written(f"{batch}(g i) {grid}, (g o) i {taps}, +(g o) -> {batch}(g o) {grid}", {"g": groups})


def deformed(call: Call) -> Written:
    """A convolution of shifted (and weighted) samples of the grid."""
    moved = ", ".join(" ".join(["_"] * len(_shape(node, call))) for node in call.tensors[2:4])
    return Written(f"b (g i) _ _, (g o) i k0 k1, {moved}, +(g o) -> b (g o) _ _", {"g": tuple(call.over_widths("groups"))})


def strides(call: Call) -> int:
    """A stride s in each of n directions leaves 1 of sⁿ taps at every output (THEORY 2.2, row 28)."""
    stride, rank = call.get("stride"), len(_shape(call.tensors[1], call)) - 2
    return math.prod(stride if len(stride) == rank else list(stride) * rank)


def attention(call: Call) -> Written:
    """q·k summed over e, weights·v over the keys; with enable_gqa one key head serves r query heads. A mask is added to the weights."""
    q, k = (_shape(node, call) for node in call.tensors[:2])
    mask = _shape(call.tensors[3], call) if len(call.tensors) > 3 else ()
    if len(q) >= 3 and q[-3] != k[-3]:
        repeats = tuple(a // b for a, b in zip(q[-3], k[-3], strict=True))
        heads = "(h r)" if len(mask) > 2 and mask[-3] == q[-3] else "_"
        letters = " ".join(["_"] * max(len(mask) - 3, 0) + [heads, "l", "s"][3 - min(len(mask), 3) :])
        return Written(f"... (h r) l e, ... h s e, ... h s f, +{letters} -> ... (h r) l f", {"r": repeats})
    return Written(f"... l e, ... s e, ... s f, +{'... l s' if len(mask) > 1 else ' '.join('_' * len(mask))} -> ... l f")


def layer_norm(call: Call) -> Written:
    """Gain and bias over the normalized axes."""
    count = len(call.get("normalized_shape"))
    letters = " ".join(f"c{i}" for i in range(count))
    return Written(f"... {letters}, {letters}, +{letters} -> ... {letters}")


def channels(call: Call) -> Written:
    """Axis 1 is channels: batch, group and instance norm, with gain, bias and statistics."""
    rest = " ".join(f"x{i}" for i in range(len(call.shape) - 2))
    return Written(f"b c {rest}, c, +c, +c, +c -> b c {rest}")


def bag(call: Call) -> Written:
    """Rows looked up and summed or averaged per bag; ids in a row or with offsets, a weight for each."""
    return Written(f"v! o{''.join(', ' + ' '.join('_' * len(_shape(node, call))) for node in call.tensors[1:] if node is not None)} -> b o")


def weight_norm(call: Call) -> Written:
    """g·v/‖v‖: one g for every index of one axis of v, or for all of it."""
    rank = len(call.shape)
    v = [f"a{i}" for i in range(rank)]
    g = [letter if size != (1,) * len(call.nodes) else "_" for letter, size in zip(v, _shape(call.tensors[1], call), strict=False)]
    return Written(f"{' '.join(v)}, {' '.join(g)} -> {' '.join(v)}")


def prelu(call: Call) -> Written:
    """One slope, or one per channel."""
    rest = " ".join(f"x{i}" for i in range(len(call.shape) - 2))
    return Written(f"b c {rest}, {'c' if _shape(call.tensors[1], call) != ((1,) * len(call.nodes),) else '_'} -> b c {rest}")


def grouped_mm(call: Call) -> Written:
    """Rows of x are dealt to the experts e; a 3-d x is a batch of products."""
    if len(_shape(call.tensors[0], call)) == 3:
        return Written("e# m k, e# k n -> e# m n")
    return Written("t k, e# k n -> t n")


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(call: Call) -> Written:
    """Per layer and direction W_ih (gates·h, in), W_hh (gates·h, h) and two biases; the next layer reads directions × h."""
    gates = GATES[call.name.removeprefix("aten.")]
    count = len(call.nodes)
    values = [call.get(name) for name in ("params", "hx")]
    states = values[1] if isinstance(values[1], (list, tuple)) else [values[1]]
    packed = "batch_sizes" in call.arguments
    ranks = [len(_shape(node, call)) for node in states if isinstance(node, fx.Node)]
    directions = 2 if call.get("bidirectional") else 1
    per_layer = 2 + 2 * bool(call.get("has_biases"))
    operands = ["... i0", *(["+" + " ".join("_" * r) for r in ranks] if not packed else ["+_", *("+" + " ".join("_" * r) for r in ranks)])]
    same: list[tuple[str, tuple[str, ...]]] = []
    for k in range(len(values[0]) // per_layer):
        layer = k // directions
        if k % directions == 0 and layer > 0:
            same.append((f"i{layer}", ("b", "h")))
        same.append((f"r{k}", ("h",)))
        operands += [f"(q~ h) i{layer}", f"(q~ h) r{k}", *["+(q~ h)"] * (per_layer - 2)]
    sizes = {"q": (gates,) * count, "b": (directions,) * count}
    return Written(f"{', '.join(operands)} -> ... (b h)", sizes, tuple(same))


def cell(call: Call) -> Written:
    """LSTM, GRU and RNN cells: input, states, W_ih, W_hh, biases."""
    gates = GATES[call.name.removeprefix("aten.").removesuffix("_cell")]
    states = sum(len(_shape(node, call)) == 2 for node in call.tensors[1:]) - 2
    operands = ["b i", *["+b h"] * states, "(q~ h) i", "(q~ h) r", "+(q~ h)", "+(q~ h)"]
    return Written(f"{', '.join(operands)} -> b h", {"q": (gates,) * len(call.nodes)}, (("r", ("h",)),))


def solve(call: Call) -> Written:
    """X of A·X = B, or of X·A = B."""
    return Written("... n m, ... n k -> ... m k" if call.get("left", True) else "... m n, ... k n -> ... k m")


def diagonals(call: Call) -> Written:
    """A vector as the diagonal of a matrix."""
    plain = (call.get("offset"), call.get("dim1"), call.get("dim2")) == (0, -2, -1)
    return Written("... i -> ... i i" if plain else "... _ -> ... r c")


def bilinear(call: Call) -> Written:
    """nn.Bilinear."""
    return Written("... i, ... j, o i j, +o -> ... o")


# functions that move axes


def _input(call: Call, axes: Axes, index: int = 0) -> tuple[Dim, ...]:
    node = call.tensors[index]
    return axes.dims.get(node, ()) if node is not None else ()


def _axis(call: Call, name: str, rank: int) -> int:
    axis = call.get(name)
    return axis % rank if rank else 0


def view(call: Call, axes: Axes) -> None:
    """view, reshape, flatten, unflatten: a row-major regrouping; where that does not divide, the axes before and after stay."""
    dims, shape = _input(call, axes), call.shape
    regrouped = axes.regroup(dims, shape)
    if regrouped is None:
        before = _alike(axes, dims, shape)
        after = min(_alike(axes, dims[::-1], shape[::-1]), min(len(dims), len(shape)) - before)
        middle = tuple(axes.fresh(size) for size in shape[before : len(shape) - after])
        regrouped = dims[:before] + middle + dims[len(dims) - after :]
    axes.dims[call.node] = regrouped


def _alike(axes: Axes, dims: Sequence[Dim], shape: Sequence[Size]) -> int:
    """How many leading axes have the lengths of `shape`."""
    return next((i for i, (dim, size) in enumerate(zip(dims, shape, strict=False)) if axes.size(dim) != size), min(len(dims), len(shape)))


def permute(call: Call, axes: Axes) -> None:
    """Axes in another order."""
    dims = _input(call, axes)
    axes.dims[call.node] = tuple(dims[i] for i in call.get("dims"))


def transpose(call: Call, axes: Axes) -> None:
    """transpose, t, mT, adjoint, numpy_T."""
    dims = list(_input(call, axes))
    if call.name in {"aten.numpy_T", "aten.matrix_H"} or (call.name == "aten.t" and len(dims) < 3):
        dims.reverse()
    else:
        names = ("dim0", "dim1") if "dim0" in call.arguments else ("axis0", "axis1")
        i, j = (call.get(name) for name in names) if names[0] in call.arguments else (-2, -1)
        dims[i], dims[j] = dims[j], dims[i]
    axes.dims[call.node] = tuple(dims)


def movedim(call: Call, axes: Axes) -> None:
    """Axes moved from source to destination."""
    dims = _input(call, axes)
    source, destination = ([v] if isinstance(v, int) else list(v) for v in (call.get("source"), call.get("destination")))
    order: list[int | None] = [None] * len(dims)
    for s, t in zip(source, destination, strict=True):
        order[t % len(dims)] = s % len(dims)
    rest = iter(i for i in range(len(dims)) if i not in {s % len(dims) for s in source})
    axes.dims[call.node] = tuple(dims[next(rest) if i is None else i] for i in order)


def same(call: Call, axes: Axes) -> None:
    """The shape, and every axis, of the first input: flip, roll, cumsum."""
    dims = _input(call, axes)
    axes.dims[call.node] = (
        tuple(dim if axes.size(dim) == size else axes.fresh(size) for dim, size in zip(dims, call.shape, strict=False))
        if len(dims) == len(call.shape)
        else tuple(axes.fresh(size) for size in call.shape)
    )


def parts_of_complex(call: Call, axes: Axes) -> None:
    """The real and the imaginary part as an axis, and back."""
    dims = _input(call, axes)
    if call.name == "aten.view_as_complex":
        axes.mark(dims[-1], "indexed")
    axes.dims[call.node] = dims[:-1] if call.name == "aten.view_as_complex" else (*dims, axes.fresh(call.shape[-1], "indexed"))


def unsqueeze(call: Call, axes: Axes) -> None:
    """An axis of length 1 more."""
    dims = list(_input(call, axes))
    dims.insert(call.get("dim") % (len(dims) + 1), ())
    axes.dims[call.node] = tuple(dims)


def squeeze(call: Call, axes: Axes) -> None:
    """Axes of length 1 fewer."""
    dims = _input(call, axes)
    which = call.get("dim", None)
    drop = set(range(len(dims))) if which is None else {which % len(dims)} if isinstance(which, int) else {i % len(dims) for i in which}
    axes.dims[call.node] = tuple(dim for i, dim in enumerate(dims) if i not in drop or axes.size(dim) != axes.one)


def expand(call: Call, axes: Axes) -> None:
    """Axes of length 1, and new leading ones, become copies: their number is that of the tensor which gives the shape, if one does."""
    dims = _input(call, axes)
    lead = len(call.shape) - len(dims)
    given = axes.dims.get(call.tensors[1]) if call.name == "aten.expand_as" and call.tensors[1] is not None else None
    new = given or tuple(axes.fresh(size, "repeated") for size in call.shape)
    own = (None,) * lead + dims
    axes.dims[call.node] = tuple(
        other if dim is None or axes.size(dim) != size else dim for dim, other, size in zip(own, new, call.shape, strict=True)
    )


def repeat(call: Call, axes: Axes) -> None:
    """Repeat and tile: each axis becomes copies × itself."""
    dims = _input(call, axes)
    lead = len(call.shape) - len(dims)
    out = []
    for size, dim in zip(call.shape, ((),) * lead + dims, strict=True):
        own = axes.size(dim)
        out.append(axes.fresh(tuple(a // b for a, b in zip(size, own, strict=True)), "repeated") + dim)
    axes.dims[call.node] = tuple(out)


def repeat_interleave(call: Call, axes: Axes) -> None:
    """Each index `repeats` times: itself × copies."""
    dims, which = list(_input(call, axes)), call.get("dim")
    if which is None or not isinstance(call.get("repeats"), int):
        return fresh(call, axes)
    dims[which] = dims[which] + axes.fresh(tuple(call.over_widths("repeats")), "repeated")
    axes.dims[call.node] = tuple(dims)
    return None


def cat(call: Call, axes: Axes) -> None:
    """The sum of one axis, the others the same."""
    present = [node for node in call.tensors if node is not None and len(axes.dims.get(node, ())) == len(call.shape)]
    which = call.get("dim") % max(len(call.shape), 1)
    parts = [axes.dims[node] for node in present]
    out = []
    for i, size in enumerate(call.shape):
        column = [dims[i] for dims in parts]
        if i == which:
            whole = axes.concatenate(column)
            out.append(whole if axes.size(whole) == size else axes.fresh(size))
            continue
        for dim in column[1:]:
            axes.join(column[0], dim)
        out.append(column[0])
    axes.dims[call.node] = tuple(out)


def stack(call: Call, axes: Axes) -> None:
    """A new axis that is indexed, the others the same."""
    parts = [axes.dims.get(node, ()) for node in call.tensors if node is not None]
    for dims in parts[1:]:
        for a, b in zip(parts[0], dims, strict=True):
            axes.join(a, b)
    out = list(parts[0])
    which = call.get("dim") % len(call.shape)
    out.insert(which, axes.fresh(call.shape[which], "indexed"))
    axes.dims[call.node] = tuple(out)


def select(call: Call, axes: Axes) -> None:
    """One index of an axis: the axis is gone."""
    dims = list(_input(call, axes))
    axes.mark(dims.pop(call.get("dim")), "indexed")
    axes.dims[call.node] = tuple(dims)


def diagonal(call: Call, axes: Axes) -> None:
    """Entries with the same index on two axes: the first of them, last."""
    dims = list(_input(call, axes))
    first, second = (call.get(name) % len(dims) for name in ("dim1", "dim2"))
    size = call.shape[-1]
    whole = dims[first] if call.get("offset") == 0 and axes.size(dims[first]) == size else axes.fresh(size)
    axes.dims[call.node] = (*(dim for i, dim in enumerate(dims) if i not in {first, second}), whole)


def take_slice(call: Call, axes: Axes) -> None:
    """x[start:end:step] of one axis: a segment of it."""
    dims = list(_input(call, axes))
    which = (call.get("dim") or 0) % len(dims)
    dims[which] = _part(call, axes, dims[which], call.shape[which], partial(axes.take, call.node))
    axes.dims[call.node] = tuple(dims)


def _part(call: Call, axes: Axes, dim: Dim, length: Size, take: Callable[[Dim, Size, Size], Dim]) -> Dim:
    """What [start:end:step] takes of an axis; `take` does where the step is 1."""
    size = axes.size(dim)
    if call.name == "aten.narrow":
        start = tuple(call.over_widths("start"))
        stop = tuple(a + b for a, b in zip(start, call.over_widths("length"), strict=True))
    else:
        start = tuple(_clamp(s or 0, n) for s, n in zip(call.over_widths("start"), size, strict=True))
        stop = tuple(_clamp(n if e is None else e, n) for e, n in zip(call.over_widths("end"), size, strict=True))
    if any(step != 1 for step in call.arguments.get("step", (1,))):
        return _strided(axes, dim, call.over_widths("step"), length)
    return take(dim, start, stop)


def place(call: Call, axes: Axes) -> None:
    """slice_scatter, select_scatter: a value with another one written into a part of one axis; its other axes are the same."""
    dims, part = _input(call, axes), list(_input(call, axes, 1))
    axes.dims[call.node] = dims
    which = (call.get("dim") or 0) % len(dims)
    if call.name == "aten.select_scatter":
        axes.mark(dims[which], "indexed")
        part.insert(which, ())
    elif part and len(part) == len(dims):
        axes.join(_part(call, axes, dims[which], axes.size(part[which]), axes.segment), part[which])
    for i, (a, b) in enumerate(zip(dims, part, strict=False)):
        if i != which and b and axes.size(a) == axes.size(b):
            axes.join(a, b)


def _strided(axes: Axes, dim: Dim, step: Size, length: Size) -> Dim:
    """x[::step]: the outer factor of (length × step), where that divides."""
    if tuple(a * b for a, b in zip(step, length, strict=True)) != axes.size(dim):
        return axes.fresh(length, *(fact for atom in axes.leaves(dim) for fact in atom.facts))
    parts = axes.regroup([dim], [length, step])
    return parts[0] if parts else axes.fresh(length)


def _clamp(index: int, size: int) -> int:
    return max(0, min(index + size if index < 0 else index, size))


def split(call: Call, axes: Axes) -> None:
    """split, chunk, split_with_sizes, tensor_split: the getitem nodes take the segments."""
    axes.dims[call.node] = _input(call, axes)


def getitem(call: Call, axes: Axes) -> None:
    """One output of an operator with several."""
    source = call.node.args[0]
    assert isinstance(source, fx.Node)
    index = call.node.args[1]
    dims = axes.dims.get(source, ())
    name = operator_name(source)
    assert isinstance(index, int)
    if name in SPLITS and dims:
        which = (_argument(source, "dim", 1) or 0) % len(dims)
        before = [sum(int(v.shape[which]) for v in node.args[0].meta["val"][:index]) for node in call.nodes]  # pyright: ignore
        stop = tuple(b + s for b, s in zip(before, call.shape[which], strict=True))
        out = list(dims)
        out[which] = axes.segment(dims[which], tuple(before), stop)
        axes.dims[call.node] = tuple(out)
    elif name == "aten.unbind" and dims:
        which = (_argument(source, "dim", 1) or 0) % len(dims)
        axes.mark(dims[which], "indexed")
        axes.dims[call.node] = dims[:which] + dims[which + 1 :]
    elif (
        len(dims) == len(call.shape)
        and all(axes.size(d) == s for d, s in zip(dims, call.shape, strict=True))
        and (index == 0 or name in {"aten.var_mean", "aten.std_mean"})
    ):
        axes.dims[call.node] = dims
    else:
        fresh(call, axes)


def _argument(node: fx.Node, name: str, position: int) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    schema: Any = getattr(node.target, "_schema", None)
    for i, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name == name:
            return node.args[i] if i < len(node.args) else argument.default_value
    return node.args[position]


def reduce(call: Call, axes: Axes) -> None:
    """sum, mean, amax, norm over axes that are gone, or of length 1."""
    dims = _input(call, axes)
    which = call.get("dim", None)
    gone = (
        set(range(len(dims)))
        if which is None or which == []
        else {which % len(dims)}
        if isinstance(which, int)
        else {i % len(dims) for i in which}
    )
    if call.get("keepdim", False):
        axes.dims[call.node] = tuple(() if i in gone else dim for i, dim in enumerate(dims))
    else:
        axes.dims[call.node] = tuple(dim for i, dim in enumerate(dims) if i not in gone)
    if len(axes.dims[call.node]) != len(call.shape):
        fresh(call, axes)


def grid(call: Call, axes: Axes) -> None:
    """Pooling, interpolation, padding: axes whose length changes are new, an axis that keeps its length is the same."""
    dims = _input(call, axes)
    facts = {fact for dim in dims for atom in axes.leaves(dim) for fact in atom.facts if fact == "input"}
    lead = len(call.shape) - len(dims)
    axes.dims[call.node] = (
        tuple(dim if axes.size(dim) == size else axes.fresh(size, *facts) for size, dim in zip(call.shape[lead:], dims, strict=True))
        if lead == 0
        else tuple(axes.fresh(size) for size in call.shape)
    )


def columns(call: Call, axes: Axes) -> None:
    """im2col, (b, c, …) -> (b, c·taps, positions), and back."""
    dims = _input(call, axes)
    taps = tuple(math.prod(size) for size in call.over_widths("kernel_size"))
    if call.name == "aten.im2col" and len(dims) == 4:
        axes.dims[call.node] = (dims[0], dims[1] + axes.fresh(taps, "kernel"), axes.fresh(call.shape[-1], "input"))
        return
    parts = axes.regroup([dims[1]], [call.shape[-3], taps]) if len(dims) == 3 else None
    if parts is None:
        fresh(call, axes)
    else:
        axes.dims[call.node] = (dims[0], parts[0], *(axes.fresh(size, "input") for size in call.shape[-2:]))


def windows(call: Call, axes: Axes) -> None:
    """x.unfold(axis, size, step): positions in place of the axis, the window's entries last."""
    dims = list(_input(call, axes))
    which = call.get("dimension") % len(dims)
    facts = [fact for atom in axes.leaves(dims[which]) for fact in atom.facts if fact == "input"]
    dims[which] = axes.fresh(call.shape[which], *facts)
    axes.dims[call.node] = (*dims, axes.fresh(call.shape[-1], "kernel"))


def resample(call: Call, axes: Axes) -> None:
    """Interpolation of a grid (b, c, …): its axes are the input's, whatever it holds (a position table too)."""
    for dim in _input(call, axes)[2:]:
        axes.mark(dim, "input")
    grid(call, axes)


def packed(call: Call, axes: Axes) -> None:
    """Sequences of several lengths as the rows of one matrix, and back."""
    kept = _input(call, axes)[1 if call.name == "aten._pad_packed_sequence" else 2 :]
    rows = tuple(axes.fresh(size, "input") for size in call.shape[: len(call.shape) - len(kept)])
    axes.dims[call.node] = (*rows, *kept)


def shuffled(call: Call, axes: Axes) -> None:
    """Channels (g c) as (c g)."""
    dims = list(_input(call, axes))
    groups = tuple(call.over_widths("groups"))
    parts = axes.regroup([dims[1]], [groups, tuple(n // g for n, g in zip(axes.size(dims[1]), groups, strict=True))])
    dims[1] = axes.fresh(axes.size(dims[1])) if parts is None else parts[1] + parts[0]
    axes.dims[call.node] = tuple(dims)


def index(call: Call, axes: Axes) -> None:
    """x[ids]: indexed axes are looked up, the others pass; x[mask]: the axes of the mask become one."""
    dims = _input(call, axes)
    ids = call.get("indices")
    masks = [(i, len(_values(x))) for i, x in enumerate(ids) if isinstance(x, fx.Node) and _dtype(x) in {torch.bool, torch.uint8}]
    masks += [(i, x.dim()) for i, x in enumerate(ids) if isinstance(x, torch.Tensor) and x.dtype in {torch.bool, torch.uint8}]
    if len(masks) == 1 and sum(x is not None for x in ids) == 1:
        [(at, rank)] = masks
        axes.dims[call.node] = (*dims[:at], axes.fresh(call.shape[at], "input"), *dims[at + rank :])
        return None
    ids = list(ids) + [None] * (len(dims) - len(ids))
    looked = [i for i, x in enumerate(ids) if x is not None]
    ranks = [len(_values(x)) if isinstance(x, fx.Node) else x.dim() for x in ids if x is not None]
    boolean = any((_dtype(x) in {torch.bool, torch.uint8}) for x in ids if x is not None)
    rank = max(ranks, default=0)
    kept = [dim for i, dim in enumerate(dims) if i not in looked]
    if boolean or len(kept) + rank != len(call.shape):
        return fresh(call, axes)
    for i in looked:
        axes.mark(dims[i], "looked_up")
    together = looked == list(range(looked[0], looked[-1] + 1))
    at = looked[0] if together else 0
    new = [axes.fresh(size, "input") for size in call.shape[at : at + rank]]
    axes.dims[call.node] = tuple(kept[:at] + new + kept[at:])
    return None


def _dtype(value: Any) -> torch.dtype:
    return value.meta["val"].dtype if isinstance(value, fx.Node) else value.dtype


def index_select(call: Call, axes: Axes) -> None:
    """Ids along dim: one axis is looked up."""
    dims = list(_input(call, axes))
    which = call.get("dim")
    axes.mark(dims[which], "looked_up")
    dims[which] = axes.fresh(call.shape[which], "input")
    axes.dims[call.node] = tuple(dims)


def write(call: Call, axes: Axes) -> None:
    """copy_, index_put_, masked_fill_ with a tensor: the first input's axes; a source of the same shape is joined."""
    dims = _input(call, axes)
    if len(dims) != len(call.shape):
        return fresh(call, axes)
    axes.dims[call.node] = dims
    for node in call.tensors[1:]:
        other = axes.dims.get(node, ()) if node is not None else ()
        for a, b in zip(reversed(dims), reversed(other), strict=False):
            if b and axes.size(a) == axes.size(b):
                axes.join(a, b)
    return None


def pixel_shuffle(call: Call, axes: Axes) -> None:
    """(c·r², h, w) -> (c, h·r, w·r)."""
    dims = _input(call, axes)
    r = tuple(call.over_widths("upscale_factor"))
    parts = axes.regroup([dims[-3]], [call.shape[-3], r, r])
    if parts is None:
        return fresh(call, axes)
    axes.dims[call.node] = (*dims[:-3], parts[0], dims[-2] + parts[1], dims[-1] + parts[2])
    return None


def picked(call: Call, axes: Axes) -> None:
    """topk, sort, gather, scatter: along one axis entries are picked, the others are the same."""
    dims = list(_input(call, axes))
    if len(dims) != len(call.shape) or not dims:
        return fresh(call, axes)
    which = call.get("dim", -1) % len(dims)
    out = [
        dim if i != which and axes.size(dim) == size else axes.fresh(size)
        for i, (dim, size) in enumerate(zip(dims, call.shape, strict=True))
    ]
    if axes.size(dims[which]) == call.shape[which]:
        out[which] = dims[which]
    axes.dims[call.node] = tuple(out)
    return None


def scattered(call: Call, axes: Axes) -> None:
    """scatter, index_add: the first input's axes; those of the source, but for the one that is picked along, are the same."""
    dims = _input(call, axes)
    if len(dims) != len(call.shape):
        return fresh(call, axes)
    axes.dims[call.node] = dims
    which = call.get("dim") % len(dims) if dims else 0
    for node in call.tensors[1:]:
        source = axes.dims.get(node, ()) if node is not None else ()
        if len(source) == len(dims):
            for i, (a, b) in enumerate(zip(dims, source, strict=True)):
                if i != which and b and axes.size(a) == axes.size(b):
                    axes.join(a, b)
    return None


def classified(call: Call, axes: Axes) -> None:
    """Cross entropy: (b, c, …) or (c), and targets that pick one of the c, or a weight for each. The loss is a number, or has the rest."""
    dims = _input(call, axes)
    which = 1 if len(dims) > 1 else 0
    axes.mark(dims[which], "classes")
    rest = dims[:which] + dims[which + 1 :]
    target = axes.dims.get(call.tensors[1], ()) if call.tensors[1] is not None else ()
    for a, b in zip(dims if len(target) == len(dims) else rest, target, strict=False):
        axes.join(a, b)
    axes.dims[call.node] = rest if len(rest) == len(call.shape) else ()


def transcribed(call: Call, axes: Axes) -> None:
    """CTC of log-probabilities (time, batch, classes): a loss for each of the batch, and what its gradient needs."""
    dims = _input(call, axes)
    axes.mark(dims[-1], "classes")
    axes.dims[call.node] = dims[1:-1]


def compared(call: Call, axes: Axes) -> None:
    """A loss of two values of one shape: a number, or entry by entry."""
    dims, target = _input(call, axes), _input(call, axes, 1)
    for a, b in zip(reversed(dims), reversed(target), strict=False):
        if a and b and axes.size(a) == axes.size(b):
            axes.join(a, b)
    axes.dims[call.node] = dims if len(dims) == len(call.shape) else ()


def pixel_unshuffle(call: Call, axes: Axes) -> None:
    """(c, h·r, w·r) -> (c·r², h, w)."""
    dims = _input(call, axes)
    r = tuple(call.over_widths("downscale_factor"))
    rows, columns_ = (axes.regroup([dim], [size, r]) for dim, size in zip(dims[-2:], call.shape[-2:], strict=True))
    if rows is None or columns_ is None:
        return fresh(call, axes)
    axes.dims[call.node] = (*dims[:-3], dims[-3] + rows[1] + columns_[1], rows[0], columns_[0])
    return None


def glu(call: Call, axes: Axes) -> None:
    """The two halves of an axis, multiplied."""
    dims = list(_input(call, axes))
    which = call.get("dim") % len(dims)
    half, whole = call.shape[which], axes.size(dims[which])
    first, second = axes.segment(dims[which], axes.zero, half), axes.segment(dims[which], half, whole)
    axes.join(first, second)
    dims[which] = first
    axes.dims[call.node] = tuple(dims)


MULTIPLIES = {"aten.mul", "aten.div", "aten.multiply", "aten.divide", "aten.true_divide"}

# the table


def _moves(rule: Moves, names: str, *, linear: bool = True) -> dict[str, Operator]:
    return {_full(name): Operator(moves=rule, linear=linear) for name in names.split()}


def _signed(signature: Signed, names: str, *, linear: bool = False, thinned: Callable[[Call], int] | None = None) -> dict[str, Operator]:
    return {_full(name): Operator(signature=signature, linear=linear, thinned=thinned) for name in names.split()}


def _full(name: str) -> str:
    return name if "." in name or name == "getitem" else f"aten.{name}"


_ROWS: list[dict[str, Operator]] = [
    # sums of products
    _signed(linear, "linear"),
    _signed(matmul, "matmul mm bmm mv dot vdot"),
    _signed(inner, "inner"),
    _signed(addmm, "addmm"),
    _signed("+b m n, b m k, b k n -> b m n", "baddbmm"),
    _signed("+m n, b m k, b k n -> m n", "addbmm"),
    _signed("+m, m k, k -> m", "addmv"),
    _signed("+m n, m, n -> m n", "addr"),
    _signed(einsum, "einsum"),
    _signed(tensordot, "tensordot"),
    _signed("m k, k n -> m n", "_sparse_mm"),
    _signed(solve, "linalg_solve linalg_solve_triangular"),
    _signed("... n m -> ... m n", "linalg_inv inverse"),
    _signed("... n m, ... _ -> ... n m", "linalg_householder_product"),
    _signed("i, j -> i j", "outer ger"),
    _signed("i i -> ", "trace"),
    _signed(diagonals, "diag_embed"),
    _signed(bilinear, "bilinear"),
    _signed(grouped_mm, "_grouped_mm grouped_mm"),
    _signed(recurrent, "lstm gru rnn_tanh rnn_relu"),
    _signed(cell, "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
    _signed(convolution, "conv1d conv2d conv3d convolution"),  # the last, as native_…_norm, is what runs where autograd does
    _signed(convolution, "conv_transpose1d conv_transpose2d conv_transpose3d", thinned=strides),
    _signed(attention, "scaled_dot_product_attention"),
    _signed(deformed, "torchvision.deform_conv2d"),
    _signed("_ b i, k i o, +o -> t b o", "conv_tbc"),
    # lookups
    _signed("v! o, ... -> ... o", "embedding"),
    _signed(bag, "embedding_bag"),
    _signed(weight_norm, "_weight_norm"),
    # gains and biases
    _signed(layer_norm, "layer_norm rms_norm native_layer_norm"),
    _signed(channels, "batch_norm instance_norm native_batch_norm"),
    _signed(channels, "group_norm native_group_norm"),
    _signed(prelu, "prelu"),
    # regions of a map
    _signed("_ c _ _, _ _ -> r c h w", "torchvision.roi_align torchvision.roi_pool"),
    # elementwise, beside everything that torch tags as pointwise
    _signed(elementwise, "add sub rsub mul div multiply divide true_divide neg real imag", linear=True),
    _signed(
        elementwise,
        "dropout feature_dropout alpha_dropout feature_alpha_dropout complex polar softmax _softmax log_softmax where "
        "masked_fill hardtanh relu6 softplus gelu silu mish hardswish "
        "_log_softmax log_sigmoid_forward native_dropout linalg_cross renorm normal uniform exponential geometric cauchy log_normal random",
    ),
    # values that only move
    _moves(view, "view reshape flatten unflatten _unsafe_view _reshape_alias view_as reshape_as ravel"),
    _moves(permute, "permute"),
    _moves(transpose, "transpose t mT mH numpy_T swapaxes swapdims adjoint matrix_H"),
    _moves(movedim, "movedim moveaxis"),
    _moves(unsqueeze, "unsqueeze"),
    _moves(squeeze, "squeeze"),
    _moves(expand, "expand expand_as broadcast_to"),
    _moves(repeat, "repeat tile"),
    _moves(repeat_interleave, "repeat_interleave"),
    _moves(cat, "cat concat concatenate"),
    _moves(stack, "stack"),
    _moves(select, "select"),
    _moves(diagonal, "diagonal"),
    _moves(take_slice, "slice narrow"),
    _moves(split, "split split_with_sizes chunk tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes unbind"),
    _moves(getitem, "getitem"),
    _moves(same, "matrix_exp linalg_qr linalg_cholesky_ex linalg_inv_ex cummax cummin logcumsumexp index_fill cumprod", linear=False),
    _moves(same, "flip roll cumsum tril triu to clone contiguous detach alias type_as nan_to_num rot90 fill zero", linear=True),
    _moves(same, "_conj conj resolve_conj _neg_view resolve_neg", linear=True),
    _moves(pixel_shuffle, "pixel_shuffle"),
    _moves(pixel_unshuffle, "pixel_unshuffle"),
    _moves(parts_of_complex, "view_as_real view_as_complex", linear=True),
    _moves(columns, "im2col col2im"),
    _moves(windows, "unfold"),
    _moves(packed, "_pack_padded_sequence _pad_packed_sequence"),
    _moves(shuffled, "channel_shuffle"),
    _moves(index, "index _unsafe_index"),
    _moves(index_select, "index_select"),
    _moves(
        fresh, "as_strided zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full bernoulli"
    ),
    _moves(write, "copy index_put masked_scatter"),
    _moves(place, "slice_scatter select_scatter"),
    _moves(scattered, "scatter scatter_reduce index_copy index_reduce", linear=False),
    _moves(scattered, "scatter_add index_add", linear=True),
    _moves(reduce, "sum nansum mean", linear=True),
    _moves(
        reduce,
        "amax amin max min var std norm linalg_vector_norm logsumexp prod any all argmax median var_mean std_mean nanmedian "
        "kthvalue mode aminmax",
        linear=False,
    ),
    _moves(
        grid,
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "fractional_max_pool2d max_unpool2d pad constant_pad_nd reflection_pad1d reflection_pad2d "
        "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
        linear=False,
    ),
    _moves(
        grid,
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d",
        linear=True,
    ),
    _moves(
        resample,
        "grid_sampler upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        linear=False,
    ),
    _moves(
        grid,
        "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn "
        "_fft_r2c _fft_c2r _fft_c2c",
    ),
    _moves(picked, "topk sort gather take_along_dim", linear=False),
    _moves(glu, "glu", linear=False),
    # losses
    _moves(classified, "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d multi_margin_loss", linear=False),
    _moves(transcribed, "_ctc_loss", linear=False),
    _moves(
        compared,
        "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div poisson_nll_loss "
        "soft_margin_loss dist",
        linear=False,
    ),
]


def _table(rows: list[dict[str, Operator]]) -> dict[str, Operator]:
    table: dict[str, Operator] = {}
    for row in rows:
        for name, operator in row.items():
            if name in table:
                message = f"two rules for {name}"
                raise ScalingError(message)
            table[name] = operator
    return table


OPERATORS: dict[str, Operator] = _table(_ROWS)
"""Operator name without overload -> its rule."""

_POINTWISE = Operator(signature=elementwise)


def rule_of(call: Call) -> Operator | None:
    """The rule of a call: its row of OPERATORS, or elementwise for what torch tags as pointwise."""
    return _rule(call.name, call.node.target)


def _rule(name: str, target: Any) -> Operator | None:
    if name in OPERATORS:
        return OPERATORS[name]
    return _POINTWISE if _is_pointwise(name, target) else None


def _is_pointwise(name: str, target: Any) -> bool:
    """By torch's tag on the operator, or on the one of which it is the in-place form."""
    functional = getattr(getattr(torch.ops.aten, name.removeprefix("aten."), None), "default", None)
    return any(torch.Tag.pointwise in getattr(operator, "tags", ()) for operator in (target, functional))


def written_out(operator: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """The composition of others that an operator without a rule is (`hstack`, `cosine_similarity`): they are recorded in its place."""
    if _rule(name_of(operator), operator) is not None or not any("Tensor" in str(r.type) for r in operator._schema.returns):
        return None
    if name_of(operator) in DISTANCES:
        return DISTANCES[name_of(operator)]
    try:
        return operator.decompose if operator._can_decompose() else None
    except RuntimeError:  # an operator of Python alone
        return None


def _distance(x: torch.Tensor, y: torch.Tensor, p: float = 2.0, _: int | None = None) -> torch.Tensor:
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, dim=-1)


def _distance_of_pairs(x: torch.Tensor, p: float = 2.0) -> torch.Tensor:
    first, second = torch.triu_indices(len(x), len(x), 1)
    return torch.linalg.vector_norm(x[first] - x[second], p, dim=-1)


DISTANCES = {"aten.cdist": _distance, "aten._cdist_forward": _distance, "aten._pdist_forward": _distance_of_pairs}
"""Operators without a rule that torch has no composition for: a norm of differences is no sum of products, and has a norm's size."""


def known(call: Call) -> bool:
    """Whether a call has a rule."""
    return rule_of(call) is not None


def register(name: str, signature: str) -> None:
    """Adds an operator by its signature, for example `register("mylib.scan", "b t c, c -> b t c")`.

    Args:
        name: namespace and name without overload: "aten.linear".
        signature: the tensor arguments in the schema's order, see the module's docstring.

    Raises:
        ScalingError: if the operator has a rule already, or the text is no signature.
    """
    if name in OPERATORS:
        message = f"{name} has a rule already: {OPERATORS[name]}"
        raise ScalingError(message)
    parse(signature)
    OPERATORS[name] = Operator(signature=signature)
