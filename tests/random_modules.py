"""Modules composed at random, each with what reading it gives: which axes of every weight are summed, kept or shared, and how they grow.

Nothing here looks at the library. A stream is a (batch, tokens, features) value; its feature axis is a list of segments, each a·d + b long.
Elementwise operators make the segments of their operands one and the same; a split cuts them, in every weight that has the axis.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

BATCH, TOKENS, VOCAB = 3, 7, 11


@dataclass(frozen=True)
class Size:
    """per·d + const."""

    per: Fraction = Fraction(0)
    const: int = 0

    def at(self, d):
        value = self.per * d + self.const
        assert value.denominator == 1 if isinstance(value, Fraction) else True
        return int(value)

    def __add__(self, other):
        return Size(self.per + other.per, self.const + other.const)

    def __sub__(self, other):
        return Size(self.per - other.per, self.const - other.const)

    def __mul__(self, number):
        return Size(self.per * number, int(self.const * number))


def grown(per=1):
    return Size(per=Fraction(per))


def fixed(n):
    return Size(const=n)


SAMPLE = (32, 48, 64)
"""Widths at which sizes are compared; every factor below divides them."""


def below(a, b):
    """a < b, a == b or a > b at all widths: -1, 0, 1; None if that depends on the width."""
    signs = {(x > y) - (x < y) for x, y in ((a.at(d), b.at(d)) for d in SAMPLE)}
    return signs.pop() if len(signs) == 1 else None


class Segment:
    """A piece of an axis. `fold`: the power of d by which q·k asks the maps that make it to be smaller; `heads`: cut only between those."""

    def __init__(self, size):
        self.size, self.parts, self.same, self.fold, self.heads = size, None, None, Fraction(0), False


def flat(axis):
    """The axis in segments that nothing has cut."""
    out = []
    for segment in axis:
        while segment.same is not None:
            segment = segment.same
        out += flat(segment.parts) if segment.parts else [segment]
    return out


def total(axis):
    return sum((segment.size for segment in axis), Size())


def new(size):
    return [Segment(size)]


def cut(axis, at):
    """The axis before and after `at`; None where the order of sizes depends on the width."""
    start, pieces = Size(), flat(axis)
    for i, piece in enumerate(pieces):
        stop = start + piece.size
        order = below(at, stop)
        if below(at, start) == 0:
            return pieces[:i], pieces[i:]
        if order == 0:
            return pieces[: i + 1], pieces[i + 1 :]
        if order is None or below(at, start) != 1:
            return None
        if order == -1 and piece.heads and (at - start).const:
            return None
        if order == -1:
            piece.parts = [Segment(at - start), Segment(stop - at)]
            for part in piece.parts:
                part.fold, part.heads = piece.fold, piece.heads
            return [*pieces[:i], piece.parts[0]], [piece.parts[1], *pieces[i + 1 :]]
        start = stop
    return None


def join(a, b):
    """Makes two axes of one length the same."""
    if total(a) != total(b):
        return False
    for one, other in ((a, b), (b, a)):
        at = Size()
        for piece in flat(one):
            at = at + piece.size
            if cut(other, at) is None:
                return False
    for x, y in zip(flat(a), flat(b), strict=True):
        if x is not y:
            assert x.size == y.size
            y.same, x.fold, x.heads = x, x.fold or y.fold, x.heads or y.heads
    return True


@dataclass(eq=False)
class Weight:
    """Per axis of the tensor the factors it is a product of, outermost first: (part, axis), the part "in", "out", "copy" or "lookup"."""

    axes: list


@dataclass(eq=False)
class Stream:
    axis: list
    tokens: bool = True
    used: bool = False


@dataclass(eq=False)
class Program:
    """`steps` has (module, inputs): a function (d, modules made so far) -> module, or the number of an earlier module to use again;
    `made` has the step that made each stream."""

    streams: list = field(default_factory=list)
    steps: list = field(default_factory=list)
    weights: dict = field(default_factory=dict)
    made: list = field(default_factory=lambda: [None, None])
    log: list = field(default_factory=list)

    def add(self, name, make, inputs, outputs, weights=None):
        """A step, which takes streams and adds new ones; `weights` are named relative to its module."""
        for stream in inputs:
            stream.used = True
        key = len(self.steps)
        self.steps.append((make, [self.streams.index(stream) for stream in inputs]))
        self.streams += outputs
        self.made += [key] * len(outputs)
        self.log.append(f"{name}({', '.join(str(self.streams.index(s)) for s in inputs)})")
        for suffix, axes in (weights or {}).items():
            self.weights[f"steps.{key}.{suffix}" if suffix else f"steps.{key}"] = Weight(axes)
        return key

    def build(self, d):
        return Composed(self, d)

    def args(self):
        return torch.zeros(BATCH, TOKENS, 5), torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % VOCAB

    def __repr__(self):
        return " ".join(self.log)


class Composed(nn.Module):
    def __init__(self, program, d):
        super().__init__()
        made = []
        for make, _ in program.steps:
            made.append(made[make] if isinstance(make, int) else make(d, made))
        self.steps = nn.ModuleList(made)
        self.wiring = [inputs for _, inputs in program.steps]
        self.returned = [i for i, stream in enumerate(program.streams) if not stream.used]

    def forward(self, x, ids):
        streams = [x, ids]
        for step, inputs in zip(self.steps, self.wiring, strict=True):
            out = step(*(streams[i] for i in inputs))
            streams += out if isinstance(out, (tuple, list)) else [out]
        return [streams[i] for i in self.returned]


class Function(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, *args):
        return self.run(*args)


class Parameters(nn.Module):
    """A function of named parameters, drawn at random."""

    def __init__(self, run, **shapes):
        super().__init__()
        self.run = run
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape)))

    def forward(self, *args):
        return self.run(self, *args)


# --- what programs are made of: each takes `draw` and the program, and adds steps, or returns without doing anything -------------------


def pick(draw, program, *, tokens=None, single=None, grows=None, least=1):
    """A stream that has what is asked for."""
    found = [
        stream
        for stream in program.streams[2:]
        if (tokens is None or stream.tokens == tokens)
        and (single is None or (len(flat(stream.axis)) == 1) == single)
        and (grows is None or all((segment.size.per > 0) == grows and not segment.size.const * grows for segment in flat(stream.axis)))
        and total(stream.axis).at(SAMPLE[0]) >= least
    ]
    return draw(st.sampled_from(found)) if found else None


def size_of(draw):
    return draw(st.sampled_from([grown(), grown(), grown(2), grown(Fraction(1, 2)), grown(Fraction(3, 2)), fixed(2), fixed(4), fixed(5)]))


FORMS: dict[str, Callable] = {
    "F.linear": lambda m, x: F.linear(x, m.w),
    "x @ w.T": lambda m, x: x @ m.w.T,
    "einsum": lambda m, x: torch.einsum("oi,bti->bto", m.w, x),
    "bmm": lambda m, x: torch.bmm(x, m.w.t().expand(len(x), -1, -1)),
    "transposed": lambda m, x: (m.w @ x.transpose(1, 2)).transpose(1, 2),
    "tensordot": lambda m, x: torch.tensordot(x, m.w, dims=([2], [1])),
}
TURNED: dict[str, Callable] = {
    "x @ w": lambda m, x: x @ m.w,
    "addmm": lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w).unflatten(0, (len(x), -1)),
    "einsum": lambda m, x: torch.einsum("bti,io->bto", x, m.w),
    "chunks": lambda m, x: torch.cat([x @ part for part in m.w.chunk(2, 1)], -1),
}


def linear(draw, program):
    source, out = pick(draw, program), new(size_of(draw))
    bias = draw(st.booleans())
    form = draw(st.sampled_from(["nn.Linear", *FORMS, *(f"({f})" for f in TURNED)]))
    rows, columns = total(out), total(source.axis)
    weights = {"w": [[("out", out)], [("in", source.axis)]]}
    if form == "nn.Linear":

        def make(d, _):
            return nn.Linear(columns.at(d), rows.at(d), bias=bias)

        weights = {"weight": weights["w"]} | ({"bias": [[("out", out)]]} if bias else {})
    elif form in FORMS:

        def make(d, _):
            return Parameters(FORMS[form], w=(rows.at(d), columns.at(d)))
    else:
        name = form.strip("()")

        def make(d, _):
            return Parameters(TURNED[name], w=(columns.at(d), rows.at(d)), **({"b": (rows.at(d),)} if name == "addmm" else {}))

        if name == "chunks" and not all(rows.at(d) % 2 == 0 for d in SAMPLE):
            return
        if name == "chunks":
            cut(out, rows * Fraction(1, 2))
        weights = {"w": weights["w"][::-1]} | ({"b": [[("out", out)]]} if name == "addmm" else {})
    program.add(f"{form}->{rows}", make, [source], [Stream(out, source.tokens)], weights)


def norm(draw, program):
    source = pick(draw, program)
    kind = draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))
    size = total(source.axis)
    program.add(
        kind.__name__, lambda d, _: kind(size.at(d)), [source], [Stream(source.axis, source.tokens)],
        {"weight": [[("copy", source.axis)]]} | ({"bias": [[("out", source.axis)]]} if kind is nn.LayerNorm else {}),
    )  # fmt: skip


def channel_norm(draw, program):
    source = pick(draw, program, tokens=True)
    kind = draw(st.sampled_from(["batch", "group", "instance"]))
    size = total(source.axis)
    if kind == "group" and (not all(size.at(d) % 2 == 0 for d in SAMPLE) or len(flat(source.axis)) > 1):
        return

    def make(d, _):
        n = size.at(d)
        layer = {"batch": nn.BatchNorm1d, "group": lambda n: nn.GroupNorm(2, n), "instance": lambda n: nn.InstanceNorm1d(n, affine=True)}
        return Channels(layer[kind](n))

    weights = {"inner.weight": [[("copy", source.axis)]], "inner.bias": [[("out", source.axis)]]}
    program.add(f"{kind}_norm", make, [source], [Stream(source.axis, True)], weights)


class Channels(nn.Module):
    """A layer over (batch, channels, positions)."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


