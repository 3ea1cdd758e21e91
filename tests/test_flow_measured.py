"""Flow against models that train: the powers it predicts, of values, of their changes and of their gradients, are the slopes measured.

The loss is linear in the outputs, so that its gradient there is Θ(1) at every step, which is what flow assumes; cross entropy saturates
where logits grow and vanishes where labels are memorised, with slopes that belong to neither (THEORY 6.1).
"""

import math
from collections import defaultdict
from fractions import Fraction as Q
from statistics import fmean, linear_regression

import models
import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scaling import derive
from scaling.flow import flow
from scaling.limits import WIDTH
from scaling.records import Law, Parametrization

HALF = Q(1, 2)
BASE = 64
TOLERANCE = 0.15  # THEORY 6.1
FAMILIES = ("sgd", "adam", "muon+adam")

# --- what is trained: powers of d by role --------------------------------------------------------------------------------------------

MUP_INIT = {"hidden": -HALF, "output": Q(-1)}
MUP_LR = {
    "sgd": {"input": 1, "embedding": 1, "vector": 1, "output": -1},
    "adam": {"hidden": -1, "output": -1},
    "muon+adam": {"output": -1},
}
NTK_LR = {
    "sgd": {},
    "adam": {"input": -HALF, "embedding": -HALF, "vector": -HALF, "hidden": -1, "output": -HALF},
    "muon+adam": {"input": -HALF, "embedding": -HALF, "vector": -HALF, "output": -HALF},
}
# name -> multipliers, inits and rates of an optimizer, as powers of d
PARAMETRIZATIONS = {
    "standard": lambda f: ({}, {"hidden": -HALF, "output": -HALF}, {}),
    "muP": lambda f: ({}, MUP_INIT, MUP_LR[f]),
    "NTK": lambda f: ({"hidden": -HALF, "output": -HALF}, {}, NTK_LR[f]),
    "hidden lr of an input": lambda f: ({}, MUP_INIT, MUP_LR[f] | {"hidden": HALF if f == "muon+adam" else MUP_LR[f].get("input", 0)}),
    "input lr 1/d": lambda f: ({}, MUP_INIT, MUP_LR[f] | dict.fromkeys(("input", "embedding", "vector"), MUP_LR[f].get("input", 0) - 1)),
    "readout init 1/√d": lambda f: ({}, MUP_INIT | {"output": -HALF}, MUP_LR[f]),
}
GROWS = {"standard", "hidden lr of an input", "readout init 1/√d"}
# Rates at the base width, over those of muP there. A sum of two powers of d has no slope: what leads as d → ∞ is made to lead there.
LEADING = {
    "standard": {"hidden": 32, "output": 1024},
    "hidden lr of an input": {"hidden": 32},
    "input lr 1/d": {"hidden": 32, "output": 32},
    "readout init 1/√d": {"output": 1 / 1024, "scalar": 1 / 1024},
}
RATE = {"muP": 0.02, "NTK": 0.005}
SMALL = 0.0001  # where something grows, it must not saturate


def power(exponent):
    return WIDTH ** sympy.Rational(str(exponent))


def parametrized(table, family, name):
    """A parametrization from exponents per role; a role that is left out has 0."""
    tables = PARAMETRIZATIONS[name](family)
    laws = {
        rule.name: tuple(
            Law(**{key: power(one.get(b.role, 0)) for key, one in zip(("multiplier", "init_std", "lr"), tables, strict=True)})
            for b in rule.blocks
        )
        for rule in table
    }
    return Parametrization(name=name, family=family, laws=laws)


class MSign(torch.optim.Adam):
    """U Vᵀ of each gradient in groups that say so, Adam in the others. Gradients have no more rank than there are rows of data."""

    @torch.no_grad()
    def step(self):
        for group in (group for group in self.param_groups if group["msign"]):
            for p in group["params"]:
                G = p.grad.flatten(1)
                U, S, V = torch.svd_lowrank(G, q=min(*G.shape, group["rank"]), niter=3)
                p -= group["lr"] * (U * (1e-6 * S[0] < S) @ V.mT).reshape(p.shape)
                p.grad = None
        super().step()


