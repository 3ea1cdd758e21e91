"""Graphs, sets, tables, pairs, densities, and weights that are made by other weights."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from .model import Handwritten, between, floats, tokens

EDGES = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])


class GraphConvolution(nn.Module):
    """Messages are gathered, summed at their target, normalised by degree."""

    def __init__(self, d):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(7, d), nn.Linear(d, d), nn.Linear(d, 3)

    def spread(self, x, edges):
        degree = torch.zeros(len(x)).index_add_(0, edges[1], torch.ones(edges.shape[1])).clamp(min=1)
        return torch.zeros_like(x).index_add_(0, edges[1], x[edges[0]]) / degree[:, None]

    def forward(self, x, edges):
        x = F.relu(self.spread(self.first(x), edges))
        return self.out(F.relu(self.spread(self.second(x), edges)))


class GraphAttention(nn.Module):
    """Scores of edges by one vector per head, a softmax over each node's neighbours by scatter."""

    def __init__(self, d, head=4):
        super().__init__()
        self.heads = d // head
        self.map, self.out = nn.Linear(7, d), nn.Linear(d, 3)
        self.source, self.target = nn.Parameter(torch.zeros(self.heads, head)), nn.Parameter(torch.zeros(self.heads, head))

    def forward(self, x, edges):
        h = self.map(x).view(len(x), self.heads, -1)
        score = F.leaky_relu((h * self.source).sum(-1)[edges[0]] + (h * self.target).sum(-1)[edges[1]]).exp()
        total = torch.zeros(len(x), self.heads).scatter_add_(0, edges[1][:, None].expand_as(score), score)
        messages = h[edges[0]] * (score / total[edges[1]])[..., None]
        return self.out(torch.zeros_like(h).index_add_(0, edges[1], messages).flatten(1))


class SparseGraph(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.first, self.second = nn.Linear(7, d), nn.Linear(d, 3)

    def forward(self, x, edges):
        adjacency = torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1]), (len(x), len(x)), check_invariants=False)
        return torch.sparse.mm(adjacency, self.second(F.relu(torch.sparse.mm(adjacency, self.first(x)))))


class MessagePassing(nn.Module):
    """Edge messages from both ends and the edge, a GRU cell at the node."""

    def __init__(self, d):
        super().__init__()
        self.node, self.message, self.update, self.out = nn.Linear(7, d), nn.Linear(2 * d + 2, d), nn.GRUCell(d, d), nn.Linear(d, 1)

    def forward(self, x, edges, features):
        h = torch.tanh(self.node(x))
        for _ in range(2):
            m = F.relu(self.message(torch.cat([h[edges[0]], h[edges[1]], features], -1)))
            h = self.update(torch.zeros_like(h).index_add(0, edges[1], m), h)
        return self.out(h.mean(0))


class DeepSets(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.phi, self.rho = (
            nn.Sequential(nn.Linear(7, d), nn.ReLU(), nn.Linear(d, d)),
            nn.Sequential(nn.Linear(2 * d, d), nn.ReLU(), nn.Linear(d, 2)),
        )

    def forward(self, x):
        h = self.phi(x)
        return self.rho(torch.cat([h.mean(1), h.max(1).values], -1))


class TwoTowers(nn.Module):
    """CLIP: two normalised embeddings, a learned temperature."""

    def __init__(self, d):
        super().__init__()
        self.image, self.text, self.mix = nn.Linear(12, d), nn.Embedding(11, d), nn.Linear(d, d)
        self.to_image, self.to_text, self.logit_scale = (
            nn.Linear(d, d, bias=False),
            nn.Linear(d, d, bias=False),
            nn.Parameter(torch.tensor(2.6)),
        )

    def forward(self, pixels, ids):
        u = F.normalize(self.to_image(F.gelu(self.image(pixels))), dim=-1)
        v = F.normalize(self.to_text(F.gelu(self.mix(self.text(ids).mean(1)))), dim=-1)
        return self.logit_scale.exp() * u @ v.T


class Recommender(nn.Module):
    """DLRM: bags of ids, dot products of all pairs beside the dense features."""

    def __init__(self, d):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(9, d, mode="sum") for _ in range(3))
        self.dense, self.top = nn.Linear(6, d), nn.Linear(d + 6, 1)

    def forward(self, x, ids):
        x = F.relu(self.dense(x))
        z = torch.stack([x, *(bag(i) for bag, i in zip(self.bags, ids, strict=True))], 1)
        pairs = torch.bmm(z, z.mT)
        i, j = torch.tril_indices(4, 4, offset=-1)
        return self.top(torch.cat([x, pairs[:, i, j]], 1))


