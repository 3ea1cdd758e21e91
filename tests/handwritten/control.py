"""Python in the forward: branches, loops, structures, custom operators. What breaks tracers."""

import collections
import dataclasses

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .model import Handwritten, between, floats, tokens

TWO = "hidden: inner.a.weight inner.b.weight\nvector: inner.a.bias inner.b.bias"


class Two(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)


class BranchOnAFloat(Two):
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


class EarlyExit(Two):
    def forward(self, x):
        x = self.a(x)
        if torch.sigmoid(x.mean()).item() > 0.99:
            return x
        return self.b(x)


class LoopOnItem(Two):
    def forward(self, x):
        steps = 0
        while x.abs().max().item() > 1.5 and steps < 3:
            x = self.a(x)
            steps += 1
        return self.b(torch.tanh(self.a(x)))


class Checkpointed(Two):
    def forward(self, x):
        return checkpoint(self.b, checkpoint(self.a, x, use_reentrant=False), use_reentrant=False)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class CustomFunction(Two):
    def forward(self, x):
        return self.b(Double.apply(self.a(x)))


class Masked(Two):
    def forward(self, x):
        out = torch.zeros_like(x)
        mask = x[..., 0] > 0
        out[mask] = self.a(x[mask])
        out[~mask] = self.b(x[~mask])
        return out


class Inplace(Two):
    def forward(self, x):
        x = self.a(x)
        x += 1
        x.mul_(0.5).relu_()
        x[:, 0] = 0
        return self.b(x).add_(x)


