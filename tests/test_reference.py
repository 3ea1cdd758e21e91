"""SpectralOptimizer beside its docstring written out in fp64: a weight, a block and a copy at a time, matrices by the SVD.

The reference also keeps how far rounding may have taken the optimizer from it, from the precision of its state, the condition of
what is mapped and the stated image of a level: what is allowed follows from the example. For thousands of examples
`pytest tests/test_reference.py --hypothesis-profile slow`.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from compiler import SpectralOptimizer, msign
from compiler.bits import LOW, join, split
from compiler.coefficients import SCHEDULES
from compiler.maps import MAPS
from compiler.updates import UPDATES

LAWS = settings(max_examples=settings.default.max_examples // 2, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Part(NamedTuple):
    """A block: its layout, and where the entries of each of its matrices lie in the flat weight, as (out, in)."""

    axes: list[Any] | None
    matrices: list[torch.Tensor]


def places(*shape):
    return torch.arange(math.prod(shape)).view(shape)


def matrix(a, b, c):
    return (a, b), [Part(None, [places(a, b)])]


def fused(a, b, c):
    at = places(c * a, b)
    return at.shape, [Part([[[c, "out", i, i + 1], [a, "out", 0, a]], [[b, "in", 0, b]]], [at[i * a : (i + 1) * a]]) for i in range(c)]


def uneven(a, b, c):
    at, rows = places(a + c, b), a + c
    return at.shape, [Part([[[rows, "out", s, e]], [[b, "in", 0, b]]], [at[s:e]]) for s, e in ((0, a), (a, rows))]


def interleaved(a, b, c):
    at = places(a * c, b)
    return at.shape, [Part([[[a, "out", 0, a], [c, "out", i, i + 1]], [[b, "in", 0, b]]], [at[i::c]]) for i in range(c)]


def heads(a, b, c):
    at = places(c * a, b)
    return at.shape, [Part([[[c, "copy", 0, c], [a, "out", 0, a]], [[b, "in", 0, b]]], [at[i * a : (i + 1) * a] for i in range(c)])]


def experts_in_out(a, b, c):
    at = places(c, b, a)
    return at.shape, [Part([[[c, "copy", 0, c]], [[b, "in", 0, b]], [[a, "out", 0, a]]], [at[i].mT for i in range(c)])]


def kernel(a, b, c):
    at = places(a, b, c, 2)
    return at.shape, [Part([[[a, "out", 0, a]], [[b, "in", 0, b]], [[c, "in", 0, c]], [[2, "in", 0, 2]]], [at.reshape(a, -1)])]


def grouped_kernel(a, b, c):
    at = places(c * a, b, 3)
    axes = [[[c, "copy", 0, c], [a, "out", 0, a]], [[b, "in", 0, b]], [[3, "in", 0, 3]]]
    return at.shape, [Part(axes, [at[i * a : (i + 1) * a].reshape(a, -1) for i in range(c)])]


def looked_up(a, b, c):
    return (b, a), [Part([[[b, "lookup", 0, b]], [[a, "out", 0, a]]], [places(b, a).mT])]


LAYOUTS = [matrix, fused, uneven, interleaved, heads, experts_in_out, kernel, grouped_kernel, looked_up]


@dataclass
class Reference:
    """One weight, and what becomes of it."""

    W: torch.Tensor
    parts: list[Part]
    o: list[dict[str, Any]]
    eps: float
    t: int = 0
    skipped: int = 0
    slack: float = 0.0
    counted: float = 0.0
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def step(self, G, lr):
        if G is None:
            return
        if not G.isfinite().all():
            self.skipped += 1
            return
        if lr == 0 and not G.any():
            return
        self.t += 1
        G, W, strayed = G.double().flatten(), self.W.clone().flatten(), 0.0
        for part, o in zip(self.parts, self.o, strict=True):
            rate, decay = lr * o["lr_scale"], o["weight_decay"] * o["wd_scale"]
            at = torch.cat([matrix.flatten() for matrix in part.matrices])
            coupled = o["update"] == "sgd" and o["map"] is None
            g = -G[at] if o["maximize"] else G[at]
            phi, noise = self.base(at, g + decay * W[at] if coupled else g, o)
            Phi, Noise = torch.zeros_like(W).index_put((at,), phi), torch.zeros_like(W).index_put((at,), noise)
            for matrix in part.matrices:
                U, error = image(Phi[matrix], torch.linalg.norm(Noise[matrix]).item(), o, self.eps)
                kept = 1 if coupled else 1 - rate * decay
                W[matrix] = kept * W[matrix] - rate * U
                strayed += rate * error + 4 * self.eps * (torch.linalg.norm(W[matrix]) + rate * torch.linalg.norm(U)).item()
            if coupled:
                strayed += self.t * rate * decay * self.slack
        self.W, self.slack = W.view(self.W.shape), self.slack + strayed

    def base(self, at, g, o):
        """Φ, and what rounding may have made of every entry of it: a few ε a step of the largest numbers that went in."""

        def held(name):
            return self.buffers.setdefault(name, torch.zeros(self.W.numel(), dtype=torch.float64))

        largest = held("largest")
        largest[at] = torch.maximum(largest[at], g.abs())
        noise = 4 * self.eps * self.t * largest[at]
        if o["update"] == "adam":
            (beta1, beta2), m, v = o["betas"], held("m"), held("v")
            m[at] = beta1 * m[at] + (1 - beta1) * g
            v[at] = beta2 * v[at] + (1 - beta2) * g**2
            below = (v[at] / (1 - beta2**self.t)).sqrt() + o["eps"] * o["eps_scale"]
            phi = m[at] / (1 - beta1**self.t) / below
            return phi, noise / (1 - beta1**self.t) / below + (8 * self.eps * self.t + self.counted) * phi.abs()
        mu, B = o["momentum"], held("B")
        B[at] = mu * B[at] + (1 if o["update"] == "sgd" else 1 - mu) * g
        largest[at] = torch.maximum(largest[at], B[at].abs())
        if mu == 0:
            noise = 0 * noise
        if o["update"] == "nesterov":
            return mu * B[at] + (1 - mu) * g, noise
        if o["update"] == "sign":
            return B[at].sign(), 2.0 * (mu > 0) * (B[at].abs() <= noise).double()
        return B[at].clone(), noise


def image(Phi, noise, o, eps):
    """U of one matrix, and how far from it, in Frobenius norm, an optimizer whose Φ differs by `noise` may be."""
    if o["map"] is None:
        return Phi, noise
    U, S, Vh = torch.linalg.svd(Phi, full_matrices=False)
    first, size, k = S[0].item(), S.norm().item(), len(S)
    if first == 0:
        return torch.zeros_like(Phi), 0.0 if noise == 0 else math.inf
    backward = 8 * max(Phi.shape) * first * torch.finfo(torch.float64).eps
    rounding = eps * math.sqrt(k)
    if o["map"] == "sn":
        return Phi / first, 2 * noise / first * math.sqrt(k) + 8 * max(Phi.shape) * rounding
    if o["map"] == "svc":
        scale = o["clip"] * o["clip_scale"]
        return (U * (scale * S).clamp(max=1)) @ Vh, scale * (noise + backward) + rounding
    cutoff = max(Phi.shape) * eps * first
    kept = S.gt(cutoff)
    Y = (U * kept) @ Vh
    if o["accuracy"] != "exact":
        level = SCHEDULES[o["accuracy"]]
        below = (kept & S.lt(1.001 * level.lower * size)).sum().item()
        gain = msign(torch.tensor([[1.0, 0.0], [0.0, 1e-9]], dtype=torch.float64), accuracy=o["accuracy"])[1, 1].item() * 1e9
        rounded = gain * (4 * eps * math.sqrt(max(Phi.shape) * k) + noise / size)
        return Y, math.sqrt(k) * max(1 - level.image[0], level.image[1] - 1) + math.sqrt(below) + rounded
    gap = (S[kept].min() - (S[~kept].max() if (~kept).any() else 0)).item()
    if ((S - cutoff).abs() <= noise + backward).any() or gap <= 4 * (noise + backward):
        return Y, 2 * math.sqrt(k)
    return Y, 4 * (noise + backward) / gap + rounding


@st.composite
def options(draw, update, map):
    return {
        "update": update,
        "map": map,
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.95])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)])),
        "eps": draw(st.sampled_from([1e-8, 1e-3])),
        "clip": draw(st.sampled_from([0.1, 1.0, 30.0])),
        "accuracy": draw(st.sampled_from(["exact", "exact", *SCHEDULES])),
    }


OWN = ("wd_scale", "eps_scale", "clip_scale")


@st.composite
def groups(draw):
    """Groups of an optimizer, and of their weights the parts and options."""
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    made, references = [], []
    for _ in range(draw(st.integers(1, 3))):
        a, b, c = draw(st.integers(1, 16)), draw(st.integers(1, 16)), draw(st.integers(1, 3))
        shape, parts = draw(st.sampled_from(LAYOUTS))(a, b, c)
        shared = draw(options(draw(st.sampled_from(list(UPDATES))), draw(st.sampled_from([*MAPS, *MAPS, None]))))
        shared |= {"maximize": draw(st.booleans()), "lr_scale": 1.0} | dict.fromkeys(OWN, 1.0)
        own = [
            {name: draw(st.sampled_from([0.5, 1.0, 2.0])) for name in OWN} | {"lr_scale": math.sqrt(len(at) / at.size(1))}
            for at in (part.matrices[0] for part in parts)
        ]
        if draw(st.booleans()):  # blocks that are updated each in its own way
            for block in own:
                block |= draw(options(draw(st.sampled_from(list(UPDATES))), draw(st.sampled_from(list(MAPS)))))
        weights = []
        for _ in range(draw(st.integers(1, 2))):
            W = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if draw(st.booleans()):  # strides in another order
                W = W.permute(*reversed(range(W.ndim))).contiguous().permute(*reversed(range(W.ndim)))
            weights.append(nn.Parameter(W))
            eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            references.append(Reference(W.double(), parts, [{**shared, **block} for block in own], eps))
        group = {"params": weights, **shared}
        if parts[0].axes is None:
            group |= own[0]
        else:
            group["blocks"] = [{"axes": part.axes, **block} for part, block in zip(parts, own, strict=True)]
        made.append(group)
    return made, references, dtype, generator


STEPS = st.lists(st.tuples(st.sampled_from([0.0, 1e-3, 0.3]), st.integers(0, 2**31)), min_size=1, max_size=5)
KINDS = ("normal", "normal", "normal", "none", "zero", "bad")


@pytest.mark.filterwarnings("ignore:every group.s lr is multiplied")  # by chance
@LAWS
@given(made=groups(), steps=STEPS, capturable=st.booleans(), workspace=st.sampled_from([2**10, 2**30]), data=st.data())
def test_every_step_is_that_of_the_reference(made, steps, capturable, workspace, data):
    groups, references, dtype, generator = made
    optimizer = SpectralOptimizer(groups, 0.0, capturable=capturable, workspace=workspace, master=dtype == torch.bfloat16)
    weights = [W for group in optimizer.param_groups for W in group["params"]]
    for reference in references:
        reference.counted = torch.finfo(torch.float32).eps if capturable else 0.0  # steps on a device are fp32, as torch's are
    for lr, _ in steps:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr, dtype=torch.float64) if capturable else lr
        for W, reference in zip(weights, references, strict=True):
            kind = data.draw(st.sampled_from(KINDS))
            G = torch.randn(W.shape, generator=generator, dtype=torch.float64) * data.draw(st.sampled_from([1e-3, 1.0]))
            G = {"zero": torch.zeros_like(G), "bad": G.index_fill(0, torch.tensor([0]), math.inf)}.get(kind, G).to(dtype)
            W.grad = None if kind == "none" else G
            reference.step(W.grad, lr)
        before = [None if W.grad is None else W.grad.clone() for W in weights]
        optimizer.step()
        for W, G, reference in zip(weights, before, references, strict=True):
            assert (W.grad is None) == (G is None)
            assert G is None or torch.equal(W.grad, G)
            low = optimizer.state[W].get(LOW) if W in optimizer.state else None
            whole = W.detach() if low is None else join(W.detach(), low)
            assert low is None or torch.equal(split(whole)[0], W)
            assert torch.linalg.norm((whole.double() - reference.W).flatten()) <= reference.slack
    assert sum(optimizer.skipped.values()) == sum(reference.skipped for reference in references)