class Factorization(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.linear, self.factors = nn.Embedding(20, 1), nn.Embedding(20, d)

    def forward(self, ids):
        v = self.factors(ids)
        return self.linear(ids).sum((1, 2)) + 0.5 * (v.sum(1) ** 2 - (v**2).sum(1)).sum(-1)


class Coupling(nn.Module):
    """An affine coupling layer of a normalizing flow; the data's own axis is split."""

    def __init__(self, d):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 8))

    def forward(self, x):
        a, b = x.chunk(2, -1)
        scale, shift = self.net(a).chunk(2, -1)
        return torch.cat([a, b * torch.exp(torch.tanh(scale)) + shift], -1), scale.sum(-1)


class Hypernetwork(nn.Module):
    """A small network writes the weight of another."""

    def __init__(self, d):
        super().__init__()
        self.code, self.write = nn.Parameter(torch.zeros(6)), nn.Linear(6, 7 * 5)
        self.body, self.inner = nn.Linear(5, d), nn.Linear(d, 3)

    def forward(self, x):
        W = self.write(self.code).view(5, 7)
        return self.inner(F.relu(self.body(F.linear(x, W))))


class LowRank(nn.Module):
    """A matrix that is a product of two thin ones."""

    def __init__(self, d, rank=3):
        super().__init__()
        self.U, self.V = nn.Parameter(torch.zeros(d, rank)), nn.Parameter(torch.zeros(rank, d))

    def forward(self, x):
        return F.linear(x, self.U @ self.V)


