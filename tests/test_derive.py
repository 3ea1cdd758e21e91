"""What `derive` says of the models of the acceptance list."""

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import sympy
import torch
import torch.nn.functional as F
from models import CNN, GPT, MLP, MODELS, ResNet, gpt2
from sympy import Rational
from torch import nn

import scaling.growth
from scaling import derive
from scaling.errors import NoGraph
from scaling.limits import WIDTH

d = WIDTH
TP5_TABLE_3 = {  # Yang et al. 2022, arXiv 2203.03466, table 3 (σ, not σ²); msign: Yang et al. 2023, arXiv 2310.17813
    "input": (0, 1, 0, Rational(1, 2)),
    "hidden": (Rational(-1, 2), 0, -1, 0),
    "output": (-1, -1, -1, Rational(-1, 2)),
}


def exponents(rule):
    return tuple(rule.exponent(quantity) for quantity in ("init_std", "sgd", "adam", "muon"))


def from_factory(name, widths=(64, 96, 128), **options):
    build, inputs = MODELS[name]
    with torch.device("meta"):
        return derive(build, inputs, widths=widths, **options)


@pytest.mark.parametrize(
    ("name", "first", "hidden", "last"),
    [
        ("MLP", "first.weight", "second.weight", "head.weight"),
        ("CNN", "stem.weight", "body.weight", "head.weight"),
        ("GPT", "wte.weight", "h.0.mlp.0.weight", "lm_head.weight"),
        ("ResNet", "conv1.weight", "stages.1.conv2.weight", "fc.weight"),
    ],
)
def test_table_3_of_tensor_programs_v_comes_out_as_limits(name, first, hidden, last):
    table = derive(MODELS[name][0](64))
    for weight, role in ((first, "input"), (hidden, "hidden"), (last, "output")):
        assert exponents(table[weight]) == TP5_TABLE_3[role]
        assert table[weight].role == ("embedding" if weight == "wte.weight" else role)


@pytest.mark.parametrize("name", MODELS)
def test_one_model_its_config_and_a_factory_agree_on_every_axis_of_every_weight(name, monkeypatch):
    exact = from_factory(name)
    build, inputs = MODELS[name]
    args = inputs and inputs(64)
    with torch.device("meta"):
        model = build(64)
    by_config = derive(model, args)
    monkeypatch.setitem(sys.modules["scaling.derive"].__dict__, "at_twice_the_width", lambda _, **__: None)
    guessed = derive(model, args)
    for table in (by_config, guessed):
        assert [(r.name, r.dims, r.blocks) for r in table] == [(r.name, r.dims, r.blocks) for r in exact]
    assert all(c.known for c in exact.classes)
    assert not any(c.known for c in guessed.classes)
    assert exact.coverage.unreached == ()
    assert exact.coverage.operators_without_rule == ()
    assert exact.coverage.reached == exact.coverage.trainable == len(dict(model.named_parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_hidden_are_exactly_the_weights_whose_both_fans_grow(name):
    """An oracle that knows module types: matrices of layers, less embeddings and what ends in labels or pixels."""
    build, _ = MODELS[name]
    with torch.device("meta"):
        small, large = build(64), build(128)
    wider = dict(large.named_parameters())
    table = from_factory(name)
    for name_, weight in small.named_parameters():
        ratios = [b / a for a, b in zip(weight.shape, wider[name_].shape, strict=True)]
        is_embedding = isinstance(small.get_submodule(name_.rpartition(".")[0]), nn.Embedding)
        matrix = len(ratios) >= 2 and ratios.count(2.0) == 2 and not is_embedding
        assert (table[name_].role == "hidden") == matrix, name_


def test_the_finite_formulas_are_those_of_the_theory():
    """THEORY 2.5, `oracle:finite_gpt2`, at f = 4d, H·h = d, V = 61."""
    table = derive(GPT(64))
    q, up, down = table["h.0.attn.c_attn.weight"].blocks[0], table["h.0.mlp.0.weight"], table["h.0.mlp.2.weight"]
    head, wte, gain = table["lm_head.weight"], table["wte.weight"], table["ln_f.weight"]
    assert (q.fan_in, q.fan_out, q.init_std, q.lr["adam"], q.lr["sgd"], q.lr["muon"], q.eps) == (
        d,
        d,
        1 / sympy.sqrt(d),
        1 / d,
        1,
        1,
        1 / d,
    )
    assert (up.init_std, up.lr["sgd"], up.lr["muon"], up.eps, up.weight_decay) == (1 / sympy.sqrt(d), 4, 2, 1 / (4 * d), d)
    assert (down.init_std, down.lr["adam"], down.lr["sgd"], down.lr["muon"]) == (
        1 / (4 * sympy.sqrt(d)),
        1 / (4 * d),
        Rational(1, 4),
        Rational(1, 2),
    )
    assert head.init_std == sympy.sqrt(sympy.Min(1, 61 / d) / d)
    assert (head.lr["adam"], head.lr["sgd"], head.lr["muon"], head.eps) == (1 / d, 61 / d, sympy.sqrt(61 / d), Rational(1, 61))
    assert (wte.fan_in, wte.fan_out, wte.init_std, wte.lr["adam"], wte.lr["sgd"], wte.eps) == (1, d, 1, 1, d, 1 / d)
    assert (gain.fan_in, gain.fan_out, gain.copies, gain.lr["adam"], gain.lr["sgd"], gain.eps) == (1, 1, d, 1, d, 1 / d)


def test_a_convolution_sums_its_kernel_taps_and_a_depthwise_one_only_those():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 1))
    table = derive(
        lambda w: nn.Sequential(nn.Conv2d(3, w, 1), nn.Conv2d(w, 2 * w, 3), nn.Conv2d(2 * w, 2 * w, 3, groups=2 * w)), widths=(32, 64)
    )
    assert (table["1.weight"].fan_in, table["1.weight"].fan_out) == (9 * d, 2 * d)
    depthwise = table["2.weight"]
    assert (depthwise.fan_in, depthwise.fan_out, depthwise.copies, depthwise.role) == (9, 1, 2 * d, "vector")
    assert derive(model)["2.weight"].role == "vector"


