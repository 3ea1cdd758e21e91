"""Attention and its relatives, feed-forward blocks, experts, adapters."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .model import Handwritten, between, floats, tokens

HEAD = 4
QKVO_ROLES = "hidden: inner.q.weight inner.k.weight inner.v.weight inner.o.weight\nvector: inner.*.bias"


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge(x):
    return x.transpose(-3, -2).flatten(-2)


class QKVO(nn.Module):
    def __init__(self, d, heads=None, bias=True):
        super().__init__()
        self.heads = heads or d // HEAD
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=bias) for _ in range(4))

    def qkv(self, x):
        return (split(map_(x), self.heads) for map_ in (self.q, self.k, self.v))


class Softmax(QKVO):
    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.o(merge(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v))


class Einsum(QKVO):
    def forward(self, x):
        q, k, v = (map_(x).view(*x.shape[:2], self.heads, -1) for map_ in (self.q, self.k, self.v))
        p = torch.einsum("bqhe,bkhe->bhqk", q, k).softmax(-1)
        return self.o(torch.einsum("bhqk,bkhe->bqhe", p, v).flatten(2))


class Alibi(QKVO):
    def forward(self, x):
        q, k, v = self.qkv(x)
        t = torch.arange(x.shape[1])
        slopes = 2.0 ** -torch.arange(1, self.heads + 1, dtype=torch.float32)
        bias = -slopes[:, None, None] * (t[:, None] - t).abs()
        return self.o(merge(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


class Linearised(QKVO):
    def forward(self, x):
        q, k, v = self.qkv(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = k.mT @ v
        normalizer = (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        return self.o(merge(q @ kv / normalizer))


class Retention(QKVO):
    def forward(self, x):
        q, k, v = self.qkv(x)
        t = torch.arange(x.shape[1])
        decay = torch.tril(0.9 ** (t[:, None] - t).clamp(min=0).float())
        return self.o(merge((q @ k.mT * decay) @ v))


class RotaryNormed(QKVO):
    def __init__(self, d):
        super().__init__(d, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)

    def forward(self, x):
        q, k, v = self.qkv(x)
        angles = torch.outer(torch.arange(x.shape[1]).float(), 10.0 ** -torch.arange(HEAD // 2).float())
        cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))

        def rotate(y):
            left, right = y.chunk(2, -1)
            return y * cos + torch.cat([-right, left], -1) * sin

        q, k = rotate(self.q_norm(q)), rotate(self.k_norm(k))
        return self.o(merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class RelativeTable(QKVO):
    def __init__(self, d):
        super().__init__(d)
        self.table = nn.Embedding(9, self.heads)

    def forward(self, x):
        q, k, v = self.qkv(x)
        t = torch.arange(x.shape[1])
        bias = self.table((t[:, None] - t).clamp(-4, 4) + 4).permute(2, 0, 1)
        return self.o(merge(((q @ k.mT) / HEAD**0.5 + bias).softmax(-1) @ v))


class Fused(nn.Module):
    """q‖k‖v in one weight; `layout` is how its rows are ordered."""

    def __init__(self, d, layout):
        super().__init__()
        self.layout, self.heads = layout, d // HEAD
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        qkv = self.qkv(x)
        if self.layout == "chunk":
            q, k, v = (split(part, self.heads) for part in qkv.chunk(3, -1))
        elif self.layout == "3hd":
            q, k, v = qkv.view(*x.shape[:2], 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = qkv.view(*x.shape[:2], self.heads, 3, HEAD).transpose(1, 2).unbind(-2)
        return self.o(merge(F.scaled_dot_product_attention(q, k, v)))


class Grouped(nn.Module):
    """Two queries to a key and value."""

    def __init__(self, d):
        super().__init__()
        self.heads = d // HEAD
        self.q, self.k, self.v, self.o = nn.Linear(d, d), nn.Linear(d, d // 2), nn.Linear(d, d // 2), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = split(self.q(x), self.heads), split(self.k(x), self.heads // 2), split(self.v(x), self.heads // 2)
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        return self.o(merge(F.scaled_dot_product_attention(q, k, v)))


class MultiQuery(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.heads = d // HEAD
        self.q, self.kv, self.o = nn.Linear(d, d), nn.Linear(d, 2 * HEAD), nn.Linear(d, d)

    def forward(self, x):
        q = split(self.q(x), self.heads)
        k, v = self.kv(x).unsqueeze(1).chunk(2, -1)
        return self.o(merge((q @ k.mT / HEAD**0.5).softmax(-1) @ v))


class Latent(nn.Module):
    """Multi-head latent attention: keys and values through a narrow latent that grows too."""

    def __init__(self, d):
        super().__init__()
        self.heads = d // HEAD
        self.q, self.down, self.up, self.o = nn.Linear(d, d), nn.Linear(d, d // 2), nn.Linear(d // 2, 2 * d), nn.Linear(d, d)
        self.norm = nn.RMSNorm(d // 2)

    def forward(self, x):
        q = split(self.q(x), self.heads)
        k, v = split(self.up(self.norm(self.down(x))), self.heads).chunk(2, -1)
        return self.o(merge(F.scaled_dot_product_attention(q, k, v)))


class Cross(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.first, self.memory, self.last = nn.Linear(7, d), nn.Linear(6, 2 * d), nn.Linear(d, 5)
        self.attention = nn.MultiheadAttention(d, d // HEAD, kdim=2 * d, vdim=2 * d, batch_first=True)

    def forward(self, x, memory):
        x, memory = self.first(x), self.memory(memory)
        return self.last(self.attention(x, memory, memory, need_weights=False)[0])


class SelfAttention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attention = nn.MultiheadAttention(d, d // HEAD, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Seq2Seq(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, d), nn.Linear(d, 11)
        self.transformer = nn.Transformer(d, d // HEAD, 1, 1, 2 * d, batch_first=True)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.out(self.transformer(self.embed(source), self.embed(target), tgt_mask=mask))


class Pooled(nn.Module):
    """A learned query pools the sequence: set transformer, attention pooling."""

    def __init__(self, d):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(3, d))
        self.k, self.v = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        weights = (self.queries @ self.k(x).mT / x.shape[-1] ** 0.5).softmax(-1)
        return weights @ self.v(x)


class SwiGLU(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.gate_up, self.down = nn.Linear(d, 6 * d, bias=False), nn.Linear(3 * d, d, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Parallel(nn.Module):
    """Attention and feed-forward from one fused projection, in parallel (PaLM, GPT-J)."""

    def __init__(self, d):
        super().__init__()
        self.heads, self.norm = d // HEAD, nn.LayerNorm(d)
        self.inward, self.outward = nn.Linear(d, 3 * d + 4 * d, bias=False), nn.Linear(d + 4 * d, d, bias=False)

    def forward(self, x):
        d = x.shape[-1]
        q, k, v, h = self.inward(self.norm(x)).split([d, d, d, 4 * d], -1)
        a = merge(F.scaled_dot_product_attention(*(split(y, self.heads) for y in (q, k, v))))
        return x + self.outward(torch.cat([a, F.gelu(h)], -1))


class InOut(nn.Module):
    """Weights stored (in, out), used by @ and addmm."""

    def __init__(self, d):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(d, 4 * d)), nn.Parameter(torch.zeros(4 * d, d))
        self.b_up, self.b_down = nn.Parameter(torch.zeros(4 * d)), nn.Parameter(torch.zeros(d))

    def forward(self, x):
        h = F.gelu(x @ self.up + self.b_up)
        return torch.addmm(self.b_down, h.flatten(0, 1), self.down).view_as(x)


class Bilinear(nn.Module):
    """Scores of pairs by an nn.Bilinear with few outputs and a growing pair of inputs."""

    def __init__(self, d):
        super().__init__()
        self.u, self.v, self.pair = nn.Linear(7, d), nn.Linear(6, d), nn.Bilinear(d, d, 3)

    def forward(self, x, y):
        return self.pair(torch.tanh(self.u(x)), torch.tanh(self.v(y)))


class ExpertsLoop(nn.Module):
    def __init__(self, d, experts=4):
        super().__init__()
        self.router = nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)) for _ in range(experts))

    def forward(self, x):
        flat = x.flatten(0, 1)
        scores, picked = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(picked == e)
            if rows.numel() == 0:
                continue
            out.index_add_(0, rows, expert(flat[rows]) * scores[rows, slots, None])
        return out.view_as(x)


class ExpertsStacked(nn.Module):
    def __init__(self, d, experts=4):
        super().__init__()
        self.router = nn.Parameter(torch.zeros(d, experts))
        self.up, self.down = nn.Parameter(torch.zeros(experts, d, 2 * d)), nn.Parameter(torch.zeros(experts, 2 * d, d))

    def forward(self, x):
        p = (x @ self.router).softmax(-1)
        h = F.relu(torch.einsum("btd,edf->betf", x, self.up))
        return torch.einsum("betd,bte->btd", torch.einsum("betf,efd->betd", h, self.down), p)


class ExpertsPicked(nn.Module):
    """Each token gathers its own expert's weights."""

    def __init__(self, d, experts=4):
        super().__init__()
        self.router, self.bank = nn.Linear(d, experts), nn.Parameter(torch.zeros(experts, d, d))

    def forward(self, x):
        p, e = self.router(x).softmax(-1).max(-1)
        return torch.einsum("btd,btdf->btf", x, self.bank[e]) * p[..., None]