class Energy(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.first, self.second, self.energy = nn.Linear(7, d), nn.Linear(d, d), nn.Linear(d, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            e = self.energy(torch.tanh(self.second(torch.tanh(self.first(x))))).sum()
            return torch.autograd.grad(e, x, create_graph=True)[0]


class NumpyOnIds(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(11, d), nn.Linear(d, d), nn.Linear(d, 11)

    def forward(self, ids):
        longest = int(np.max(ids.cpu().numpy().sum(1) > 3)) + 1
        return self.out(self.mix(self.embed(ids[:, :longest])))


@dataclasses.dataclass
class Batch:
    left: torch.Tensor
    right: dict


Pair = collections.namedtuple("Pair", "score features")


class Structures(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.left, self.right, self.both, self.out = nn.Linear(7, d), nn.Linear(6, d), nn.Linear(2 * d, d), nn.Linear(d, 3)

    def forward(self, batch, *, scale=1.0):
        h = torch.cat([self.left(batch.left), self.right(batch.right["x"][0])], -1)
        h = torch.relu(self.both(h)) * scale
        return {"pair": Pair(self.out(h), [h])}


class NestedLists(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.layers = nn.ModuleDict({"x": nn.ModuleList([nn.Linear(7, d), nn.Linear(d, d)]), "y": nn.ModuleList([nn.Linear(d, 4)])})

    def forward(self, xs):
        h = sum(self.layers["x"][0](x) for x in xs)
        for layer in [*self.layers["x"]][1:]:
            h = h + layer(h)
        return [self.layers["y"][0](h), None, "a string"]


@torch.library.custom_op("handwritten::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


@halved.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("handwritten::unfaked", mutates_args=())
def unfaked(x: torch.Tensor) -> torch.Tensor:
    return x + 1


class CustomOps(Two):
    def forward(self, x):
        return self.b(unfaked(halved(self.a(x))))


class Hooked(Two):
    def __init__(self, d):
        super().__init__(d)
        self.a.register_forward_hook(lambda module, args, output: torch.relu(output))
        self.b.register_forward_pre_hook(lambda module, args: (args[0] * 2,))

    def forward(self, x):
        return self.b(self.a(x))


class Shared(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)
        self.b.weight = self.a.weight

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return x


class Unused(Two):
    def __init__(self, d):
        super().__init__(d)
        self.never = nn.Linear(d, d)

    def forward(self, x):
        return self.b(self.a(x))


class Functional(nn.Module):
    """Calls a template module with parameters of its own (a bank of two, one picked)."""

    def __init__(self, d):
        super().__init__()
        self.bank = nn.Parameter(torch.zeros(2, d, d))
        self.bias = nn.Parameter(torch.zeros(2, d))
        object.__setattr__(self, "template", nn.Linear(d, d))

    def forward(self, x):
        for i in range(2):
            x = torch.tanh(torch.func.functional_call(self.template, {"weight": self.bank[i], "bias": self.bias[i]}, (x,)))
        return x


class Vmapped(nn.Module):
    """An ensemble of two maps over stacked weights."""

    def __init__(self, d):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, d, d))

    def forward(self, x):
        return torch.vmap(lambda w: x @ w)(self.weights).mean(0)


class Recursive(Two):
    def tree(self, x, depth):
        if depth == 0:
            return x
        half = x.shape[1] // 2
        left, right = self.tree(x[:, :half], depth - 1), self.tree(x[:, half:], depth - 1)
        return torch.tanh(torch.cat([self.a(left), self.b(right)], 1))

    def forward(self, x):
        return self.tree(x, 2)


class RandomFeatures(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.register_buffer("projection", torch.zeros(d, 7))
        self.mix, self.out = nn.Linear(d, d), nn.Linear(d, 5)

    def forward(self, x):
        return self.out(torch.relu(self.mix(torch.cos(x @ self.projection.mT))))


class Noise(Two):
    def forward(self, x):
        x = self.a(x) + torch.randn_like(x)
        return self.b(x * torch.bernoulli(torch.full((*x.shape[:-1], 1), 0.5)))


class Scripted(nn.Module):
    """Reads its own sizes: shapes as Python numbers in the forward."""

    def __init__(self, d):
        super().__init__()
        self.a, self.b = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        b, t, d = x.shape
        h = self.a(x.reshape(b * t, d)).view(b, t, 4, d)
        return self.b(h.permute(0, 1, 3, 2).reshape(b, t, 4 * d))


CONTROL = {
    "branch_on_a_float": between(BranchOnAFloat, roles=TWO),
    "early_exit_item": between(EarlyExit, roles=TWO),
    "loop_on_item": between(LoopOnItem, roles=TWO),
    "checkpointed": between(Checkpointed, roles=TWO),
    "custom_autograd_function": between(CustomFunction, roles=TWO),
    "boolean_mask": between(Masked, roles=TWO),
    "in_place": between(Inplace, roles=TWO),
    "custom_operators": between(CustomOps, roles=TWO),
    "hooks": between(Hooked, roles=TWO),
    "unused_layer": between(Unused, roles=TWO + "\nhidden: inner.never.weight\nvector: inner.never.bias", unreached=("inner.never.*",)),
    "recursive_tree": between(Recursive, shape=(3, 8, 7), roles=TWO),
    "noise": between(Noise, roles=TWO),
    "shared_over_depth": between(Shared, roles="hidden: inner.a.weight\nvector: inner.a.bias inner.b.bias"),
    "functional_call": between(Functional, roles="hidden: inner.bank\nvector: inner.bias"),
    "vmapped_ensemble": between(Vmapped, roles="hidden: inner.weights"),
    "sizes_in_python": between(Scripted, roles=TWO),
    "autograd_in_forward": Handwritten(
        Energy,
        lambda d: (floats(3, 7),),
        "input: first.weight\nhidden: second.weight\noutput: energy.weight\nscalar: energy.bias\nvector: *.bias",
    ),
    "numpy_on_ids": Handwritten(
        NumpyOnIds,
        lambda d: (tokens(3, 6),),
        "embedding: embed.weight\nhidden: mix.weight\noutput: out.weight\nscalar: out.bias\nvector: mix.bias",
    ),
    "dataclass_and_dicts": Handwritten(
        Structures,
        lambda d: (Batch(floats(3, 7), {"x": [floats(3, 6)]}),),
        "input: left.weight right.weight\nhidden: both.weight\noutput: out.weight\nscalar: out.bias\nvector: *.bias",
        kwargs=lambda d: {"scale": 0.5},
    ),
    "nested_lists": Handwritten(
        NestedLists,
        lambda d: ([floats(3, 7), floats(3, 7)],),
        "input: layers.x.0.weight\nhidden: layers.x.1.weight\noutput: layers.y.0.weight\nscalar: layers.y.0.bias\nvector: *.bias",
    ),
    "random_features": Handwritten(
        RandomFeatures, lambda d: (floats(3, 7),), "hidden: mix.weight\noutput: out.weight\nscalar: out.bias\nvector: mix.bias"
    ),
}