ACTIVATIONS = {
    "relu": torch.relu, "gelu": F.gelu, "tanh": torch.tanh, "silu": F.silu, "softplus": F.softplus, "dropout": nn.Dropout(0.1),
    "flip": lambda x: x.flip(1), "cumsum": lambda x: x.cumsum(1), "roll": lambda x: torch.roll(x, 1, 1), "softmax": lambda x: x.softmax(1),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "double transpose": lambda x: x.permute(2, 0, 1).movedim(0, -1), "flatten": lambda x: x.flatten(0, 1).unflatten(0, (BATCH, -1)),
    "rows": lambda x: torch.stack(list(x)), "unbind": lambda x: torch.stack(x.unbind(1), 1), "clamp": lambda x: x.clamp(-1, 1),
    "mean of two": lambda x: torch.stack([x, x.sigmoid()]).mean(0), "in place": lambda x: torch.zeros_like(x).copy_(x).add_(1.0),
    "indices": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)], "boolean": lambda x: torch.where(x > 0, x, 0.1 * x),
    "gather": lambda x: x.gather(1, torch.zeros(x.shape, dtype=torch.long)), "expand": lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1)[:, 1],
    "square": lambda x: x.square(), "repeat": lambda x: x.repeat(1, 2, 1)[:, : x.shape[1]],
}  # fmt: skip


