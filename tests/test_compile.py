"""compile, init_, param_groups, emit and clip_grad_norm_ on tables built by hand."""

import copy
import importlib.util
import math
import pickle

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

import compiler
from compiler.compile import MATRICES, OPTIMIZERS
from compiler.errors import AlreadyCompiled, BadOption, NotExpressible
from compiler.model import LAWS
from scaling import derive, limits
from scaling.errors import ScalingError, UnknownName, UnreachedWeights, WrongWidth
from scaling.records import Block, Coverage, Factor, ScalingTable, Source, Use, WeightRule

V, WIDTH, BASE = 11, 32, 16
ONE = sympy.Integer(1)
d = limits.WIDTH


# --- tables by hand -------------------------------------------------------------------------------------------------------------


def part(size, kind, start=0, stop=None):
    return Factor(size=size, part=kind, start=start, stop=size if stop is None else stop)


def block(*axes, lookup=False, fan_in=None, fan_out=None, **options):
    """A block from its layout; a looked-up axis counts 1 in fan_in."""
    axes = tuple(axis if isinstance(axis, tuple) else (axis,) for axis in axes)

    def product(kind):
        return sympy.Mul(*(factor.extent for axis in axes for factor in axis if factor.part == kind))

    fans = {"fan_in": fan_in or product("in"), "fan_out": fan_out or product("out"), "copies": product("copy")}
    return Block(axes=axes, lookup=lookup, **fans, **options)


def rule(names, dims, *blocks, module=None, multiplier=ONE):
    names = (names,) if isinstance(names, str) else names
    module = names[-1].rpartition(".")[0] if module is None else module
    fans = {"fan_in": blocks[0].fan_in, "fan_out": blocks[0].fan_out, "copies": blocks[0].copies, "multiplier": multiplier}
    use = Use(operator="op", source=Source(file="model.py", line=7, code="h = ...", module=module), lookup=blocks[0].lookup, **fans)
    dims = tuple(map(sympy.sympify, dims))
    return WeightRule(names=names, shape=tuple(int(x.subs(d, WIDTH)) for x in dims), dims=dims, uses=(use,), blocks=blocks)


def table(*rules):
    return ScalingTable(size=WIDTH, rules=rules, coverage=Coverage(trainable=len(rules), reached=len(rules)), model="Net")


def linear(name, out, into, **options):
    return rule(name, (out, into), block(part(out, "out"), part(into, "in")), **options)


def vector(name, size, kind="out"):
    return rule(name, (size,), block(part(size, kind)))


class Net(nn.Module):
    """Embedding, gain, fused q‖k‖v, a convolution, experts in (in, out) layout, a weight of hidden and finite rows, a head."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(V, width, padding_idx=0)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.conv = nn.Conv1d(width, width, 3, padding=1, bias=False)
        self.experts = nn.Parameter(torch.randn(2, width, width) / width**0.5)
        self.mixed = nn.Linear(width, width + 4, bias=False)
        self.decay = nn.Parameter(torch.arange(1.0, width + 1).log())
        self.head = nn.Linear(width, V)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens))
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + q * torch.tanh(k) * v + self.conv(x.mT).mT
        x = x + torch.einsum("bti,eio->bto", x, self.experts) * self.decay.tanh()
        y = self.mixed(x)
        return self.head(y[..., 4:] * y[..., :4].mean(-1, keepdim=True))


def rows(start, stop):
    return block(part(3 * d, "out", start, stop), part(d, "in"))


TABLE = table(
    rule("embed.weight", (V, d), block(part(V, "lookup"), part(d, "out"), lookup=True, fan_in=ONE)),
    vector("norm.weight", d, "copy"),
    vector("norm.bias", d),
    rule("qkv.weight", (3 * d, d), rows(0, d), rows(d, 2 * d), rows(2 * d, 3 * d)),
    vector("qkv.bias", 3 * d),
    rule("conv.weight", (d, d, 3), block(part(d, "out"), part(d, "in"), part(3, "in"))),
    rule("experts", (2, d, d), block(part(2, "copy"), part(d, "in"), part(d, "out"))),
    rule("mixed.weight", (d + 4, d), block(part(d + 4, "out", 0, 4), part(d, "in")), block(part(d + 4, "out", 4, d + 4), part(d, "in"))),
    vector("decay", d, "copy"),
    linear("head.weight", V, d),
    vector("head.bias", V),
)


class MLP(nn.Module):
    def __init__(self, width, bias=True):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, width, bias), nn.Linear(width, width, bias), nn.Linear(width, 3, bias)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


MLP_TABLE = table(
    linear("a.weight", d, 5),
    vector("a.bias", d),
    linear("b.weight", d, d),
    vector("b.bias", d),
    linear("c.weight", 3, d),
    vector("c.bias", 3),
)


class Tied(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.hidden = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(F.relu(self.hidden(self.embed(tokens))))


def tied_rule(module="head"):
    names = ("embed.weight", "head.weight")
    first = rule(names, (V, d), block(part(V, "lookup"), part(d, "out"), lookup=True, fan_in=ONE), module="embed")
    source = Source(file="model.py", line=9, code="return self.head(h)", module=module)
    later = Use(operator="linear", source=source, fan_in=d, fan_out=sympy.Integer(V), multiplier=1 / d)
    return first.model_copy(update={"uses": (*first.uses, later)})


TIED_TABLE = table(tied_rule(), linear("hidden.weight", d, d))


def tokens(batch=3, length=7):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(4))


def train(model, optimizer, steps=3, inputs=None):
    inputs = tokens() if inputs is None else inputs
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def options_of(optimizer, name, number=0):
    """The effective options of a weight's block."""
    for group in optimizer.param_groups:
        if name in group["param_names"]:
            return {**group, **(group["blocks"] or [{}])[number if group["blocks"] else 0]}
    raise KeyError(name)