class Lora(nn.Module):
    def __init__(self, d, rank=2):
        super().__init__()
        self.base = nn.Linear(d, d)
        self.base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(d, rank, bias=False), nn.Linear(rank, d, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x)) * 0.5


class Dora(nn.Module):
    """LoRA on the direction of a matrix, its column norms learned apart."""

    def __init__(self, d, rank=2):
        super().__init__()
        self.base = nn.Linear(d, d, bias=False)
        self.A, self.B, self.magnitude = (
            nn.Parameter(torch.zeros(rank, d)),
            nn.Parameter(torch.zeros(d, rank)),
            nn.Parameter(torch.ones(d, 1)),
        )

    def forward(self, x):
        W = self.base.weight + self.B @ self.A
        return F.linear(x, self.magnitude * W / W.norm(dim=1, keepdim=True))


class Adapter(nn.Module):
    def __init__(self, d, rank=2):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(d, d), nn.Linear(d, rank), nn.Linear(rank, d)
        self.scale = nn.Parameter(torch.ones(d))

    def forward(self, x):
        x = self.base(x) * self.scale
        return x + self.up(F.relu(self.down(x)))


class TiedLanguageModel(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.embed, self.positions, self.mix, self.norm = nn.Embedding(11, d), nn.Embedding(8, d), nn.Linear(d, d), nn.LayerNorm(d)

    def forward(self, ids):
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.norm(x + self.mix(x)) @ self.embed.weight.T


ATTENTION = {
    "softmax_attention": between(Softmax, roles=QKVO_ROLES),
    "einsum_attention": between(Einsum, roles=QKVO_ROLES),
    "alibi": between(Alibi, roles=QKVO_ROLES),
    "linear_attention": between(Linearised, roles=QKVO_ROLES),
    "retention": between(Retention, roles=QKVO_ROLES),
    "rotary_with_normed_heads": between(RotaryNormed, roles="scalar: inner.?_norm.weight\n" + QKVO_ROLES),
    "relative_position_table": between(RelativeTable, roles="embedding: inner.table.weight\n" + QKVO_ROLES),
    **{
        f"fused_qkv_{layout}": between(lambda d, layout=layout: Fused(d, layout), roles="hidden: inner.*.weight\nvector: inner.*.bias")
        for layout in ("chunk", "3hd", "h3d")
    },
    "grouped_queries": between(Grouped, roles=QKVO_ROLES),
    "multi_query": between(
        MultiQuery, roles="hidden: inner.q.weight inner.o.weight\noutput: inner.kv.weight\nscalar: inner.kv.bias\nvector: inner.*.bias"
    ),
    "latent_attention": between(Latent, roles="vector: inner.norm.weight inner.*.bias\nhidden: inner.*.weight"),
    "multihead_self_attention": between(SelfAttention, roles="hidden: inner.*weight\nvector: inner.*bias"),
    "cross_attention": Handwritten(
        Cross,
        lambda d: (floats(2, 5, 7), floats(2, 6, 6)),
        "input: first.weight memory.weight\noutput: last.weight\nscalar: last.bias\nhidden: attention.*weight\nvector: *bias",
    ),
    "nn_transformer": Handwritten(
        Seq2Seq,
        lambda d: (tokens(2, 6), tokens(2, 5)),
        "embedding: embed.weight\noutput: out.weight\nscalar: out.bias\nvector: *norm*.weight *bias\nhidden: *weight",
    ),
    "pooling_by_learned_queries": between(Pooled, roles="vector: inner.*.bias\nhidden: inner.?.weight\noutput: inner.queries"),
    "swiglu_fused": between(SwiGLU, roles="hidden: inner.*"),
    "parallel_block": between(Parallel, roles="vector: inner.norm.*\nhidden: inner.*"),
    "in_out_weights": between(InOut, roles="vector: inner.b_*\nhidden: inner.*"),
    "bilinear_scores": Handwritten(
        Bilinear,
        lambda d: (floats(4, 7), floats(4, 6)),
        "input: u.weight v.weight\nvector: u.bias v.bias\noutput: pair.weight\nscalar: pair.bias",
    ),
    "experts_in_a_loop": between(ExpertsLoop, roles="output: inner.router.weight\nhidden: inner.*.weight\nvector: inner.*.bias"),
    "experts_stacked": between(ExpertsStacked, roles="output: inner.router\nhidden: inner.up inner.down"),
    "experts_gathered": between(ExpertsPicked, roles="output: inner.router.weight\nscalar: inner.router.bias\nhidden: inner.bank"),
    "lora": between(Lora, roles="output: inner.lora_A.weight\ninput: inner.lora_B.weight"),
    "dora": between(Dora, roles="hidden: inner.base.weight\noutput: inner.A\ninput: inner.B\nvector: inner.magnitude"),
    "bottleneck_adapter": between(
        Adapter,
        roles="hidden: inner.base.weight\noutput: inner.down.weight\ninput: inner.up.weight\nscalar: inner.down.bias\nvector: inner.*",
    ),
    "tied_language_model": Handwritten(
        TiedLanguageModel,
        lambda d: (tokens(2, 6),),
        "embedding: embed.weight positions.weight\nhidden: mix.weight\nvector: mix.bias norm.*",
    ),
}