def activation(draw, program):
    source, name = pick(draw, program), draw(st.sampled_from(list(ACTIVATIONS)))
    program.add(name, lambda d, _: Function(ACTIVATIONS[name]), [source], [Stream(source.axis, source.tokens)])


def elementwise(draw, program):
    """Residuals and products of two streams of one length."""
    first = pick(draw, program)
    others = [s for s in program.streams[2:] if total(s.axis) == total(first.axis)]
    second = draw(st.sampled_from(others))
    name, run = draw(st.sampled_from(list(
        {"add": torch.add, "mul": torch.mul, "sub": torch.sub, "lerp": lambda x, y: torch.lerp(x, y, 0.5), "max": torch.maximum,
         "gate": lambda x, y: x * y.sigmoid(), "where": lambda x, y: torch.where(y > 0, x, y), "stack": lambda x, y: _stacked(x, y)}.items()
    )))  # fmt: skip
    if not join(first.axis, second.axis):
        return
    program.add(name, lambda d, _: Function(run), [first, second], [Stream(first.axis, first.tokens or second.tokens)])


def _stacked(x, y):
    x, y = torch.broadcast_tensors(x, y)
    return torch.stack([x, y], -1).amax(-1)


def concatenate(draw, program):
    first, second = pick(draw, program), pick(draw, program)
    if first.tokens != second.tokens:
        return
    axis = flat(first.axis) + flat(second.axis)
    program.add("cat", lambda d, _: Function(lambda x, y: torch.cat([x, y], -1)), [first, second], [Stream(axis, first.tokens)])