def fingerprint(model):
    hooks = [(name, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()]
    return {name: value.clone() for name, value in model.state_dict().items()}, hooks, set(model.__dict__)


def same(a, b):
    return a[0].keys() == b[0].keys() and all(torch.equal(a[0][key], b[0][key]) for key in a[0]) and a[1:] == b[1:]


# --- factors ------------------------------------------------------------------------------------------------------------------


def test_factors_of_every_role_are_the_tables():
    """SGD copies·fan_out/fan_in, Adam 1/fan_in, muon √(fan_out/fan_in), ε 1/(copies·fan_out); decay one over the lr factor."""
    n = WIDTH
    expected = {
        "embed.weight": (n, 1, 1 / n),
        "norm.weight": (n, 1, 1 / n),
        "qkv.weight": (1, 1 / n, 1 / n),
        "conv.weight": (1 / 3, 1 / (3 * n), 1 / n),
        "experts": (2, 1 / n, 1 / (2 * n)),
        "head.weight": (V / n, 1 / n, 1 / V),
        "head.bias": (V, 1, 1 / V),
    }
    _, sgd = compiler.compile(Net(WIDTH), TABLE, "sgd", lr=0.1, init=None)
    _, adam = compiler.compile(Net(WIDTH), TABLE, "adam", lr=0.1, init=None)
    for name, (by_sgd, by_adam, eps) in expected.items():
        assert options_of(sgd, name)["lr_scale"] == pytest.approx(by_sgd)
        assert options_of(adam, name)["lr_scale"] == pytest.approx(by_adam)
        assert options_of(adam, name)["eps_scale"] == pytest.approx(eps)
        for optimizer in (sgd, adam):
            o = options_of(optimizer, name)
            assert o["lr_scale"] * o["wd_scale"] == pytest.approx(1)
            assert o["norm_scale"] ** 2 == pytest.approx(by_sgd)


def test_the_width_is_the_models_and_base_divides():
    for width in (8, 16, 64):
        _, absolute = compiler.compile(Net(width), TABLE, "adam", lr=0.1, init=None)
        _, relative = compiler.compile(Net(width), TABLE, "adam", lr=0.1, init=None, base=BASE)
        assert options_of(absolute, "qkv.weight")["lr_scale"] == pytest.approx(1 / width)
        assert options_of(relative, "qkv.weight")["lr_scale"] == pytest.approx(BASE / width)
        assert options_of(relative, "head.bias")["lr_scale"] == 1
        assert {group["lr"] for group in relative.param_groups} == {0.1}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("matrices", MATRICES)
def test_routing(name, matrices):
    """Under the map: growing fan_in and fan_out, per block. Everything else by the rest update; every weight in one group."""
    recipe = OPTIMIZERS[name]
    model, optimizer = compiler.compile(Net(WIDTH), TABLE, name, lr=0.1, matrices=matrices)
    hidden = {("qkv.weight", 0), ("qkv.weight", 2), ("conv.weight", 0), ("experts", 0), ("mixed.weight", 1)}
    finite = {("mixed.weight", 0), ("head.weight", 0)}
    for key in hidden | finite | {("embed.weight", 0), ("norm.weight", 0), ("head.bias", 0), ("decay", 0)}:
        mapped = key in hidden or (matrices == "all" and key in finite)
        o = options_of(optimizer, *key)
        assert o["map"] == (recipe.map if mapped else None)
        assert o["update"] == (recipe.update if mapped or not recipe.map else "adam")
        if mapped and recipe.map:
            rule_block = TABLE[key[0]].blocks[key[1]]
            assert o["lr_scale"] == pytest.approx(math.sqrt((rule_block.fan_out / rule_block.fan_in).subs(d, WIDTH)))
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    train(model, optimizer)


def test_each_map_keeps_the_update_at_its_spectral_norm():
    """‖ΔW_b‖₂ = lr·√(fan_out/fan_in) per block and copy: q, k, v of a fused weight, experts, the flattened kernel (THEORY P04-P08)."""
    for name in ("muon", "adam-msign", "sn", "adam-sn"):
        model, optimizer = compiler.compile(Net(WIDTH), TABLE, name, lr=0.1, accuracy="high")
        before = {n: w.detach().clone() for n, w in model.named_parameters()}
        after = train(model, optimizer, steps=1)
        moved = {n: after[n] - before[n] for n in after}
        parts = [*moved["qkv.weight"].chunk(3), *moved["experts"], moved["mixed.weight"][4:]]
        for delta in parts:
            assert torch.linalg.matrix_norm(delta, 2).item() == pytest.approx(0.1, rel=2e-2)
        kernel = moved["conv.weight"].flatten(1)
        assert torch.linalg.matrix_norm(kernel, 2).item() == pytest.approx(0.1 / 3**0.5, rel=2e-2)


def test_svc_carries_the_pre_scale_of_the_seed():
    _, absolute = compiler.compile(Net(WIDTH), TABLE, "svc", lr=0.1, clip=5.0)
    assert options_of(absolute, "conv.weight")["clip_scale"] == pytest.approx(3**-0.5)
    assert options_of(absolute, "conv.weight")["clip"] == 5.0
    _, relative = compiler.compile(Net(WIDTH), TABLE, "svc", lr=0.1, base=lambda: Net(BASE))
    assert options_of(relative, "conv.weight")["clip_scale"] == 1


def test_rest_and_rest_lr():
    model, optimizer = compiler.compile(MLP(WIDTH), MLP_TABLE, "muon", lr=0.1, rest="sgd", rest_lr=0.01, weight_decay=0.2)
    o = options_of(optimizer, "a.weight")
    assert o["update"] == "sgd"
    assert o["lr"] * o["lr_scale"] == pytest.approx(0.01 * WIDTH / 5)
    assert o["lr"] * o["lr_scale"] * o["wd_scale"] == pytest.approx(0.01)
    assert options_of(optimizer, "b.weight")["lr_scale"] == 1
    train(model, optimizer, inputs=torch.randn(4, 5))
    _, optimizer = compiler.compile(MLP(WIDTH), MLP_TABLE, "muon", lr=0.1, nesterov=True, momentum=0.8)
    assert options_of(optimizer, "b.weight")["update"] == "nesterov"
    assert options_of(optimizer, "b.weight")["momentum"] == 0.8
    assert options_of(optimizer, "a.weight")["update"] == "adam"


def test_weights_of_one_plan_share_a_group():
    _, optimizer = compiler.compile(MLP(WIDTH), MLP_TABLE, "adam", lr=0.1, base=WIDTH)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["blocks"] is None


# --- at base width --------------------------------------------------------------------------------------------------------------

TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01, eps=1e-6),
}
BASES = {"width": BASE, "model": lambda: Net(BASE)}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("base", [BASE, lambda: Net(BASE), Net(BASE)], ids=["width", "factory", "model"])
def test_at_base_width_steps_are_bit_identical_to_the_users_own(name, base):
    theirs = Net(BASE)
    ours = copy.deepcopy(theirs)
    compiled, optimizer = compiler.compile(ours, TABLE, name, lr=0.1, momentum=0.9, weight_decay=0.01, eps=1e-6, base=base)
    assert compiled is ours
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    a, b = train(ours, optimizer, steps=4), train(theirs, TORCH[name](theirs.parameters()), steps=4)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_at_base_width_a_tied_head_needs_no_multiplier():
    model, _ = compiler.compile(Tied(BASE), TIED_TABLE, lr=0.1, base=BASE)
    assert not model.head._forward_pre_hooks