def build(make, table, parametrization, rate, leading, rank, d):
    """A model of width d and its optimizer: at the base width the table's own, scaled from there by the laws."""

    def scaled(expression):
        return float(expression.subs(WIDTH, d) / expression.subs(WIDTH, BASE))

    model, groups = make(d), []
    modules = dict(model.named_modules())
    for rule in table:
        law, weight = parametrization.laws[rule.name][0], model.get_parameter(rule.name)
        block = rule.blocks[0].model_copy(update={"input_scale": sympy.Integer(1), "target": sympy.Integer(1)})
        family = "adam" if rule.role != "hidden" and parametrization.family != "sgd" else parametrization.family.partition("+")[0]
        with torch.no_grad():
            if weight.ndim > 1:
                weight.normal_(0, float(block.init_std.subs(WIDTH, BASE)) * scaled(law.init_std))
            elif rule.name.endswith("bias"):
                weight.zero_()
        if scaled(law.multiplier) != 1:
            factor, owner = scaled(law.multiplier), modules[rule.name.rpartition(".")[0]]
            owner.register_forward_pre_hook(lambda _, args, factor=factor: (args[0] * factor,))
        lr = rate * leading.get(rule.role, 1) * float(block.lr[family].subs(WIDTH, BASE)) * scaled(law.lr)
        groups.append({"params": [weight], "lr": lr, "msign": family == "muon", "rank": rank})
    return model, torch.optim.SGD(groups) if parametrization.family == "sgd" else MSign(groups, eps=1e-30)


def data(name):
    """Inputs, the gradient of the loss at the outputs, and a bound on the rank of gradients."""
    generator = torch.Generator().manual_seed(1)
    if name == "MLP":
        return torch.randn(32, 16, generator=generator), torch.randn(32, 10, generator=generator), 40
    if name == "CNN":
        return torch.randn(8, 3, 8, 8, generator=generator), torch.randn(8, 10, generator=generator), 136
    return torch.randint(16, (4, 8), generator=generator), torch.randn(4, 8, 16, generator=generator), 40


MAKE = {"MLP": models.MLP, "CNN": models.CNN, "GPT": lambda d: models.GPT(d, vocab=16, length=8)}
TABLES = {name: derive(make, models.ids() if name == "GPT" else None, widths=(64, 128, 256)) for name, make in MAKE.items()}


# --- what is measured ---------------------------------------------------------------------------------------------------------------


def trained(model, optimizer, x, direction, steps):
    """{(module, quantity): RMS} of the outputs of all modules, of their changes and gradients, before and after training."""
    found, outputs, start = {}, {}, {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: outputs.__setitem__(name, out))
    for step in range(steps + 1):
        y = model(x)
        for out in outputs.values():
            out.retain_grad()
        optimizer.zero_grad()
        ((y * direction).sum() / direction[..., 0].numel()).backward()
        start = start or {name: out.detach() for name, out in outputs.items()}
        for name, out in outputs.items():
            if step == 0:
                found |= {(name, "init"): out.detach(), (name, "gradient_at_init"): out.grad}
            if step == 1:
                found[name, "first"] = out.detach() - start[name]
            if step == steps:
                found |= {(name, "change"): out.detach() - start[name], (name, "gradient"): out.grad}
        optimizer.step()
    return {key: float(value.double().square().mean().sqrt()) for key, value in found.items()}


def slopes(name, table, parametrization, widths, seeds, steps=5):
    x, direction, rank = data(name)
    case = parametrization.name
    rate = SMALL if case in GROWS else RATE.get(case, 0.002)
    rows = defaultdict(lambda: defaultdict(list))
    for d in widths:
        for seed in seeds:
            torch.manual_seed(seed)
            model, optimizer = build(MAKE[name], table, parametrization, rate, LEADING.get(case, {}), rank, d)
            for key, value in trained(model, optimizer, x, direction, steps).items():
                rows[key][d].append(value)
    return {key: fitted(by_width) for key, by_width in rows.items()}


def fitted(by_width):
    points = [(math.log2(width), math.log2(fmean(values))) for width, values in by_width.items()]
    return linear_regression(*zip(*points, strict=True)).slope


def compare(name, family, case, widths, seeds):
    """What is not as flow says, and whether it says that something grows.

    Up to the first value that grows, all that is measured agrees; what comes after it is a sum of powers until d is far larger than any
    width here, and under SGD the gradients of later steps have grown too.
    """
    table = TABLES[name]
    given = parametrized(table, family, case)
    result = flow(table, family, given)
    grown = next((value.module for value in result.values if value.first > 0), None)
    exact = ["init", "gradient_at_init", "first"]
    if grown is None:
        exact += ["change", "gradient"]
    elif family != "sgd":
        exact += ["change"]
    found = slopes(name, table, given, widths, seeds)
    modules = list(dict.fromkeys(module for module, _ in found if module))
    wrong = {}
    for module in modules[: modules.index(grown) + 1] if grown else modules:
        for quantity in exact:
            wanted, slope = getattr(result.of(module), quantity), found[module, quantity]
            if not abs(slope - wanted) <= TOLERANCE:
                wrong[module, quantity] = (str(wanted), round(slope, 2))
    return wrong, grown


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", PARAMETRIZATIONS)
def test_an_mlp_moves_by_the_predicted_slopes(case, family):
    wrong, grown = compare("MLP", family, case, (64, 128, 256, 512, 1024), range(3))
    assert not wrong
    assert (grown is not None) == (case in GROWS)