def split(draw, program):
    """Two parts of the features: where segments meet, a growing and a fixed part, or halves."""
    source = pick(draw, program, least=2)
    size = total(source.axis)
    ends = [Size()]
    for segment in flat(source.axis):
        ends.append(ends[-1] + segment.size)
    places = ends[1:-1] + [
        at for at in (size * Fraction(1, 2), fixed(2), size - fixed(2)) if all(0 < at.at(d) < size.at(d) for d in SAMPLE)
    ]
    places = [at for at in places if all((at.per * d).denominator == 1 for d in SAMPLE) and below(at, size) == -1]
    if not places:
        return
    at = draw(st.sampled_from(places))
    parts = cut(source.axis, at)
    if parts is None:
        return
    how = draw(st.sampled_from(["split", "slice", "narrow", "tensor_split"]))

    def run(x, n):
        if how == "split":
            return x.split([n, x.shape[-1] - n], -1)
        if how == "slice":
            return x[..., :n], x[..., n:]
        if how == "narrow":
            return x.narrow(-1, 0, n), x.narrow(2, n, x.shape[2] - n)
        return torch.tensor_split(x, (n,), dim=-1)

    program.add(
        f"{how} at {at}", lambda d, _: Function(lambda x: run(x, at.at(d))), [source], [Stream(part, source.tokens) for part in parts]
    )


def gated(draw, program):
    """GLU and its kin: halves of one map, multiplied."""
    source, half = pick(draw, program), size_of(draw)
    a, b = new(half), new(half)
    out = a + b
    columns = total(source.axis)
    run = draw(st.sampled_from([
        lambda y: F.glu(y, -1), lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
        lambda y: torch.mul(*y.unflatten(-1, (2, -1)).unbind(-2)),
    ]))  # fmt: skip
    join(a, b)
    program.add(
        "glu", lambda d, _: nn.Sequential(nn.Linear(columns.at(d), 2 * half.at(d)), Function(run)), [source], [Stream(a, source.tokens)],
        {"0.weight": [[("out", out)], [("in", source.axis)]], "0.bias": [[("out", out)]]},
    )  # fmt: skip