# --- init -----------------------------------------------------------------------------------------------------------------------


def std(W):
    return W.detach().double().square().mean().sqrt().item()


def test_gaussian_init_is_the_seeds_formula():
    model = compiler.init_(Net(256), TABLE)
    expected = {
        "embed.weight": 1.0,
        "qkv.weight": 256**-0.5,
        "conv.weight": (3 * 256) ** -0.5 * 3**-0.5,
        "experts": 256**-0.5,
        "head.weight": 256**-0.5 * (V / 256) ** 0.5,
    }
    weights = dict(model.named_parameters())
    for name, sigma in expected.items():
        W = weights[name][1:] if name == "embed.weight" else weights[name]
        assert std(W) == pytest.approx(sigma, rel=0.05)
    assert std(model.mixed.weight[:4]) == pytest.approx(2 / 256, rel=0.1)
    assert std(model.mixed.weight[4:]) == pytest.approx(1 / 16, rel=0.05)


def test_init_keeps_constants_padding_and_vectors_with_a_law_of_their_own_and_zeroes_random_biases():
    model = Net(WIDTH)
    decay = model.decay.detach().clone()
    nn.init.zeros_(model.head.weight)
    compiler.init_(model, TABLE)
    assert torch.equal(model.norm.weight, torch.ones(WIDTH))
    assert torch.equal(model.norm.bias, torch.zeros(WIDTH))
    assert torch.equal(model.head.weight, torch.zeros(V, WIDTH))
    assert torch.equal(model.embed.weight[0], torch.zeros(WIDTH))
    assert torch.equal(model.decay, decay)
    assert not model.qkv.bias.any()
    assert not model.head.bias.any()