class Orthogonal(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.map = parametrizations.orthogonal(nn.Linear(d, d), orthogonal_map="cayley")

    def forward(self, x):
        return self.map(x)


class Symmetric(nn.Module):
    def forward(self, X):
        return X.triu() + X.triu(1).mT


class Parametrized(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.map = nn.Linear(d, d, bias=False)
        nn.utils.parametrize.register_parametrization(self.map, "weight", Symmetric())

    def forward(self, x):
        return self.map(x)


class Splines(nn.Module):
    """A KAN layer: a basis of each input, a coefficient per basis function, input and output."""

    def __init__(self, d, knots=5):
        super().__init__()
        self.coefficients, self.register = nn.Parameter(torch.zeros(d, d, knots)), None
        self.register_buffer("centres", torch.linspace(-1, 1, knots))

    def forward(self, x):
        basis = torch.exp(-((x[..., None] - self.centres) ** 2))
        return torch.einsum("...ik,oik->...o", basis, self.coefficients)


class Highway(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.carry, self.transform, self.alpha = nn.Linear(d, d), nn.Linear(d, d), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        t = torch.sigmoid(self.carry(x))
        return t * torch.relu(self.transform(x)) + (1 - t) * x + self.alpha * x


class MultiTask(nn.Module):
    """One trunk, three heads of different kinds, outputs in a dict."""

    def __init__(self, d):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(7, d), nn.LayerNorm(d), nn.PReLU(d), nn.Dropout(0.1))
        self.heads = nn.ModuleDict(
            {"value": nn.Linear(d, 1), "policy": nn.Sequential(nn.Linear(d, 2 * d), nn.Softplus(), nn.Linear(2 * d, 4))}
        )

    def forward(self, x):
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


class Dueling(nn.Module):
    """A dueling critic with a state-action product."""

    def __init__(self, d):
        super().__init__()
        self.state, self.action, self.joint, self.value, self.advantage = (
            nn.Linear(7, d),
            nn.Embedding(4, d),
            nn.Linear(d, d),
            nn.Linear(d, 1),
            nn.Linear(d, 1),
        )

    def forward(self, x):
        s = F.relu(self.state(x))
        a = F.relu(self.joint(s[:, None] * self.action.weight))
        advantage = self.advantage(a).squeeze(-1)
        return self.value(s) + advantage - advantage.mean(-1, keepdim=True)


class Perceiver(nn.Module):
    """Learned latents (their number stays) read a long input by cross attention."""

    def __init__(self, d, latents=6):
        super().__init__()
        self.latents, self.kv, self.q, self.o = nn.Parameter(torch.zeros(latents, d)), nn.Linear(7, 2 * d), nn.Linear(d, d), nn.Linear(d, d)
        self.self_attention, self.out = nn.TransformerEncoderLayer(d, d // 4, 2 * d, batch_first=True, norm_first=True), nn.Linear(d, 5)

    def forward(self, x):
        k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        q = self.q(self.latents).unflatten(-1, (-1, 4)).transpose(0, 1).expand(len(x), -1, -1, -1)
        z = self.latents + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.out(self.self_attention(z).mean(1))


class Capsules(nn.Module):
    """Routing by agreement: a bank of maps, one for each pair of capsules."""

    def __init__(self, d, inward=4, outward=3):
        super().__init__()
        self.first, self.W, self.last = nn.Linear(7, inward * d), nn.Parameter(torch.zeros(inward, outward, d, d)), nn.Linear(d, 1)
        self.inward = inward

    def forward(self, x):
        u = torch.einsum("bic,iocd->biod", self.first(x).unflatten(-1, (self.inward, -1)), self.W)
        logits = torch.zeros(u.shape[:-1])
        for _ in range(2):
            v = F.normalize((logits.softmax(2)[..., None] * u).sum(1), dim=-1)
            logits = logits + (u * v[:, None]).sum(-1)
        return self.last(v).squeeze(-1)


class UnitLength(nn.Module):
    def forward(self, weight):
        return F.normalize(weight, dim=-1)


class UnitRows(nn.Module):
    """Weights whose rows have length 1 at every step, by a parametrization (nGPT)."""

    def __init__(self, d):
        super().__init__()
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        for linear in (self.up, self.down):
            parametrize.register_parametrization(linear, "weight", UnitLength())

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


class Contrastive(nn.Module):
    """Contrastive: features of two kinds and what the loss will multiply their products by and add (SigLIP)."""

    def __init__(self, d):
        super().__init__()
        self.left, self.right = nn.Linear(7, d, bias=False), nn.Linear(5, d, bias=False)
        self.join = nn.Linear(d, d, bias=False)
        self.temperature, self.offset = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, x, y):
        left, right = F.normalize(self.join(self.left(x)), dim=-1), F.normalize(self.join(self.right(y)), dim=-1)
        return left, right, self.temperature.exp(), self.offset.clone()


class FoldedByPeriod(nn.Module):
    """A series folded into rows by its strongest periods, which NumPy counts (TimesNet)."""

    def __init__(self, d):
        super().__init__()
        self.convolution = nn.Conv2d(d, d, 3, padding=1)

    def forward(self, x):
        strength = torch.fft.rfft(x, dim=1).abs().mean((0, 2))
        length, total = x.shape[1], 0
        for period in length // torch.topk(strength, 2).indices.detach().numpy():
            rows = -(-length // period)
            padded = F.pad(x, (0, 0, 0, int(rows * period - length)))
            folded = self.convolution(padded.reshape(len(x), rows, period, -1).permute(0, 3, 1, 2))
            total = total + folded.flatten(2).transpose(1, 2)[:, :length]
        return total


STRUCTURES = {
    "graph_convolution": Handwritten(
        GraphConvolution,
        lambda d: (floats(5, 7), EDGES),
        "input: first.weight\nhidden: second.weight\noutput: out.weight\nscalar: out.bias\nvector: *.bias",
    ),
    "graph_attention": Handwritten(
        GraphAttention,
        lambda d: (floats(5, 7), EDGES),
        "input: map.weight\nvector: source target map.bias\noutput: out.weight\nscalar: out.bias",
    ),
    "sparse_graph": Handwritten(
        SparseGraph, lambda d: (floats(5, 7), EDGES), "input: first.weight\nvector: first.bias\noutput: second.weight\nscalar: second.bias"
    ),
    "message_passing": Handwritten(
        MessagePassing,
        lambda d: (floats(5, 7), EDGES, floats(6, 2)),
        "input: node.weight\nhidden, input: message.weight\nhidden: update.weight*\noutput: out.weight\nscalar: out.bias\nvector: *bias*",
    ),
    "deep_sets": Handwritten(
        DeepSets,
        lambda d: (floats(3, 5, 7),),
        "input: phi.0.weight\nhidden: phi.2.weight rho.0.weight\noutput: rho.2.weight\nscalar: rho.2.bias\nvector: *.bias",
    ),
    "two_towers": Handwritten(
        TwoTowers,
        lambda d: (floats(3, 12), tokens(3, 5)),
        "input: image.weight\nembedding: text.weight\nhidden: mix.weight to_*\nscalar: logit_scale\nvector: *.bias",
    ),
    "recommender": Handwritten(
        Recommender,
        lambda d: (floats(3, 6), [tokens(3, 2, below=9) for _ in range(3)]),
        "input: dense.weight\nembedding: bags.*\noutput, scalar: top.weight\nscalar: top.bias\nvector: dense.bias",
    ),
    "factorization_machine": Handwritten(Factorization, lambda d: (tokens(3, 4),), "scalar: linear.weight\nembedding: factors.weight"),
    "coupling_flow": Handwritten(
        Coupling,
        lambda d: (floats(3, 8),),
        "input: net.0.weight\nhidden: net.2.weight\noutput: net.4.weight\nscalar: net.4.bias\nvector: *.bias",
    ),
    "hypernetwork": Handwritten(
        Hypernetwork,
        lambda d: (floats(3, 7),),
        "scalar: code write.* inner.bias\ninput: body.weight\nvector: body.bias\noutput: inner.weight",
    ),
    "low_rank_product": between(LowRank, roles="input: inner.U\noutput: inner.V"),
    "orthogonal_map": between(Orthogonal, roles="hidden: inner.map.*original\nvector: inner.map.bias"),
    "symmetric_map": between(Parametrized, roles="hidden: inner.*"),
    "splines": between(Splines, roles="hidden: inner.coefficients"),
    "highway": between(Highway, roles="hidden: inner.*.weight\nvector: inner.*.bias\nscalar: inner.alpha"),
    "two_heads": Handwritten(
        MultiTask,
        lambda d: (floats(3, 7),),
        "input: trunk.0.weight\nhidden: heads.policy.0.weight\noutput: heads.value.weight heads.policy.2.weight\n"
        "scalar: heads.value.bias heads.policy.2.bias\nvector: *",
    ),
    "dueling_critic": Handwritten(
        Dueling,
        lambda d: (floats(3, 7),),
        "input: state.weight\nvector: action.weight\nhidden: joint.weight\noutput: value.weight advantage.weight\n"
        "scalar: value.bias advantage.bias\nvector: *.bias",
    ),
    "perceiver": Handwritten(
        Perceiver,
        lambda d: (floats(3, 9, 7),),
        "scalar: out.bias\nvector: *norm* *bias\nembedding: latents\ninput: kv.weight\n"
        "hidden: q.weight o.weight self_attention.*weight\noutput: out.weight",
    ),
    "capsules": Handwritten(
        Capsules, lambda d: (floats(3, 7),), "input: first.weight\nhidden: W\noutput: last.weight\nscalar: last.bias\nvector: first.bias"
    ),
    "rows_of_length_one": between(UnitRows, roles="hidden: inner.*.weight.original\nvector: inner.*.bias"),
    "temperature_for_the_loss": Handwritten(
        Contrastive,
        lambda d: (floats(3, 7), floats(3, 5)),
        "input: left.weight right.weight\nscalar: temperature offset\nhidden: join.*weight",
    ),
    "folded_by_period": between(FoldedByPeriod, roles="hidden: inner.convolution.weight\nvector: inner.convolution.bias"),
}