class Attention(nn.Module):
    def __init__(self, query, other, heads, key_heads, head, out, written, rotary):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(query, heads * head), nn.Linear(other, key_heads * head), nn.Linear(other, key_heads * head)
        self.o = nn.Linear(heads * head, out, bias=False)
        self.heads, self.key_heads, self.written, self.rotary = heads, key_heads, written, rotary

    def forward(self, x, y):
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (m(y).view(len(y), y.shape[1], self.key_heads, -1).transpose(1, 2) for m in (self.k, self.v))
        if self.rotary:
            q, k = (torch.cat([-a[..., a.shape[-1] // 2 :], a[..., : a.shape[-1] // 2]], -1) * 0.3 + a for a in (q, k))
        k, v = (z.repeat_interleave(self.heads // self.key_heads, 1) for z in (k, v))
        z = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v if self.written else F.scaled_dot_product_attention(q, k, v)
        return self.o(z.transpose(1, 2).flatten(2))


def attention(draw, program):
    """Self or cross attention; heads or the head dimension grow; keys of fewer heads."""
    x, y = pick(draw, program), pick(draw, program)
    heads_grow = draw(st.booleans())
    heads, head = (grown(Fraction(1, 8)), fixed(8)) if heads_grow else (fixed(4), grown(Fraction(1, 4)))
    key_heads = draw(st.sampled_from([heads, fixed(2)] if heads_grow else [heads, fixed(2), fixed(1)]))
    written, rotary, out = draw(st.booleans()), draw(st.booleans()), new(size_of(draw))
    columns, others, rows = total(x.axis), total(y.axis), total(out)
    share = Fraction(1) if key_heads == heads else Fraction(key_heads.const, 4)
    keys = fixed(16) if heads_grow and key_heads != heads else grown(share)
    q, k, v, inner = new(grown()), new(keys), new(keys), new(grown())
    q[0].fold = Fraction(0) if heads_grow else Fraction(-1, 2)
    weights = {
        "q.weight": [[("out", q)], [("in", x.axis)]], "q.bias": [[("out", q)]],
        "k.weight": [[("out", k)], [("in", y.axis)]], "k.bias": [[("out", k)]],
        "v.weight": [[("out", v)], [("in", y.axis)]], "v.bias": [[("out", v)]],
        "o.weight": [[("out", out)], [("in", inner)]],
    }  # fmt: skip

    def make(d, _):
        return Attention(columns.at(d), others.at(d), heads.at(d), key_heads.at(d), head.at(d), rows.at(d), written, rotary)

    program.add(f"attention[{heads} {key_heads} {head}]", make, [x, y], [Stream(out, x.tokens)], weights)


class MultiHead(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.inner = nn.MultiheadAttention(size, heads, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


def multihead(draw, program):
    """nn.MultiheadAttention on one stream."""
    x = pick(draw, program, grows=True)
    if x is None or not all(total(x.axis).at(d) % 8 == 0 for d in SAMPLE):
        return
    size, heads_grow = total(x.axis), draw(st.booleans())
    parts, out, inner = [new(size) for _ in range(3)], new(size), new(size)
    parts[0][0].fold = Fraction(0) if heads_grow else Fraction(-1, 2)
    rows = [segment for part in parts for segment in part]
    program.add(
        f"nn.MultiheadAttention[{heads_grow}]", lambda d, _: MultiHead(size.at(d), size.at(d) // 8 if heads_grow else 2), [x],
        [Stream(out, x.tokens)],
        {"inner.in_proj_weight": [[("out", rows)], [("in", x.axis)]], "inner.in_proj_bias": [[("out", rows)]],
         "inner.out_proj.weight": [[("out", out)], [("in", inner)]], "inner.out_proj.bias": [[("out", out)]]},
    )  # fmt: skip


def convolution(draw, program):
    """Along the tokens: dense, in a fixed number of groups, in groups of a fixed size, depthwise; strided; transposed."""
    kind = draw(st.sampled_from(["dense", "two groups", "groups of four", "depthwise", "transposed"]))
    source = pick(draw, program, tokens=True) if kind != "groups of four" else pick(draw, program, tokens=True, single=True, grows=True)
    if kind == "two groups":
        source = pick(draw, program, tokens=True, single=True, least=2)
    if source is None:
        return
    size, taps = total(source.axis), draw(st.sampled_from([1, 3]))
    rows = size if kind == "depthwise" else size_of(draw)
    if kind == "groups of four":
        rows = size
    if kind == "two groups" and not all(size.at(d) % 2 == 0 and rows.at(d) % 2 == 0 for d in SAMPLE):
        return
    out = source.axis if kind == "depthwise" else new(rows)
    groups = {"two groups": fixed(2), "groups of four": size * Fraction(1, 4), "depthwise": size}.get(kind, fixed(1))
    k = ("in", new(fixed(taps)))
    half = Fraction(1, 2)
    axes = {
        "dense": [[("out", out)], [("in", source.axis)], [k]],
        "two groups": [[("copy", new(fixed(2))), ("out", new(rows * half))], [("in", new(size * half))], [k]],
        "groups of four": [[("copy", new(groups)), ("out", new(fixed(4)))], [("in", new(fixed(4)))], [k]],
        "depthwise": [[("copy", source.axis)], [("in", new(fixed(1)))], [k]],
        "transposed": [[("in", source.axis)], [("out", out)], [k]],
    }[kind]

    def make(d, _):
        layer = nn.ConvTranspose1d if kind == "transposed" else nn.Conv1d
        return Channels(layer(size.at(d), rows.at(d), taps, padding=taps // 2, groups=groups.at(d)))

    program.add(
        f"conv {kind} k={taps}->{rows}", make, [source], [Stream(out, True)], {"inner.weight": axes, "inner.bias": [[("out", out)]]}
    )


def per_head(draw, program):
    """Features in heads: one map for all heads, or a bank of one for each."""
    source = pick(draw, program, single=True, grows=True)
    if source is None or not all(total(source.axis).at(d) % 8 == 0 for d in SAMPLE):
        return
    size, heads_grow, bank = total(source.axis), draw(st.booleans()), draw(st.booleans())
    flat(source.axis)[0].heads = True
    heads, head = (size * Fraction(1, 8), fixed(8)) if heads_grow else (fixed(4), size * Fraction(1, 4))
    out = new(size)
    flat(out)[0].heads = True
    rows, columns = new(head), new(head)
    if bank:

        def make(d, _):
            run = lambda m, x: torch.einsum("bthi,hio->btho", x.unflatten(-1, (heads.at(d), -1)), m.w).flatten(2)  # noqa: E731
            return Parameters(run, w=(heads.at(d), head.at(d), head.at(d)))

        axes = [[("copy", new(heads))], [("in", columns)], [("out", rows)]]
    else:

        def make(d, _):
            run = lambda m, x: F.linear(x.reshape(len(x), -1, heads.at(d), head.at(d)), m.w).reshape(len(x), -1, size.at(d))  # noqa: E731
            return Parameters(run, w=(head.at(d), head.at(d)))

        axes = [[("out", rows)], [("in", columns)]]
    program.add(f"per head[{heads} {head} {bank}]", make, [source], [Stream(out, source.tokens)], {"w": axes})


def experts(draw, program):
    """A bank of maps over one input, mixed by a router."""
    source, out = pick(draw, program), new(size_of(draw))
    inner = new(size_of(draw))
    columns, hidden, rows = total(source.axis), total(inner), total(out)

    def run(m, x):
        gates = F.linear(x, m.router).softmax(-1)
        h = torch.einsum("bti,ein->bten", x, m.up).relu()
        return torch.einsum("bten,eno,bte->bto", h, m.down, gates)

    program.add(
        f"experts[{hidden} {rows}]",
        lambda d, _: Parameters(
            run, router=(3, columns.at(d)), up=(3, columns.at(d), hidden.at(d)), down=(3, hidden.at(d), rows.at(d))
        ),
        [source], [Stream(out, source.tokens)],
        {"router": [[("out", new(fixed(3)))], [("in", source.axis)]],
         "up": [[("copy", new(fixed(3)))], [("in", source.axis)], [("out", inner)]],
         "down": [[("copy", new(fixed(3)))], [("in", inner)], [("out", out)]]},
    )  # fmt: skip


def low_rank(draw, program):
    """A product of two thin matrices, merged before it meets data, or an adapter beside a matrix."""
    source, out, merged = pick(draw, program), new(size_of(draw)), draw(st.booleans())
    rank, columns, rows = new(draw(st.sampled_from([fixed(2), fixed(3), grown(Fraction(1, 2))]))), total(source.axis), total(out)
    r = total(rank)

    def run(m, x):
        return F.linear(x, m.w + m.b @ m.a) if merged else F.linear(x, m.w) + x @ m.a.T @ m.b.T

    program.add(
        f"low rank[{r} {merged}]",
        lambda d, _: Parameters(run, w=(rows.at(d), columns.at(d)), a=(r.at(d), columns.at(d)), b=(rows.at(d), r.at(d))),
        [source], [Stream(out, source.tokens)],
        {"w": [[("out", out)], [("in", source.axis)]], "a": [[("out", rank)], [("in", source.axis)]],
         "b": [[("out", out)], [("in", rank)]]},
    )  # fmt: skip


def vectors(draw, program):
    """Gains, biases, tokens and tables of them; a scalar."""
    source = pick(draw, program)
    kinds = {
        "gain": (lambda m, x: x * m.w, lambda n: (n,), [[("copy", source.axis)]]),
        "bias": (lambda m, x: m.w + x, lambda n: (1, 1, n), [[], [], [("out", source.axis)]]),
        "scalar": (lambda m, x: x * m.w.tanh(), lambda n: (1,), [[]]),
        "positions": (
            lambda m, x: x + m.w[: x.shape[1]],
            lambda n: (TOKENS, n),
            [[("lookup", new(fixed(TOKENS)))], [("out", source.axis)]],
        ),
        "exponential": (lambda m, x: x * -m.w.exp(), lambda n: (n,), [[("copy", source.axis)]]),
    }
    name = draw(st.sampled_from(list(kinds)))
    run, shape, axes = kinds[name]
    size = total(source.axis)
    program.add(name, lambda d, _: Parameters(run, w=shape(size.at(d))), [source], [Stream(source.axis, source.tokens)], {"w": axes})


def embedding(draw, program):
    out = new(size_of(draw))
    size = total(out)
    how = draw(st.sampled_from(["nn.Embedding", "w[ids]", "index_select"]))
    run = {
        "w[ids]": lambda m, ids: m.w[ids],
        "index_select": lambda m, ids: m.w.index_select(0, ids.flatten()).view(*ids.shape, -1),
    }

    def make(d, _):
        return nn.Embedding(VOCAB, size.at(d)) if how == "nn.Embedding" else Parameters(run[how], w=(VOCAB, size.at(d)))

    axes = [[("lookup", new(fixed(VOCAB)))], [("out", out)]]
    program.add(how, make, [program.streams[1]], [Stream(out)], {"weight" if how == "nn.Embedding" else "w": axes})


def pooled(draw, program):
    source = pick(draw, program, tokens=True)
    run = draw(st.sampled_from([
        lambda x: x.mean(1, keepdim=True), lambda x: x.amax(1).unsqueeze(1), lambda x: x[:, :1], lambda x: x[:, -1, None],
        lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1).transpose(1, 2),
    ]))  # fmt: skip
    program.add("pool", lambda d, _: Function(run), [source], [Stream(source.axis, tokens=False)])


def token_mixing(draw, program):
    """An MLP along the tokens, whose hidden size may grow."""
    source, hidden = pick(draw, program, tokens=True), new(size_of(draw))
    size = total(hidden)
    program.add(
        f"token mixing[{size}]",
        lambda d, _: Channels(nn.Sequential(nn.Linear(TOKENS, size.at(d)), nn.GELU(), nn.Linear(size.at(d), TOKENS))),
        [source], [Stream(source.axis)],
        {"inner.0.weight": [[("out", hidden)], [("in", new(fixed(TOKENS)))]], "inner.0.bias": [[("out", hidden)]],
         "inner.2.weight": [[("out", new(fixed(TOKENS)))], [("in", hidden)]], "inner.2.bias": [[("out", new(fixed(TOKENS)))]]},
    )  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self, kind, columns, size, both):
        super().__init__()
        self.inner = kind(columns, size, batch_first=True, bidirectional=both)

    def forward(self, x):
        return self.inner(x)[0]


def recurrent(draw, program):
    source, size = pick(draw, program, tokens=True), size_of(draw)
    kind, both = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN])), draw(st.booleans())
    gates, columns = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind], total(source.axis)
    weights, axis = {}, new(size)
    for suffix in ("_l0", "_l0_reverse")[: 1 + both]:
        rows = [("copy", new(fixed(gates))), ("out", new(size))]
        weights |= {
            f"inner.weight_ih{suffix}": [rows, [("in", source.axis)]], f"inner.weight_hh{suffix}": [rows, [("in", new(size))]],
            f"inner.bias_ih{suffix}": [rows], f"inner.bias_hh{suffix}": [rows],
        }  # fmt: skip
    program.add(
        f"{kind.__name__}[{both}]->{size}", lambda d, _: Recurrent(kind, columns.at(d), size.at(d), both), [source],
        [Stream(new(size * 2) if both else axis)], weights,
    )  # fmt: skip


def bilinear(draw, program):
    """Two streams: nn.Bilinear with three axes, or the product of a map of each."""
    x, y, out = pick(draw, program), pick(draw, program), new(size_of(draw))
    if x.tokens != y.tokens:
        return
    a, b, rows = total(x.axis), total(y.axis), total(out)
    if draw(st.booleans()):
        program.add(
            "two maps", lambda d, _: Parameters(lambda m, p, q: (p @ m.a) * (q @ m.b), a=(a.at(d), rows.at(d)), b=(b.at(d), rows.at(d))),
            [x, y], [Stream(out, x.tokens)], {"a": [[("in", x.axis)], [("out", out)]], "b": [[("in", y.axis)], [("out", out)]]},
        )  # fmt: skip
        return
    program.add(
        f"nn.Bilinear->{rows}", lambda d, _: nn.Bilinear(a.at(d), b.at(d), rows.at(d)), [x, y], [Stream(out, x.tokens)],
        {"weight": [[("out", out)], [("in", x.axis)], [("in", y.axis)]], "bias": [[("out", out)]]},
    )  # fmt: skip


def again(draw, program):
    """A module that was used before, on another stream of the same length."""
    known = [
        (key, stream, inputs)
        for key, (make, inputs) in enumerate(program.steps)
        if not isinstance(make, int)
        and len(inputs) == 1
        and inputs[0] > 1
        and any(name.startswith(f"steps.{key}.") for name in program.weights)
        for stream in program.streams[2:]
        if total(stream.axis) == total(program.streams[inputs[0]].axis) and stream.tokens == program.streams[inputs[0]].tokens
    ]
    if not known:
        return
    key, stream, inputs = draw(st.sampled_from(known))
    made = [i for i, step in enumerate(program.made) if step == key]
    if len(made) != 1 or not join(program.streams[inputs[0]].axis, stream.axis):
        return
    first = program.streams[made[0]]
    program.add(f"again {key}", key, [stream], [Stream(first.axis, first.tokens)])


STEPS = [
    linear, linear, linear, norm, channel_norm, activation, activation, elementwise, elementwise, concatenate, split, gated, attention,
    multihead, convolution, convolution, per_head, experts, low_rank, vectors, embedding, pooled, token_mixing, recurrent, bilinear,
    again, again,
]  # fmt: skip


@st.composite
def programs(draw, most=7):
    """A program of up to `most` steps after the first, and a readout."""
    program = Program(streams=[Stream(new(fixed(5))), Stream([])])
    first = program.streams[0]
    out = new(grown())
    program.add(
        "first", lambda d, _: nn.Linear(5, d), [first], [Stream(out)],
        {"weight": [[("out", out)], [("in", first.axis)]], "bias": [[("out", out)]]},
    )  # fmt: skip
    program.streams[1].used = True
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=most)):
        step(draw, program)
    return program


# --- what reading a program gives -------------------------------------------------------------------------------------------------------


def entries(weight, shape, d):
    """One entry for every combination of the pieces that a weight's axes have: its index, and how the pieces it is in grow."""
    options = []
    for axis, length in zip(weight.axes, shape, strict=True):
        pieces = [[]]
        for part, segments in axis:
            flattened = flat(segments)
            assert flattened
            start, choices = 0, []
            for segment in flattened:
                n = segment.size.at(d)
                choices.append((start + n // 2, total(flattened).at(d), part, segment))
                start += n
            pieces = [[*before, choice] for before in pieces for choice in choices]
        rows = []
        for piece in pieces:
            index, size = 0, 1
            for at, n, _, _ in piece:
                index, size = index * n + at, size * n
            assert size == length, "the generator knows its own shapes"
            rows.append((index, [(part, segment) for _, _, part, segment in piece]))
        options.append(rows)
    for combination in product(*options):
        yield tuple(index for index, _ in combination), [pair for _, pairs in combination for pair in pairs]


def growth(segment, widths=SAMPLE):
    """The power of d fitted to the length at several widths: segments are fixed, or grow in proportion up to a constant."""
    sizes = [segment.size.at(d) for d in widths]
    slope = Fraction(sizes[-1] - sizes[0], widths[-1] - widths[0])
    assert all(size == sizes[0] + slope * (d - widths[0]) for size, d in zip(sizes, widths, strict=True))
    return int(slope > 0)


def expected(pairs):
    """The exponents of an entry's rules, by the formulas of the spectral condition."""
    power = {part: sum(growth(segment) for p, segment in pairs if p == part) for part in ("in", "out", "copy")}
    fold = sum((segment.fold for part, segment in pairs if part in {"out", "copy"}), Fraction(0))
    fan_in, fan_out, copies = power["in"], power["out"], power["copy"]
    return {
        "fan_in": fan_in,
        "fan_out·copies": fan_out + copies,
        "init_std": fold - Fraction(fan_in, 2) + min(Fraction(0), Fraction(fan_out - fan_in, 2)),
        "sgd": 2 * fold + copies + fan_out - fan_in,
        "adam": fold - fan_in,
        "muon": fold + Fraction(fan_out - fan_in, 2),
        "eps": -fold - copies - fan_out,
    }


def too_many(weight):
    """Whether more than two axes grow."""
    return sum(any(growth(segment) for _, segments in axis for segment in flat(segments)) for axis in weight.axes) > 2