def test_a_constant_with_another_target_is_multiplied_by_it():
    gain = block(part(d, "copy"), target=1 / sympy.sqrt(d))
    gains = table(*(rule("norm.weight", (d,), gain) if r.name == "norm.weight" else r for r in TABLE))
    assert compiler.init_(Net(64), gains).norm.weight[0].item() == pytest.approx(1 / 8)
    assert compiler.init_(Net(64), gains, base=lambda: Net(BASE)).norm.weight[0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("law", LAWS)
def test_every_law_meets_the_spectral_condition_per_block_and_copy(law):
    model = compiler.init_(Net(128), TABLE, law=law)
    maps = [(W, 1.0) for W in (*model.qkv.weight.chunk(3), *model.experts, model.mixed.weight[4:])]
    maps += [(model.conv.weight.flatten(1), 3**-0.5), (model.mixed.weight[:4], (4 / 128) ** 0.5), (model.head.weight, (V / 128) ** 0.5)]
    for W, target in maps:
        S = torch.linalg.svdvals(W.detach().double()) / target
        if law == "gaussian":
            assert 1 < S.max() < 2.1
        else:
            assert S.max().item() == pytest.approx(1, rel=2e-3)
        if law == "msign":
            assert S.min().item() == pytest.approx(1, rel=1e-5)


def test_a_layer_without_features_has_a_rule():
    """A quarter of a quarter of too few channels."""
    model = nn.Sequential(nn.Linear(7, 32, bias=False), nn.Linear(32, 5))
    model[0].register_parameter("none", nn.Parameter(torch.randn(32, 0)))
    model[0].forward = lambda x: F.linear(x, model[0].weight) + F.linear(x[:, :0], model[0].none)
    model, optimizer = compiler.compile(model, derive(model, (torch.zeros(3, 7),)), optimizer="muon", lr=0.1)
    model(torch.ones(3, 7)).square().sum().backward()
    optimizer.step()


def test_a_weight_without_entries_is_left_as_it_is():
    """What a count of 0 leaves of an option, as no memory keys (routing-transformer)."""
    model = nn.Sequential(nn.Linear(7, 32), nn.Linear(32, 32), nn.Linear(32, 5))
    model[0].register_parameter("memory", nn.Parameter(torch.randn(0, 32)))
    model[0].forward = lambda x: torch.cat((model[0].memory, F.linear(x, model[0].weight, model[0].bias)))
    model, optimizer = compiler.compile(model, derive(model, (torch.zeros(3, 7),)), optimizer="muon", lr=0.1)
    model(torch.ones(3, 7)).square().sum().backward()
    optimizer.step()
    assert model[0].memory.shape == (0, 32)


def test_svc_init_is_a_gaussian_clipped():
    a = compiler.init_(
        MLP(64, bias=False), table(*(r for r in MLP_TABLE if "bias" not in r.name)), law="svc", generator=torch.Generator().manual_seed(0)
    )
    b = compiler.init_(
        MLP(64, bias=False), table(*(r for r in MLP_TABLE if "bias" not in r.name)), generator=torch.Generator().manual_seed(0)
    )
    s = torch.linalg.svdvals(b.b.weight.detach())
    torch.testing.assert_close(torch.linalg.svdvals(a.b.weight.detach()), s.clamp(max=1), atol=1e-5, rtol=0)


def test_a_generator_makes_the_init_reproducible_and_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    models = [copy.deepcopy(MLP(16)) for _ in range(2)]
    torch.set_rng_state(state)
    for model in models:
        compiler.init_(model, MLP_TABLE, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(models[0].b.weight, models[1].b.weight)


@pytest.mark.parametrize("law", LAWS)
def test_a_base_model_sets_the_size_and_the_users_draw_stays(law):
    """Uniform weights of an odd size: at 4× the width the same law, in the base's size times σ(d)/σ(base)."""

    def build(width):
        model = MLP(width)
        for linear_module in (model.a, model.b, model.c):
            nn.init.uniform_(linear_module.weight, -0.3, 0.3)
        return model

    base, model = build(64), build(256)
    before = copy.deepcopy(model)
    compiler.init_(model, MLP_TABLE, base=base, law=law)
    if law == "gaussian":
        assert std(model.b.weight) == pytest.approx(std(base.b.weight) / 2, rel=1e-5)
        assert std(model.a.weight) == pytest.approx(std(base.a.weight), rel=1e-5)
        assert std(model.c.weight) == pytest.approx(std(base.c.weight) / 4, rel=1e-5)
        ratio = model.b.weight / before.b.weight
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    else:
        norms = [torch.linalg.matrix_norm(W.detach(), 2).item() for W in (model.b.weight, base.b.weight)]
        assert norms[0] == pytest.approx(norms[1], rel=2e-2 if law == "svc" else 2e-3)  # svc only cuts what is larger
    assert std(model.b.bias) == pytest.approx(std(base.b.bias), rel=1e-5)


def test_a_base_width_alone_warns_away_from_it_and_says_what_to_pass():
    with pytest.warns(UserWarning, match="pass base=<the model built at width 16>"):
        model = compiler.init_(Net(256), TABLE, base=16)
    assert std(model.experts) == pytest.approx(1 / 16, rel=0.05)


def test_frozen_weights_are_neither_initialised_nor_optimized():
    model = Net(WIDTH)
    model.experts.requires_grad_(False)
    before = model.experts.clone()
    _, optimizer = compiler.compile(model, TABLE, lr=0.1)
    assert torch.equal(model.experts, before)
    assert "experts" not in [name for group in optimizer.param_groups for name in group["param_names"]]


def test_bfloat16_models_are_initialised_in_their_dtype():
    model = compiler.init_(Net(128).bfloat16(), TABLE, law="sn")
    assert model.experts.dtype == torch.bfloat16
    assert torch.linalg.matrix_norm(model.experts[0].float(), 2).item() == pytest.approx(1, rel=0.02)


# --- multipliers ------------------------------------------------------------------------------------------------------------------


def test_a_tied_head_gets_its_multiplier_in_every_copy_and_mode():
    plain, model = Tied(WIDTH), Tied(WIDTH)
    compiler.init_(model, TIED_TABLE)
    plain.load_state_dict(model.state_dict())
    x = tokens()
    for other in (model, model.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), plain(x) / WIDTH)
    assert set(model.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(model.head(input=torch.ones(WIDTH)), plain.head(torch.ones(WIDTH)) / WIDTH)


def test_the_multiplier_is_relative_to_base():
    model, _ = compiler.compile(Tied(64), TIED_TABLE, lr=0.1, base=lambda: Tied(BASE))
    (hook,) = model.head._forward_pre_hooks.values()
    assert hook.__self__.factor == BASE / 64


def test_a_looked_up_weight_is_multiplied_at_its_output():
    use = TIED_TABLE["embed.weight"].uses[0].model_copy(update={"multiplier": sympy.sqrt(d)})
    rules = table(TIED_TABLE["embed.weight"].model_copy(update={"uses": (use,)}), TIED_TABLE["hidden.weight"])
    model, plain = Tied(WIDTH), Tied(WIDTH)
    compiler.compile(model, rules, lr=0.1, init=None)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.embed(tokens()), plain.embed(tokens()) * WIDTH**0.5)


def test_a_multiplier_that_no_module_can_take_names_the_line():
    model = Tied(WIDTH)
    before = fingerprint(model)
    for module in ("", "hidden", "nowhere"):
        with pytest.raises(NotExpressible, match=r"'embed.weight' needs the forward multiplier 1/d(.|\n)*model.py:9: return self.head"):
            compiler.compile(model, table(tied_rule(module), linear("hidden.weight", d, d)), lr=0.1)
    assert same(fingerprint(model), before)


def test_init_then_compile_without_init_installs_the_multiplier_once():
    model = compiler.init_(Tied(WIDTH), TIED_TABLE)
    weights = model.embed.weight.detach().clone()
    compiler.compile(model, TIED_TABLE, lr=0.1, init=None)
    compiler.compile(model, TIED_TABLE, lr=0.1, init=None)
    assert len(model.head._forward_pre_hooks) == 1
    assert torch.equal(model.embed.weight, weights)
    with pytest.raises(AlreadyCompiled, match="forward a second time"):
        compiler.compile(model, TIED_TABLE, lr=0.1, init=None, base=BASE)


# --- errors -------------------------------------------------------------------------------------------------------------------------

FAILURES = {
    "unknown optimizer": (lambda m: compiler.compile(m, TABLE, "lion", lr=0.1), UnknownName, "unknown optimizer 'lion'; known: sgd, adam"),
    "unknown rest": (lambda m: compiler.compile(m, TABLE, "muon", lr=0.1, rest="muon"), UnknownName, "known: sgd, adam, sign"),
    "unknown matrices": (lambda m: compiler.compile(m, TABLE, "muon", lr=0.1, matrices="some"), UnknownName, "known: hidden, all"),
    "unknown law": (lambda m: compiler.compile(m, TABLE, lr=0.1, init="xavier"), UnknownName, "unknown law 'xavier'"),
    "lr nan": (lambda m: compiler.compile(m, TABLE, lr=float("nan")), ValueError, "lr=nan: a finite number"),
    "lr inf": (lambda m: compiler.compile(m, TABLE, lr=float("inf")), ValueError, "lr=inf: a finite number"),
    "lr negative": (lambda m: compiler.compile(m, TABLE, lr=-0.1), ValueError, "lr=-0.1: a finite number"),
    "rest lr nan": (lambda m: compiler.compile(m, TABLE, "muon", lr=0.1, rest_lr=float("nan")), ValueError, "rest_lr=nan"),
    "rest lr without lr": (lambda m: compiler.compile(m, TABLE, "muon", lr=0.0, rest_lr=0.1), BadOption, "above 0 when rest_lr"),
    "nesterov adam": (lambda m: compiler.compile(m, TABLE, "adam", lr=0.1, nesterov=True), BadOption, "'adam' does not"),
    "bad base": (lambda m: compiler.compile(m, TABLE, lr=0.1, base="small"), BadOption, "base='small'"),
    "base of other shapes": (lambda m: compiler.compile(m, TABLE, lr=0.1, base=MLP(8)), WrongWidth, "embed.weight"),
    "constant base": (lambda m: compiler.compile(m, TABLE, lr=0.1, base=zeroed(Net(BASE))), BadOption, "'experts'"),
    "unreached": (
        lambda m: compiler.compile(m, table(*TABLE.rules[:-2]), lr=0.1),
        UnreachedWeights,
        "had them frozen: head.weight, head.bias",
    ),
    "another model": (lambda m: compiler.compile(nn.Sequential(m), TABLE, lr=0.1), WrongWidth, "the model has no weight 'embed.weight'"),
    "wrong width": (lambda m: compiler.compile(m, table(linear("head.weight", V + 1, d), *TABLE.rules), lr=0.1), WrongWidth, "head.weight"),
}


def zeroed(model):
    nn.init.zeros_(model.experts)
    return model


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_compile_says_why_and_leaves_the_model_as_it_was(failure):
    call, error, message = FAILURES[failure]
    model = Net(64)
    before, state = fingerprint(model), torch.get_rng_state()
    with pytest.raises(error, match=message) as raised:
        call(model)
    assert isinstance(raised.value, ScalingError)
    assert same(fingerprint(model), before)
    if "base" not in failure:
        assert torch.equal(torch.get_rng_state(), state)


class Spare(MLP):
    """Has what its forward uses only when asked: layers, as SAM's mask encoder, and a bare parameter."""

    def __init__(self, width):
        super().__init__(width)
        self.spare = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.offset = nn.Parameter(torch.randn(width))

    def forward(self, x, *, spare=False):
        h = F.relu(self.a(x))
        if spare:
            h = self.spare[1](self.spare[0](h + self.offset))
        return self.c(F.relu(self.b(h)))


CALLS = {
    "compile": lambda model, table: compiler.compile(model, table, "muon", lr=0.1),
    "init_": compiler.init_,
    "param_groups": lambda model, table: compiler.param_groups(model, table, "adam", lr=0.1),
}


@pytest.mark.parametrize("call", CALLS)
def test_weights_that_the_forward_does_not_use_are_refused_with_the_call_that_leaves_them_as_they_are(call):
    model, x = Spare(WIDTH), torch.randn(4, 5)
    table, before = derive(model, x), fingerprint(model)
    unused = ("spare.0.weight", "spare.0.bias", "spare.1.weight", "spare.1.bias", "offset")
    with pytest.raises(UnreachedWeights, match=r"did not use these .*: offset, spare\.\[0-1\]\.weight, spare\.\[0-1\]\.bias\n") as raised:
        CALLS[call](model, table)
    assert set(raised.value.names) == set(raised.value.unused) == set(unused)
    assert same(fingerprint(model), before)
    line = str(raised.value).splitlines()[-1].strip()
    exec(line, {"table": table, "model": model})
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == set(unused)
    CALLS[call](model, table)
    assert all(torch.equal(model.get_parameter(name), before[0][name]) for name in unused)


def test_an_optimizer_holds_no_weight_that_was_left_as_it_is():
    model, x = Spare(WIDTH), torch.randn(4, 5)
    table, before = derive(model, x), fingerprint(model)[0]
    for name in table.coverage.unreached:
        model.get_parameter(name).requires_grad_(False)
    _, optimizer = compiler.compile(model, table, "adam", lr=0.1, weight_decay=0.1)
    assert {name for group in optimizer.param_groups for name in group["param_names"]} == {rule.name for rule in table}
    after = train(model, optimizer, inputs=x)
    assert all(torch.equal(after[name], before[name]) == (name in table.coverage.unreached) for name in after)


def test_weights_that_the_table_does_not_know_ask_for_a_new_table():
    frozen = Spare(WIDTH).requires_grad_(False)
    frozen.c.requires_grad_(True)
    table = derive(frozen, torch.randn(4, 5))
    model = Spare(WIDTH)
    model.spare.requires_grad_(False)
    with pytest.raises(
        UnreachedWeights, match=r"had them frozen: offset, a\.weight, a\.bias, b\.weight, b\.bias\n.*as it is now"
    ) as raised:
        compiler.compile(model, table, lr=0.1)
    assert raised.value.unused == ()
    model.offset.requires_grad_(False)
    compiler.compile(model, derive(model, torch.randn(4, 5)), lr=0.1)


def test_initialising_twice_is_refused():
    model, _ = compiler.compile(Net(WIDTH), TABLE, lr=0.1)
    before = fingerprint(model)
    for again in (
        lambda: compiler.init_(model, TABLE),
        lambda: compiler.compile(model, TABLE, lr=0.1),
        lambda: compiler.compile(copy.deepcopy(model), TABLE, lr=0.1),
    ):
        with pytest.raises(AlreadyCompiled, match="build a new model"):
            again()
    assert same(fingerprint(model), before)


def test_a_model_without_data_cannot_be_initialised_but_can_be_compiled():
    with torch.device("meta"):
        model = Net(WIDTH)
    with pytest.raises(BadOption, match="to_empty"):
        compiler.compile(model, TABLE, lr=0.1)
    _, optimizer = compiler.compile(model, TABLE, lr=0.1, init=None)
    assert len(optimizer.param_groups) > 1
    with pytest.raises(BadOption, match="its sizes are measured"):
        compiler.compile(Net(64), TABLE, lr=0.1, base=model)


def test_a_table_with_other_ties_than_the_model_is_refused():
    model = Tied(WIDTH)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(NotExpressible, match=r"shares the rule of 'embed.weight'"):
        compiler.compile(model, TIED_TABLE, lr=0.1)
    apart = table(rule("embed.weight", (V, d), TIED_TABLE.rules[0].blocks[0]), linear("head.weight", V, d), linear("hidden.weight", d, d))
    with pytest.raises(NotExpressible, match=r"has 2 rules: embed\.weight, head\.weight"):
        compiler.compile(Tied(WIDTH), apart, lr=0.1)


# --- plain groups, emitted files, clipping -----------------------------------------------------------------------------------------


def test_plain_groups_are_the_optimizers_steps():
    """torch.optim.AdamW on param_groups and compile(...) take the same steps."""
    a, b = MLP(WIDTH), MLP(WIDTH)
    _, ours = compiler.compile(a, MLP_TABLE, "adam", lr=0.05, weight_decay=0.1, eps=1e-4, base=BASE, init=None)
    b.load_state_dict(a.state_dict())
    groups = compiler.param_groups(b, MLP_TABLE, "adam", 0.05, weight_decay=0.1, eps=1e-4, base=BASE)
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(name for name, _ in b.named_parameters())
    x = torch.randn(4, 5)
    after = train(b, torch.optim.AdamW(groups), inputs=x)
    for key, value in train(a, ours, inputs=x).items():
        torch.testing.assert_close(value, after[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("family", "torch_class"), [("sgd", torch.optim.SGD), ("adam", torch.optim.AdamW), ("muon", torch.optim.SGD)])
def test_plain_groups_hold_every_weight_once_with_decay_constant(family, torch_class):
    groups = compiler.param_groups(MLP(WIDTH), MLP_TABLE, family, lr=0.1, weight_decay=0.2)
    assert len([p for group in groups for p in group["params"]]) == 6
    assert all(group["lr"] * group["weight_decay"] == pytest.approx(0.02) for group in groups)
    assert ("eps" in groups[0]) == (family == "adam")
    torch_class(groups)


def test_plain_groups_refuse_what_they_cannot_say():
    with pytest.raises(NotExpressible, match=r"'mixed.weight' has blocks(.|\n)*compiler.compile"):
        compiler.param_groups(Net(WIDTH), TABLE, "sgd", lr=0.1)
    with pytest.raises(UnknownName, match="known: sgd, adam, muon"):
        compiler.param_groups(Net(WIDTH), TABLE, "lion", lr=0.1)
    with pytest.raises(UnreachedWeights, match=r"head\.bias"):
        compiler.param_groups(Net(WIDTH), table(*TABLE.rules[:-1]), "adam", lr=0.1)


def load(path):
    spec = importlib.util.spec_from_file_location("emitted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["sgd", "adam", "sign"])
@pytest.mark.parametrize("base", [None, BASE])
def test_an_emitted_file_makes_the_same_groups(name, base, tmp_path):
    path = compiler.emit(MLP_TABLE, tmp_path / "rules.py", optimizer=name)
    assert "compiler" not in path.read_text().replace("_compiler", "")
    assert "scaling import" not in path.read_text()
    model = MLP(64)
    theirs = load(path).param_groups(model, 64, lr=0.1, weight_decay=0.2, eps=1e-6, base=base)
    ours = compiler.param_groups(model, MLP_TABLE, OPTIMIZERS[name].family, lr=0.1, weight_decay=0.2, eps=1e-6, base=base)

    def flat(groups):
        keys = ("lr", "weight_decay", "eps") if name == "adam" else ("lr", "weight_decay")
        return {n: [g[key] for key in keys] for g in groups for n in g["param_names"]}

    assert flat(theirs) == {key: pytest.approx(value) for key, value in flat(ours).items()}
    (torch.optim.AdamW if name == "adam" else torch.optim.SGD)(theirs)


def test_an_emitted_file_for_a_sign_optimizer_has_no_eps_of_adam(tmp_path):
    """In whose values alone the blocks of mixed.weight differ."""
    groups = load(compiler.emit(TABLE, tmp_path / "rules.py", optimizer="sign")).param_groups(Net(WIDTH), WIDTH, lr=0.1)
    assert all("eps" not in group for group in groups)
    assert any("mixed.weight" in group["param_names"] for group in groups)


def test_an_emitted_file_makes_the_same_init(tmp_path):
    """The weight of mixed rows aside, whose ε factors differ: no plain group holds it."""
    rules = table(*(r for r in TABLE if r.name != "mixed.weight"))
    ours, theirs = Net(WIDTH), Net(WIDTH)
    for model in (ours, theirs):
        model.mixed.requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    compiler.init_(ours, rules, generator=torch.Generator().manual_seed(1))
    load(compiler.emit(rules, tmp_path / "rules.py")).init_(theirs, WIDTH, generator=torch.Generator().manual_seed(1))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert std(a) == pytest.approx(std(b), rel=0.1), name
    assert torch.equal(theirs.embed.weight[0], torch.zeros(WIDTH))
    assert torch.equal(theirs.decay, ours.decay)
    assert not theirs.qkv.bias.any()


def test_an_emitted_init_tells_blocks_apart_that_begin_at_a_fraction_of_the_width(tmp_path):
    halves = [block(part(3 * d / 2, "out", start, stop), part(d, "in")) for start, stop in ((0, d / 2), (d / 2, 3 * d / 2))]
    path = compiler.emit(table(rule("weight", (3 * d / 2, d), *halves)), tmp_path / "rules.py", "sign")
    model = nn.Linear(WIDTH, 3 * WIDTH // 2, bias=False)
    load(path).init_(model, WIDTH, generator=torch.Generator().manual_seed(1))
    assert std(model.weight[: WIDTH // 2]) == pytest.approx((2 * WIDTH) ** -0.5, rel=0.1)
    assert std(model.weight[WIDTH // 2 :]) == pytest.approx(WIDTH**-0.5, rel=0.1)


def test_an_emitted_file_holds_the_multipliers_and_refuses_another_model(tmp_path):
    emitted = load(compiler.emit(TIED_TABLE, str(tmp_path / "rules.py")))
    model, plain = Tied(WIDTH), Tied(WIDTH)
    plain.load_state_dict(model.state_dict())
    emitted.multiply_(model, WIDTH)
    torch.testing.assert_close(model(tokens()), plain(tokens()) / WIDTH)
    hidden = torch.randn(3, WIDTH)
    torch.testing.assert_close(model.head(input=hidden), plain.head(hidden) / WIDTH)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no rule for \['extra.weight'"):
        emitted.param_groups(model, WIDTH, lr=0.1)


def test_emit_refuses_what_a_plain_file_cannot_say(tmp_path):
    with pytest.raises(NotExpressible, match=r"'mixed\.weight' has blocks that need different"):
        compiler.emit(TABLE, tmp_path / "rules.py", optimizer="sgd")
    with pytest.raises(UnknownName, match="known: sgd, adam, sign"):
        compiler.emit(TABLE, tmp_path / "rules.py", optimizer="muon")
    assert not list(tmp_path.iterdir())


def test_the_clip_norm_does_not_depend_on_width_where_torchs_does():
    """Default gauge: torch's global norm grows with the readout's √d (THEORY P46), ours stays."""
    ours, theirs = [], []
    for width in (64, 1024):
        model, optimizer = compiler.compile(
            MLP(width, bias=False), table(*(r for r in MLP_TABLE if "bias" not in r.name)), "sgd", lr=1e-3, init="gaussian"
        )
        x, target = (
            torch.randn(64, 5, generator=torch.Generator().manual_seed(2)),
            torch.randn(64, 3, generator=torch.Generator().manual_seed(3)),
        )
        for _ in range(2):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        theirs.append(torch.linalg.vector_norm(model.c.weight.grad).item())
        ours.append(compiler.clip_grad_norm_(optimizer, 1e9).item())
    assert theirs[1] / theirs[0] > 3
    assert 0.8 < ours[1] / ours[0] < 1.25


def test_the_clip_norm_does_not_depend_on_the_gauge():
    """y = (m·θ)·(W/θ)·x: the gradient is θ times as large, the SGD factor 1/θ² (THEORY 1.6)."""
    norms = []
    for theta in (1, 4):
        model = MLP(WIDTH, bias=False)
        torch.manual_seed(0)
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight) * theta
        rules = [linear(f"{name}.weight", *dims) for name, dims in {"a": (d, 5), "b": (d, d), "c": (3, d)}.items()]
        shifted = [r.model_copy(update={"blocks": (r.blocks[0].model_copy(update={"multiplier": sympy.Integer(theta)}),)}) for r in rules]
        _, optimizer = compiler.compile(model, table(*shifted), "sgd", lr=0.1, init=None)
        assert len(model.b._forward_pre_hooks) == (theta != 1)
        norms.append(compiler.clip_grad_norm_(optimizer, 1e9).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_training_lowers_the_loss_with_every_optimizer():
    for name in OPTIMIZERS:
        torch.manual_seed(0)
        model, optimizer = compiler.compile(Net(WIDTH), TABLE, name, lr=0.005 if name == "sgd" else 0.05)
        x = tokens(8, 12)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, 1), x.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.02, name
        assert all(map(math.isfinite, losses))