# blocks


def test_each_of_q_k_v_is_a_map_of_its_own_in_either_layout():
    for table in (derive(GPT(64)), from_factory("TransformerEncoder"), from_factory("GPT-2")):
        fused = next(rule for rule in table if "attn" in rule.name and 3 * d in rule.dims and len(rule.dims) == 2)
        axis = fused.dims.index(3 * d)
        assert [block.slices[axis] for block in fused.blocks] == [slice(0, d), slice(d, 2 * d), slice(2 * d, 3 * d)]
        assert {(block.fan_in, block.fan_out) for block in fused.blocks} == {(d, d)}


def test_interleaved_heads_of_q_k_v_are_blocks_with_a_stride():
    class NeoX(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inp, self.qkv, self.out = nn.Linear(8, width), nn.Linear(width, 3 * width), nn.Linear(width, 5)

        def forward(self, x):
            h = self.inp(x)
            b, t, w = h.shape
            q, k, v = self.qkv(h).view(b, t, w // 16, 48).transpose(1, 2).chunk(3, dim=-1)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, w))

    table = derive(NeoX, (torch.zeros(2, 6, 8),), widths=(64, 128))
    blocks = table["qkv.weight"].blocks
    assert [[(f.size, f.start, f.stop) for f in block.axes[0]] for block in blocks] == [
        [(d / 16, 0, d / 16), (48, 0, 16)],
        [(d / 16, 0, d / 16), (48, 16, 32)],
        [(d / 16, 0, d / 16), (48, 32, 48)],
    ]
    assert {block.fan_out for block in blocks} == {d}


def test_columns_that_read_constant_features_are_input_like():
    """THEORY P15."""

    class Mixed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inp, self.mix, self.out = nn.Linear(8, width), nn.Linear(width + 16, width), nn.Linear(width, 4)

        def forward(self, x, c):
            return self.out(torch.relu(self.mix(torch.cat([self.inp(x), c], -1))))

    table = derive(Mixed(64), (torch.zeros(2, 8), torch.zeros(2, 16)))
    assert [(block.role, block.fan_in) for block in table["mix.weight"].blocks] == [("hidden", d), ("input", 16)]
    assert table["mix.weight"].dims == (d, d + 16)
    assert [block.exponent("adam") for block in table["mix.weight"].blocks] == [-1, 0]


def test_stacked_experts_are_separate_maps_and_the_router_is_an_output():
    """THEORY P55, P56."""

    class Experts(nn.Module):
        def __init__(self, width, count=4):
            super().__init__()
            self.inp, self.router, self.out = nn.Linear(8, width), nn.Linear(width, count), nn.Linear(width, 5)
            self.up = nn.Parameter(torch.randn(count, width, 2 * width))
            self.down = nn.Parameter(torch.randn(count, 2 * width, width))

        def forward(self, x):
            h = self.inp(x)
            y = torch.einsum("bef,efd->bed", torch.einsum("bd,edf->bef", h, self.up).relu(), self.down)
            return self.out((self.router(h).softmax(-1)[..., None] * y).sum(1))

    for table in (derive(Experts(64)), derive(Experts, widths=(64, 128))):
        up, down, router = table["up"], table["down"], table["router.weight"]
        assert (up.fan_in, up.fan_out, up.copies, up.role) == (d, 2 * d, 4, "hidden")
        assert (down.fan_in, down.fan_out, down.copies, down.role) == (2 * d, d, 4, "hidden")
        assert (router.role, router.fan_in, router.fan_out) == ("output", d, 4)


# ties and contractions


@pytest.mark.parametrize("name", ["GPT, tied", "GPT-2"])
def test_a_tied_head_reads_out_with_the_multiplier_one_over_d(name):
    """THEORY P01 and 2.3."""
    table = from_factory(name)
    rule = next(rule for rule in table if len(rule.names) == 2)
    assert (rule.role, rule.multiplier) == ("embedding", 1 / d)
    assert [use.multiplier for use in rule.uses] == [1, 1 / d]
    assert exponents(rule)[:3] == (0, 1, 0)
    assert table[rule.names[1]] is table[rule.names[0]]


@pytest.mark.parametrize("manual", [False, True])
def test_a_growing_head_dimension_folds_the_rest_of_its_1_over_d_into_q_alone(manual):
    """THEORY P30, P32: 1/√h is in the model (hidden in scaled_dot_product_attention, or written out), 1/√h more goes into q."""
    table = derive(lambda w: GPT(w, heads=4, manual=manual), widths=(64, 128))
    (contraction, *_) = table.contractions
    assert (contraction.dim, contraction.present, contraction.folded) == (
        d / 4,
        2 / sympy.sqrt(d),
        ("h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"),
    )
    q, k, v = table["h.0.attn.c_attn.weight"].blocks
    assert (q.target, k.target, v.target) == (2 / sympy.sqrt(d), 1, 1)
    assert (q.exponent("init_std"), q.exponent("adam"), q.exponent("sgd"), q.exponent("muon")) == (-1, Rational(-3, 2), -1, Rational(-1, 2))
    assert [block.target for block in table["h.0.attn.c_attn.bias"].blocks] == [2 / sympy.sqrt(d), 1, 1]
    assert derive(GPT(64, heads=4, manual=manual), heads="fixed")["h.0.attn.c_attn.weight"].blocks == table["h.0.attn.c_attn.weight"].blocks


def test_heads_that_grow_need_nothing():
    assert from_factory("GPT").contractions == ()


def test_the_fold_reaches_the_gain_of_a_q_norm():
    class Normed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inp, self.q, self.k = (nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, width))
            self.q_norm, self.k_norm, self.out = nn.RMSNorm(width), nn.RMSNorm(width), nn.Linear(width, 5)

        def forward(self, x):
            h = self.inp(x)
            scores = self.q_norm(self.q(h)) @ self.k_norm(self.k(h)).mT / h.shape[-1] ** 0.5
            return self.out(scores.softmax(-1) @ h)

    table = derive(Normed, (torch.zeros(2, 6, 8),), widths=(64, 128))
    assert table.contractions[0].folded == ("q_norm.weight",)
    assert table["q_norm.weight"].blocks[0].target == 1 / sympy.sqrt(d)
    assert table["q.weight"].blocks[0].target == 1


# laws


def renamed(model):
    return nn.Sequential(nn.Identity(), nn.Dropout(0.3), model, nn.Identity())


def test_derive_ignores_names_identity_dropout_and_batch_size():
    plain = derive(MLP(64), (torch.zeros(4, 16),))
    wrapped = derive(renamed(MLP(64)), (torch.zeros(9, 16),))
    assert [rule.blocks for rule in wrapped] == [rule.blocks for rule in plain]


def test_derive_ignores_the_order_of_parameters():
    class Reversed(MLP):
        def __init__(self, width):
            super().__init__(width)
            self._modules = dict(reversed(self._modules.items()))

    plain, other = derive(MLP(64)), derive(Reversed(64))
    assert [rule.name for rule in other] != [rule.name for rule in plain]
    assert all(other[rule.name].blocks == rule.blocks for rule in plain)


def test_a_matrix_in_in_out_layout_gets_the_same_rules_as_a_linear():
    """THEORY P03: the contraction decides, not the shape."""

    class Transposed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inp, self.w, self.head = (
                nn.Linear(8, width),
                nn.Parameter(torch.randn(width, 4 * width)),
                nn.Parameter(torch.randn(4 * width, 5)),
            )

        def forward(self, x):
            return torch.relu(self.inp(x) @ self.w) @ self.head

    table = derive(Transposed, widths=(32, 64))
    assert (table["w"].fan_in, table["w"].fan_out, table["w"].role) == (d, 4 * d, "hidden")
    assert (table["head"].fan_in, table["head"].fan_out, table["head"].role) == (4 * d, 5, "output")


def test_a_lookup_and_a_linear_of_one_hot_have_the_same_exponents():
    """THEORY P10."""

    class OneHot(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inp, self.out = nn.Linear(50, width, bias=False), nn.Linear(width, 5)

        def forward(self, ids):
            return self.out(self.inp(F.one_hot(ids, 50).float()))

    hot = derive(OneHot, (torch.zeros(2, 3, dtype=torch.long),), widths=(32, 64))["inp.weight"]
    looked_up = derive(GPT, widths=(64, 128))["wte.weight"]
    assert exponents(hot) == exponents(looked_up)


def test_a_relative_position_table_is_a_vector_of_the_heads():
    """THEORY P27: looked up along the buckets, one entry per head."""

    class Relative(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inp, self.qk, self.out = nn.Linear(8, width), nn.Linear(width, 2 * width), nn.Linear(width, 5)
            self.table = nn.Embedding(7, width // 16)

        def forward(self, x):
            h = self.inp(x)
            b, t, w = h.shape
            q, k = (y.view(b, t, w // 16, 16).transpose(1, 2) for y in self.qk(h).chunk(2, -1))
            bias = self.table((torch.arange(t)[:, None] - torch.arange(t)[None]).clamp(-3, 3) + 3).permute(2, 0, 1)
            weights = (q @ k.mT / 4 + bias).softmax(-1)
            return self.out((weights @ h.view(b, t, w // 16, 16).transpose(1, 2)).transpose(1, 2).reshape(b, t, w))

    rule = derive(Relative, (torch.zeros(2, 6, 8),), widths=(64, 128))["table.weight"]
    assert (rule.role, rule.exponent("sgd"), rule.exponent("adam"), rule.exponent("eps")) == ("embedding", 1, 0, -1)


def test_a_factory_with_fixed_head_dimension_makes_a_q_norm_gain_scalar():
    """THEORY P23, row 10a: shared by a growing number of heads, it is no vector."""

    class Normed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inp, self.q, self.norm, self.out = nn.Linear(8, width), nn.Linear(width, width), nn.RMSNorm(16), nn.Linear(width, 5)

        def forward(self, x):
            h = self.inp(x)
            q = self.norm(self.q(h).unflatten(-1, (-1, 16))).transpose(1, 2)
            return self.out(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(-2))

    for table in (derive(Normed, (torch.zeros(2, 6, 8),), widths=(64, 128)), derive(Normed(64), (torch.zeros(2, 6, 8),))):
        assert table["norm.weight"].role == "scalar"
        assert exponents(table["norm.weight"])[1:3] == (0, 0)


# which axes grow


def test_an_override_flips_a_class_everywhere():
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    assert derive(model)["1.weight"].role == derive(model)["2.weight"].role == "hidden"
    table = derive(model, fixed={"1.weight": 0})
    assert (table["1.weight"].role, table["2.weight"].role) == ("output", "input")
    assert [c.reason for c in table.classes if c.size == 32] == ["fixed={'1.weight': 0}"]
    assert derive(model, grows={"4.weight": 0})["4.weight"].role == "hidden"


def test_a_second_model_settles_what_grows():
    def build(width, rank):
        return nn.Sequential(nn.Linear(16, width), nn.Linear(width, rank), nn.Linear(rank, width), nn.Linear(width, 10))

    assert derive(build(64, 32), also=build(128, 32))["1.weight"].role == "output"
    assert derive(build(64, 32), also=build(128, 64))["1.weight"].role == "hidden"


def test_the_width_is_read_off_an_axis_that_grows_even_if_most_matrices_use_a_fixed_one():
    def build(width):
        return nn.Sequential(nn.Linear(16, 96), nn.Linear(96, 96), nn.Linear(96, 96), nn.Linear(96, width), nn.Linear(width, 10))

    table = derive(build(32), also=build(64))
    assert table.size == 32
    assert (table["3.weight"].dims, table["1.weight"].role, table["4.weight"].role) == ((d, 96), "scalar", "output")


def test_the_positions_of_a_full_size_vit_do_not_grow(monkeypatch):
    """197 = 1 + 14·14 is not far smaller than 768, but it is the image's own grid."""
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        model = ViTModel(ViTConfig(num_hidden_layers=1))
    monkeypatch.setitem(sys.modules["scaling.derive"].__dict__, "at_twice_the_width", lambda _, **__: None)
    assert derive(model)["embeddings.position_embeddings"].dims == (1, 197, d)


def test_three_widths_give_an_affine_law():
    def build(width):
        return nn.Sequential(nn.Linear(16, width + 5), nn.Linear(width + 5, 3 * width), nn.Linear(3 * width, 10))

    assert derive(build, widths=(32, 48, 96))["1.weight"].dims == (3 * d, d + 5)


def test_the_classes_of_the_footer_cover_every_axis_of_every_weight():
    table = derive(gpt2(64))
    named = {place for c in table.classes for place in c.where}
    assert named == {(rule.name, axis) for rule in table for axis in range(len(rule.dims))}


def test_the_guess_does_not_look_at_module_types(monkeypatch):
    """The same graph written with functions on bare parameters has the same rules."""

    class Bare(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(*s)) for s in ((width, 16), (width, width), (10, width)))

        def forward(self, x):
            return F.linear(F.linear(F.linear(x, self.a), self.b), self.c)

    rules = [rule.blocks for rule in derive(Bare(64))]
    layers = nn.Sequential(nn.Linear(16, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 10, bias=False))
    assert rules == [rule.blocks for rule in derive(layers)]
    assert scaling.growth.FAR == 16


class Routed(nn.Module):
    """A router whose logits nothing sums over: they weigh experts that a loop goes through."""

    def __init__(self, width, experts=8):
        super().__init__()
        self.first = nn.Linear(7, width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x):
        x = self.first(x)
        weights, chosen = self.router(x).softmax(-1).topk(2)
        return sum((weights * (chosen == i)).sum(-1, keepdim=True) * expert(x) for i, expert in enumerate(self.experts))


class TwoHeads(nn.Module):
    """Two key heads, as many as there are projections whose outputs the values are put together from."""

    def __init__(self, width, head_dim=16):
        super().__init__()
        self.heads, self.head_dim = width // 32, head_dim
        self.k, self.q = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.now, self.then, self.o = nn.Linear(width, width // 4), nn.Linear(width, width // 4), nn.Linear(width // 2, width)
        self.temperature = nn.Parameter(torch.ones(self.heads))

    def forward(self, x):
        q, k = (layer(x).unflatten(-1, (self.heads, self.head_dim)) for layer in (self.q, self.k))
        v = torch.cat([self.now(x), self.then(x)], -1).unflatten(-1, (self.heads, self.head_dim))
        q, k, v = (y.transpose(1, 2) for y in (q, k * self.temperature[:, None], v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LearnedImage(nn.Module):
    """StyleGAN: what is convolved first is a weight; S4: a weight whose last axis is the pair of a complex number."""

    def __init__(self, d):
        super().__init__()
        self.image, self.style, self.conv = nn.Parameter(torch.zeros(d, 4, 4)), nn.Linear(5, d), nn.Conv2d(d, d, 3, padding=1)
        self.spectrum, self.head = nn.Parameter(torch.zeros(d, 4, 2)), nn.Linear(d, 3)

    def forward(self, z):
        x = self.conv(self.image.repeat(len(z), 1, 1, 1)).mean((2, 3)) * self.style(z)
        waves = torch.polar(torch.ones(4, 6), torch.ones(4, 6))
        kernel = 2 * torch.einsum("hn,nl->hl", torch.view_as_complex(self.spectrum), waves).real
        return self.head(torch.fft.irfft(torch.fft.rfft(kernel) * torch.fft.rfft(x[..., None].expand(-1, -1, 6))).sum(-1))


def test_a_grid_that_a_kernel_slides_over_and_the_pair_of_a_complex_number_are_guessed_to_be_fixed():
    table = derive(LearnedImage(32), (torch.zeros(2, 5),))
    assert table["image"].dims == (d, 4, 4)
    assert table["spectrum"].dims[2] == 2


def test_what_nothing_reads_and_is_less_than_what_grows_is_guessed_to_be_fixed():
    exact = derive(Routed, (torch.zeros(2, 6, 7),), widths=(64, 96))
    guessed = derive(Routed(64), (torch.zeros(2, 6, 7),))
    assert exact["router.weight"].dims == guessed["router.weight"].dims == (8, d)


def test_heads_are_guessed_to_grow_where_two_projections_happen_to_make_two_of_them():
    x = torch.zeros(2, 6, 64)
    exact = derive(TwoHeads, lambda width: (torch.zeros(2, 6, width),), widths=(64, 128))
    guessed = derive(TwoHeads(64), (x,))
    for name in ("q.weight", "k.weight", "o.weight", "temperature"):
        assert exact[name].dims == guessed[name].dims
    assert guessed["temperature"].dims == (d / 32,)


# cost, and what is left behind


@pytest.mark.parametrize("build", [MLP, CNN, ResNet, GPT])
def test_the_model_is_as_it_was(build):
    model = build(64).train()
    model.get_parameter(next(iter(dict(model.named_parameters())))).grad = None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, rng = list(model.parameters()), torch.get_rng_state()
    hooks = torch.nn.modules.module._global_forward_hooks.copy()
    derive(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(module.training for module in model.modules())
    assert torch.equal(rng, torch.get_rng_state())
    assert hooks == torch.nn.modules.module._global_forward_hooks


def test_llama_3_405b_on_the_meta_device_takes_less_than_20_seconds_and_a_gigabyte_and_a_half():
    script = """
        import resource, time, torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from scaling import derive
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
                                                 num_attention_heads=128, num_key_value_heads=8, vocab_size=128256))
        start = time.process_time()
        table = derive(model)
        seconds, gigabytes = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        assert seconds < 20 and gigabytes < 1.5, (seconds, gigabytes)
        assert table.coverage.reached == table.coverage.trainable == 1137
        assert str(table["model.layers.125.self_attn.k_proj.weight"].fan_out) == "d/16"
        assert len(str(table).splitlines()) < 80
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_length_that_rises_and_falls_with_the_width_is_said_to_follow_no_law():
    table = derive(lambda width: nn.Linear(16, {32: 8, 64: 16, 96: 8}[width]), torch.zeros(2, 16), widths=(32, 64, 96))
    (cls,) = [c for c in table.classes if c.size == 8]
    assert not cls.grows
    assert cls.reason == "no law: 8, 16, 8"


def test_a_table_is_pickled_without_its_graph_and_copied_with_it():
    table = derive(MLP(16), torch.randn(2, 16))
    read, copied = pickle.loads(pickle.dumps(table)), copy.deepcopy(table)
    assert read == copied == table
    assert copied.trace is table.trace
    with pytest.raises(NoGraph):
        _ = read.trace