FAST = {("CNN", "adam"), ("GPT", "sgd"), ("GPT", "adam")}
LARGER = [
    pytest.param(name, family, case, marks=() if (name, family) in FAST and case in {"standard", "muP"} else pytest.mark.slow)
    for name in ("CNN", "GPT")
    for family in FAMILIES
    for case in PARAMETRIZATIONS
]


@pytest.mark.parametrize(("name", "family", "case"), LARGER)
def test_larger_models_move_by_the_predicted_slopes(name, family, case):
    wrong, grown = compare(name, family, case, (64, 128, 256, 512) if name == "GPT" else (64, 128, 256), range(3))
    assert not wrong
    assert (grown is not None) == (case in GROWS)


# --- architectures that are drawn ---------------------------------------------------------------------------------------------------


def linear(*sizes):
    return nn.Linear(*sizes, bias=False)


def attended(x, map):
    """Rows of x as tokens; heads of 16."""
    q, k, v = (y.unflatten(-1, (-1, 16)).transpose(0, 1) for y in map(x).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)


KINDS = {
    "linear": lambda x, norm, map: map(x),
    "relu": lambda x, norm, map: F.relu(x),
    "tanh": lambda x, norm, map: torch.tanh(x),
    "gelu": lambda x, norm, map: F.gelu(map(x)),
    "layer_norm": lambda x, norm, map: norm(x),
    "rms_norm": lambda x, norm, map: norm(x),
    "normalize": lambda x, norm, map: F.normalize(x, dim=-1),
    "residual": lambda x, norm, map: x + map(x),
    "gate": lambda x, norm, map: x * torch.sigmoid(map(x)),
    "product": lambda x, norm, map: x * map(x),
    "bottleneck": lambda x, norm, map: map(torch.tanh(x)),
    "attention": lambda x, norm, map: x + attended(norm(x), map),
    "centred": lambda x, norm, map: x - x.mean(-1, keepdim=True),
    "by its sum": lambda x, norm, map: x / (1 + F.relu(x).sum(-1, keepdim=True)),
}


class Drawn(nn.Module):
    """A stem, layers by name, a readout."""

    def __init__(self, d, kinds):
        super().__init__()
        self.stem, self.head, self.kinds = nn.Linear(16, d), nn.Linear(d, 10), kinds
        eps = 1e-20  # negligible, which flow assumes
        self.norms = nn.ModuleList(nn.LayerNorm(d, eps) if kind == "layer_norm" else nn.RMSNorm(d, eps) for kind in kinds)
        maps = {"bottleneck": lambda: (linear(d, 8), linear(8, d)), "attention": lambda: (linear(d, 3 * d),)}
        self.maps = nn.ModuleList(nn.Sequential(*maps.get(kind, lambda: (linear(d, d),))()) for kind in kinds)

    def forward(self, x):
        x = self.stem(x)
        for kind, norm, map in zip(self.kinds, self.norms, self.maps, strict=True):
            x = KINDS[kind](x, norm, map)
        return self.head(x)


# products of products have tails too heavy for the mean of a few seeds
DRAWN = st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5).filter(lambda kinds: kinds.count("product") < 2)


@given(kinds=DRAWN, case=st.sampled_from(["standard", "muP", "NTK"]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_drawn_architectures_have_the_predicted_sizes_and_gradients_at_init(kinds, case):
    def make(d):
        return Drawn(d, kinds)

    x, direction, rank = data("MLP")
    table = derive(make, (x[:4],), widths=(64, 128, 256))
    given = parametrized(table, "adam", case)
    result = flow(table, None, given)
    rows = defaultdict(lambda: defaultdict(list))
    for d in (64, 256, 1024):
        for seed in range(4):
            torch.manual_seed(seed)
            model, optimizer = build(make, table, given, 0.1, {}, rank, d)
            for key, value in trained(model, optimizer, x, direction, steps=0).items():
                rows[key][d].append(value)
            for name, weight in model.named_parameters():
                rows[name, "norm"][d].append(0.0 if weight.grad is None else float(weight.grad.norm()))
    norms = {weight.name: weight.norm for weight in result.weights}
    wrong = {}
    for (name, quantity), by_width in rows.items():
        if quantity in {"init", "gradient_at_init"} or name in norms:
            wanted = norms[name] if quantity == "norm" else getattr(result.of(name), quantity)
            slope = fitted(by_width)
            if not abs(slope - wanted) <= TOLERANCE:
                wrong[name, quantity] = (str(wanted), round(slope, 2))
    assert not wrong
