"""Weights in the forms people have them: recurrent, normalised, adapted, grouped, transposed, indexed. THEORY 2.2 says what is right."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sympy import Rational, oo, sqrt
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from scaling import derive, flow
from scaling.limits import WIDTH, exponent

d = WIDTH


def between(layer):
    """The layer between an input and an output."""
    return lambda width: nn.Sequential(nn.Linear(16, width), layer(width), nn.Linear(width, 10))


class Recurrent(nn.Module):
    def __init__(self, width, kind=nn.LSTM, **options):
        super().__init__()
        self.embed = nn.Embedding(30, width)
        self.rnn = kind(width, width, num_layers=2, **options)
        self.out = nn.Linear(width * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, ids):
        return self.out(self.rnn(self.embed(ids))[0])


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}])
def test_each_gate_of_a_recurrent_layer_is_a_hidden_map(kind, gates, options):
    """Row 29, P06."""
    both = 2 if options else 1
    exact = derive(lambda width: Recurrent(width, kind, **options), widths=(32, 64))
    guessed = derive(Recurrent(32, kind, **options))
    for table in (exact, guessed):
        for name, fan_in in (("rnn.weight_ih_l0", d), ("rnn.weight_hh_l0", d), ("rnn.weight_ih_l1", both * d), ("rnn.weight_hh_l1", d)):
            assert len(table[name].blocks) == gates
            assert {(b.fan_in, b.fan_out, b.copies, b.role) for b in table[name].blocks} == {(fan_in, d, 1, "hidden")}
            assert table[name].shape[0] == gates * 32
        assert table["rnn.bias_hh_l1"].role == "vector"
        assert (table["out.weight"].fan_in, table["out.weight"].role) == (both * d, "output")


def test_a_recurrent_cell_is_used_many_times_and_ruled_once():
    class Cell(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inp, self.cell, self.out = nn.Linear(8, width), nn.LSTMCell(width, width), nn.Linear(width, 5)

        def forward(self, x):
            state = None
            for _ in range(3):
                state = self.cell(self.inp(x), state)
            return self.out(state[0])

    rule = derive(Cell, widths=(32, 64))["cell.weight_hh"]
    assert (len(rule.uses), rule.role, rule.multiplier) == (3, "hidden", 1)


@pytest.mark.parametrize("norm", [weight_norm, torch.nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_the_direction_of_a_weight_normed_matrix_is_hidden_and_its_norm_a_vector(norm):
    """Row 34, P28: v with σ_v = 1/√n has Adam −1, g Adam 0 and SGD +1."""
    table = derive(between(lambda width: norm(nn.Linear(width, width))), widths=(32, 64))
    g, v = (next(rule for rule in table if rule.name.endswith(ends)) for ends in (("original0", "_g"), ("original1", "_v")))
    assert (v.fan_in, v.fan_out, v.role) == (d, d, "hidden")
    assert (g.role, g.exponent("adam"), g.exponent("sgd"), g.exponent("eps")) == ("vector", 0, 1, -1)


def test_a_spectrally_normed_matrix_is_hidden():
    table = derive(between(lambda width: spectral_norm(nn.Linear(width, width))), widths=(32, 64))
    assert table["1.parametrizations.weight.original"].role == "hidden"


@pytest.mark.parametrize("form", ["matrix_exp", "cayley", "householder"])
def test_an_orthogonal_matrix_is_hidden(form):
    table = derive(between(lambda width: orthogonal(nn.Linear(width, width), orthogonal_map=form)), widths=(32, 64))
    rule = table["1.parametrizations.weight.original"]
    assert (rule.fan_in, rule.fan_out, rule.role) == (d, d, "hidden")


class Merged(nn.Module):
    def __init__(self, rows, columns, rank=4):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(rank, columns)), nn.Parameter(torch.zeros(rows, rank))

    def forward(self, W):
        return W + 2.0 * (self.B @ self.A)


class Adapted(nn.Module):
    def __init__(self, width, rank=4):
        super().__init__()
        self.base, self.lora_A, self.lora_B = (
            nn.Linear(width, width),
            nn.Linear(width, rank, bias=False),
            nn.Linear(rank, width, bias=False),
        )

    def forward(self, x):
        return self.base(x) + 2.0 * self.lora_B(self.lora_A(x))


def merged(width):
    layer = nn.Linear(width, width)
    parametrize.register_parametrization(layer, "weight", Merged(width, width))
    return layer


@pytest.mark.parametrize(("layer", "a", "b"), [(merged, ".A", ".B"), (Adapted, "lora_A.weight", "lora_B.weight")])
def test_an_adapter_reads_the_width_in_a_and_emits_it_in_b_merged_or_not(layer, a, b):
    """Row 23, P57: Adam 1/d on A and constant on B (LoRA+: η_B/η_A = Θ(n))."""
    table = derive(between(layer), widths=(32, 64))
    A, B = (next(rule for rule in table if rule.name.endswith(end)) for end in (a, b))
    assert (A.fan_in, A.fan_out, A.role, A.exponent("adam"), A.exponent("sgd")) == (d, 4, "output", -1, -1)
    assert (B.fan_in, B.fan_out, B.role, B.exponent("adam"), B.exponent("sgd")) == (4, d, "input", 0, 1)


class Standardised(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.stem, self.conv, self.gain, self.head = (
            nn.Conv2d(3, d, 7),
            nn.Conv2d(d, d, 3),
            nn.Parameter(torch.ones(d, 1, 1, 1)),
            nn.Linear(d, 5),
        )

    def forward(self, x):
        W = self.conv.weight
        flat = F.batch_norm(W.reshape(1, len(W), -1), None, None, weight=self.gain.view(-1), training=True, momentum=0.0)
        return self.head(F.conv2d(self.stem(x), flat.reshape_as(W)).mean((2, 3)))


def test_the_taps_of_a_standardised_kernel_are_taps():
    rule = derive(Standardised(32), torch.zeros(2, 3, 16, 16))["conv.weight"]
    assert rule.role == "hidden"
    assert rule.fan_in == 9 * rule.fan_out


def test_a_fixed_number_of_groups_keeps_a_convolution_hidden():
    """Row 24, P12."""

    def build(width):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 2 * width, 3, groups=4), nn.Conv2d(2 * width, 5, 1))

    for table in (derive(build, widths=(32, 64)), derive(build(32))):
        rule = table["1.weight"]
        width = rule.dims[0] / 2
        assert (rule.fan_in, rule.fan_out, rule.copies, rule.role) == (9 * width / 4, width / 2, 4, "hidden")


def test_a_transposed_convolution_to_an_image_is_an_output_and_its_stride_thins_the_sum():
    """Row 28, P11: F_in = n·k²/stride²."""

    def build(width):
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.ConvTranspose2d(width, width, 4, stride=2), nn.ConvTranspose2d(width, 3, 4, stride=2)
        )

    table = derive(build, widths=(32, 64))
    assert (table["1.weight"].fan_in, table["1.weight"].fan_out, table["1.weight"].role) == (4 * d, d, "hidden")
    assert (table["2.weight"].fan_in, table["2.weight"].fan_out, table["2.weight"].role) == (4 * d, 3, "output")


def test_a_flattened_map_sums_channels_times_grid():
    """P14."""
    table = derive(
        lambda width: nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(36 * width, 10)),
        (torch.zeros(2, 3, 8, 8),),
        widths=(32, 64),
    )
    assert (table["2.weight"].fan_in, table["2.weight"].role) == (36 * d, "output")


def test_pixel_shuffle_and_patch_merging_keep_their_fans():
    """P20."""

    class Merge(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.stem, self.merge, self.up = nn.Conv2d(3, width, 1), nn.Linear(4 * width, 2 * width), nn.Conv2d(2 * width, 4 * width, 1)
            self.last = nn.Conv2d(width, 3, 1)

        def forward(self, x):
            x = self.stem(x).permute(0, 2, 3, 1)
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = self.merge(x).permute(0, 3, 1, 2)
            return self.last(F.pixel_shuffle(self.up(x), 2))

    table = derive(Merge, (torch.zeros(2, 3, 8, 8),), widths=(32, 64))
    assert (table["merge.weight"].fan_in, table["merge.weight"].fan_out, len(table["merge.weight"].blocks)) == (4 * d, 2 * d, 1)
    assert (table["last.weight"].fan_in, table["last.weight"].role) == (d, "output")


def test_a_skip_that_is_concatenated_is_summed_over_all_its_channels():
    """P40."""

    class Skip(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b, self.c = (
                nn.Conv2d(3, width, 3, padding=1),
                nn.Conv2d(width, 2 * width, 3, padding=1),
                nn.Conv2d(3 * width, width, 1),
            )
            self.out = nn.Conv2d(width, 2, 1)

        def forward(self, x):
            a = torch.relu(self.a(x))
            return self.out(self.c(torch.cat([a, self.b(a)], 1)))

    rule = derive(Skip, widths=(16, 32))["c.weight"]
    assert (len(rule.blocks), rule.fan_in, rule.fan_out) == (1, 3 * d, d)


def test_layer_scale_class_token_and_logit_scale_are_vectors_and_a_scalar():
    """Rows 2, 11, 12."""

    class Odds(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inp, self.token, self.scale = (
                nn.Linear(8, width),
                nn.Parameter(torch.randn(1, 1, width)),
                nn.Parameter(torch.full((width,), 1e-4)),
            )
            self.mix, self.temperature, self.out = nn.Linear(width, width), nn.Parameter(torch.tensor(1.0)), nn.Linear(width, 5)

        def forward(self, x):
            h = torch.cat([self.token.expand(len(x), -1, -1), self.inp(x)], 1)
            h = h + self.scale * self.mix(h)
            return self.out(h[:, 0]) * self.temperature.exp()

    table = derive(Odds, (torch.zeros(2, 6, 8),), widths=(32, 64))
    assert [table[name].role for name in ("token", "scale", "temperature")] == ["vector", "vector", "scalar"]
    assert [table[name].exponent("sgd") for name in ("token", "scale", "temperature")] == [1, 1, 0]
    assert (table["scale"].copies, table["token"].fan_out) == (d, d)


def test_rows_of_finite_and_growing_outputs_are_blocks():
    """P16: Mamba's x_proj."""

    class Projection(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inp, self.x_proj = nn.Linear(8, width), nn.Linear(width, width // 16 + 2 * 4, bias=False)
            self.dt_proj, self.out = nn.Linear(width // 16, width), nn.Linear(width, 5)
            self.rank = width // 16

        def forward(self, x):
            h = self.inp(x)
            dt, B, C = self.x_proj(h).split([self.rank, 4, 4], -1)
            return self.out(F.softplus(self.dt_proj(dt)) * h * (B * C).sum(-1, keepdim=True))

    table = derive(Projection, (torch.zeros(2, 6, 8),), widths=(64, 128))
    rule = table["x_proj.weight"]
    assert rule.dims == (d / 16 + 8, d)
    assert [(b.role, b.fan_out, b.exponent("init_std")) for b in rule.blocks] == [
        ("hidden", d / 16, Rational(-1, 2)),
        ("output", 4, -1),
        ("output", 4, -1),
    ]
    assert table["dt_proj.weight"].blocks[0].init_std == 4 / sqrt(d)


def test_grouped_query_attention_has_hidden_keys_while_their_heads_grow_and_output_like_ones_if_not():
    """Rows 15a and 15b, P34."""

    class Queries(nn.Module):
        def __init__(self, width, kv):
            super().__init__()
            self.inp, self.q, self.out = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 5)
            self.kv = nn.Linear(width, 2 * kv * 16)
            self.heads, self.groups = width // 16, kv

        def forward(self, x):
            h = self.inp(x)
            b, t, _ = h.shape
            q = self.q(h).view(b, t, self.heads, 16).transpose(1, 2)
            k, v = (y.view(b, t, self.groups, 16).transpose(1, 2) for y in self.kv(h).chunk(2, -1))
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.out(y.transpose(1, 2).reshape(b, t, -1))

    x = (torch.zeros(2, 6, 8),)
    growing = derive(lambda width: Queries(width, width // 32), x, widths=(64, 128))["kv.weight"]
    finite = derive(lambda width: Queries(width, 2), x, widths=(64, 128))["kv.weight"]
    assert [(b.role, b.fan_out) for b in growing.blocks] == [("hidden", d / 2)] * 2
    assert [(b.role, b.fan_out, b.exponent("sgd"), b.exponent("adam"), b.exponent("eps")) for b in finite.blocks] == [
        ("output", 32, -1, -1, 0)
    ] * 2


def tiny(config, model, **options):
    import transformers

    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(vocab_size=61, **options))


def test_mixtral_mamba_and_t5_from_their_configs_have_every_expert_state_and_table_right():
    """Rows 17, 20, 21, 30: routed experts, a state space model with mixed rows, relative positions; no inputs, no code per model."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1}
    mixtral = derive(
        tiny(
            "MixtralConfig",
            "MixtralForCausalLM",
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            **sizes,
        )
    )
    experts = mixtral["model.layers.0.mlp.experts.gate_up_proj"]
    assert {(b.fan_in, b.fan_out, b.copies, b.role) for b in experts.blocks} == {(d, 3 * d / 2, 4, "hidden")}
    assert len(experts.blocks) == 2
    assert mixtral["model.layers.0.mlp.gate.weight"].role == "output"
    mamba = derive(tiny("MambaConfig", "MambaForCausalLM", state_size=8, **sizes))
    mixer = "backbone.layers.0.mixer"
    assert [b.role for b in mamba[f"{mixer}.x_proj.weight"].blocks] == ["hidden", "output", "output"]
    assert [mamba[f"{mixer}.{name}"].role for name in ("A_log", "D", "conv1d.weight", "dt_proj.bias")] == ["vector"] * 4
    t5 = derive(tiny("T5Config", "T5ForConditionalGeneration", d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4))
    bias = t5["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert (bias.exponent("sgd"), bias.dims) == (1, (32, d / 16))
    heads = next(c for c in t5.classes if (bias.name, 1) in c.where)
    assert ("encoder.block.0.layer.0.SelfAttention.q.weight", 0) in heads.where
    for table in (mixtral, mamba, t5):
        assert table.coverage.unreached == table.coverage.operators_without_rule == ()
        assert all(c.known for c in table.classes)


class Steps(nn.Module):
    """A diffusion transformer's ends: sinusoids of the time step go in, patches of 2 × 2 pixels come out."""

    def __init__(self, width):
        super().__init__()
        self.time, self.mid, self.out = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 2 * 2 * 8)

    def forward(self, t):
        angles = t[:, None] * torch.exp(-torch.arange(32) / 32)
        x = self.out(self.mid(torch.cat([angles.cos(), angles.sin()], -1) @ self.time.weight.T).relu())
        return torch.einsum("bpqc->bcpq", x.view(-1, 2, 2, 8))


def test_sinusoids_are_an_input_and_patches_an_output_from_one_model_too():
    for table in (derive(Steps, (torch.ones(3),), widths=(64, 96)), derive(Steps(96), (torch.ones(3),))):
        assert [table[f"{name}.weight"].role for name in ("time", "mid", "out")] == ["input", "hidden", "output"]


class Loss(nn.Module):
    """What people write who let the model return its loss."""

    def __init__(self, loss, width=64):
        super().__init__()
        self.embed, self.mid, self.head, self.loss = nn.Embedding(30, width), nn.Linear(width, width), nn.Linear(width, 30), loss

    def forward(self, ids, targets):
        logits = self.head(self.mid(self.embed(ids)).relu())
        return self.loss(logits.flatten(0, 1), targets.flatten(0, 1))


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (F.cross_entropy, torch.ones(2, 8, dtype=torch.long)),
        (lambda x, y: F.nll_loss(x.log_softmax(-1), y), torch.ones(2, 8, dtype=torch.long)),
        (F.mse_loss, torch.ones(2, 8, 30)),
        (F.binary_cross_entropy_with_logits, torch.ones(2, 8, 30)),
    ],
    ids=["cross_entropy", "nll_loss", "mse_loss", "bce"],
)
def test_a_readout_that_only_a_loss_sees_is_an_output(loss, targets):
    ids = torch.ones(2, 8, dtype=torch.long)
    for table in (derive(lambda width: Loss(loss, width), (ids, targets), widths=(64, 96)), derive(Loss(loss), (ids, targets))):
        assert [rule.role for rule in table if rule.name.endswith("weight")] == ["embedding", "hidden", "output"]
        moved = flow(table, "adam")
        assert not moved.unknown
        assert {value.change for value in moved.values} <= {0, -oo}  # the targets do not move


class Graph(nn.Module):
    """Messages along edges, summed at their ends."""

    def __init__(self, width, how):
        super().__init__()
        self.lift, self.mid, self.out, self.how = nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, 7), how

    def gather(self, x, edges):
        messages, ends = x[edges[0]], edges[1]
        if self.how == "index_add":
            return x.new_zeros(x.shape).index_add_(0, ends, messages)
        return x.new_zeros(x.shape).scatter_add_(0, ends[:, None].expand_as(messages), messages)

    def forward(self, x, edges):
        for layer in (self.lift, self.mid, self.out):
            x = self.gather(layer(x), edges)
        return x


@pytest.mark.parametrize("how", ["index_add", "scatter_add"])
def test_features_pass_a_scatter_over_edges(how):
    args = (torch.ones(10, 16), torch.arange(40).view(2, 20) % 10)
    table = derive(Graph(64, how), args)
    assert [table[f"{name}.weight"].role for name in ("lift", "mid", "out")] == ["input", "hidden", "output"]


class Codes(nn.Module):
    """Vector quantisation: the nearest row of a codebook, with the straight-through gradient."""

    def __init__(self, width):
        super().__init__()
        self.lift, self.codes, self.out = nn.Linear(16, width), nn.Embedding(32, width), nn.Linear(width, 16)

    def forward(self, x):
        z = self.lift(x)
        q = self.codes(torch.cdist(z, self.codes.weight).argmin(-1))
        return self.out(z + (q - z).detach())


def test_a_codebook_is_an_embedding_whatever_finds_its_nearest_row():
    """Row 38."""
    table = derive(Codes, (torch.ones(4, 16),), widths=(64, 96))
    assert table["codes.weight"].role == "embedding"
    assert table["codes.weight"].fan_in == 1


class RelativePositions(nn.Module):
    """Keys made of the sines of distances, which nothing that the model is given enters (Transformer-XL, parakeet)."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.embed, self.query, self.positions, self.head = (
            nn.Embedding(11, d),
            nn.Linear(d, d),
            nn.Linear(d, d, bias=False),
            nn.Linear(d, 5),
        )
        self.register_buffer("frequencies", torch.ones(d // 2))

    def forward(self, ids):
        angles = torch.arange(6.0)[:, None] * self.frequencies
        keys = self.positions(torch.cat([angles.sin(), angles.cos()], -1)).unflatten(-1, (self.heads, -1))
        queries = self.query(self.embed(ids)).unflatten(-1, (self.heads, -1))
        return self.head((torch.einsum("bihe,jhe->bhij", queries, keys).softmax(-1) @ queries.transpose(1, 2)).transpose(1, 2).flatten(2))


def test_a_matrix_that_reads_the_sines_of_positions_is_hidden():
    table = derive(lambda d: RelativePositions(d, d // 8), torch.zeros(2, 6, dtype=torch.long), widths=(16, 24, 32))
    assert table["positions.weight"].role == "hidden"


class Regrouped(nn.Module):
    """Heads that grow, dealt to a fixed number of groups that they are no multiple of."""

    def __init__(self, d, groups=8):
        super().__init__()
        self.groups = groups
        self.first, self.gain = nn.Linear(7, d), nn.Parameter(torch.ones(d // 16))
        self.of_groups = nn.Parameter(torch.randn(groups, d // groups, 3))
        self.last = nn.Linear(3 * groups, 5)

    def forward(self, x):
        x = self.first(x).unflatten(-1, (-1, 16)) * self.gain[:, None]
        return self.last(torch.einsum("bgi,gio->bgo", x.reshape(len(x), self.groups, -1), self.of_groups).flatten(1))


def test_heads_and_groups_without_a_common_factor_are_not_the_same_dimension():
    table = derive(Regrouped, torch.zeros(3, 7), widths=(64, 128, 192))
    d = table.width
    assert table["gain"].dims == (d / 16,)
    assert table["of_groups"].dims == (8, d / 8, 3)


class OneKey(nn.Module):
    """A state space whose heads share one B, repeated for all of them (Mamba-2 with one group)."""

    def __init__(self, d, inner, size=8):
        super().__init__()
        self.size = size
        self.first, self.inner, self.shared = nn.Linear(7, d), nn.Linear(d, inner), nn.Linear(d, size)
        self.decay, self.back, self.last = nn.Parameter(torch.zeros(inner // size)), nn.Linear(inner, d), nn.Linear(d, 5)

    def forward(self, x):
        x = self.first(x)
        y = self.inner(x).unflatten(-1, (-1, self.size))
        shared = self.shared(x).unsqueeze(-2).expand(y.shape)
        return self.last(self.back((y * shared * self.decay[:, None]).flatten(-2)))


def test_the_heads_that_share_one_key_grow_not_their_size():
    table = derive(OneKey(64, 128), torch.zeros(3, 7))
    assert [table[name].dims[0].has(table.width) for name in ("decay", "shared.weight")] == [True, False]


class HeadsAsAnAxis(nn.Module):
    """Projections [d, heads, head_dim], as Transformer-XL writes them, beside linear ones."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.embed, self.query = nn.Embedding(11, d), nn.Linear(d, d)
        self.kernel, self.bias = nn.Parameter(torch.randn(d, heads, d // heads)), nn.Parameter(torch.zeros(heads, d // heads))
        self.head = nn.Linear(d, 5)

    def forward(self, ids):
        x = self.embed(ids)
        query = self.query(x).unflatten(-1, (self.heads, -1)) + self.bias
        scores = torch.einsum("bihe,bjhe->bhij", query, torch.einsum("bjd,dhe->bjhe", x, self.kernel))
        return self.head((scores.softmax(-1) @ torch.einsum("bihe,dhe->bhid", query, self.kernel)).mean(1))


def test_heads_that_are_an_axis_of_their_own_grow_and_their_size_does_not():
    table = derive(HeadsAsAnAxis(64, 4), torch.zeros(2, 6, dtype=torch.long))
    assert [dim.has(table.width) for dim in table["kernel"].dims] == [True, True, False]


class Pooled(nn.Module):
    """An encoder that returns a pooled vector as long as its stream, and has positions that are interpolated to the grid of the image."""

    def __init__(self, d):
        super().__init__()
        self.patches, self.positions = nn.Conv2d(3, d, 4, 4), nn.Parameter(torch.zeros(36, d))
        self.mid, self.back, self.pool = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.Linear(d, d)

    def forward(self, images):
        x = self.patches(images)
        grid = torch.zeros(len(x), *x.shape[2:], 2)
        table = self.positions.unflatten(0, (6, 6)).permute(2, 0, 1).expand(len(x), -1, -1, -1)
        x = (x + F.grid_sample(table, grid, align_corners=False)).flatten(2).mT
        return self.pool((x + self.back(self.mid(x).relu())).mean(1)).tanh()


def test_an_output_as_long_as_the_stream_grows_and_a_sampled_grid_of_positions_does_not():
    table = derive(Pooled(32), torch.zeros(2, 3, 32, 32))
    assert table["pool.weight"].role == "hidden"
    assert [dim.has(table.width) for dim in table["positions"].dims] == [False, True]


class LearnedTokens(nn.Module):
    """Learned tokens go before the patches, and a matrix mixes them (GroupViT)."""

    def __init__(self, d, count=64):
        super().__init__()
        self.count = count
        self.patches, self.tokens = nn.Conv2d(3, d, 4, 4), nn.Parameter(torch.zeros(1, count, d))
        self.mid, self.mix, self.head = nn.Linear(d, d), nn.Linear(count, count), nn.Linear(d, 5)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        x = self.mid(torch.cat([self.tokens.expand(len(x), -1, -1), x], 1))[:, : self.count]
        return self.head(self.mix(x.mT).mean(-1))


def test_the_number_of_learned_tokens_does_not_grow():
    table = derive(LearnedTokens(64), torch.zeros(2, 3, 32, 32))
    assert [dim.has(table.width) for dim in table["tokens"].dims] == [False, False, True]
    assert not table["mix.weight"].dims[1].has(table.width)


class Rows(nn.Module):
    """Features of a fixed length cut into rows of the stream's width, which fits at one width by chance (a projector that is not one)."""

    def __init__(self, d):
        super().__init__()
        self.first, self.last, self.head = nn.Linear(7, 2048), nn.Linear(d, d), nn.Linear(d, 5)

    def forward(self, x):
        return self.head(self.last(self.first(x).reshape(-1, self.last.in_features)))


def test_an_axis_of_one_length_at_every_width_does_not_grow_whatever_it_is_cut_into():
    table = derive(Rows, torch.zeros(3, 7), widths=(64, 128))
    assert table["first.weight"].dims == (2048, 7)


class Ensemble(nn.Module):
    """Members of one shape: one after the other, or stacked and mapped over (torch.vmap), or stacked for one product."""

    def __init__(self, width, how):
        super().__init__()
        self.first = nn.Linear(7, width)
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 5)) for _ in range(3))
        self.how = how
        self.__dict__["skeleton"] = copy.deepcopy(self.nets[0]).to("meta")  # no child: its weights are no one's

    def forward(self, x):
        x = self.first(x)
        if self.how == "loop":
            return torch.stack([net(x) for net in self.nets]).mean(0)
        if self.how == "vmap":
            params, _ = torch.func.stack_module_state(list(self.nets))
            return torch.vmap(lambda p, y: torch.func.functional_call(self.skeleton, p, (y,)), in_dims=(0, None))(params, x).mean(0)
        w, b, v, c = (torch.stack(same) for same in zip(*(net.parameters() for net in self.nets), strict=True))
        h = torch.relu(torch.einsum("bi,eoi->ebo", x, w) + b[:, None])
        return (torch.bmm(h, v.mT) + c[:, None]).mean(0)


@pytest.mark.parametrize("how", ["vmap", "einsum"])
def test_stacked_modules_have_the_rules_of_modules_that_run_one_after_the_other(how):
    def rules(how):
        table = derive(lambda width: Ensemble(width, how), (torch.zeros(2, 7),), widths=(32, 48))
        return {rule.name: (rule.role, rule.fan_in, rule.fan_out, rule.copies, rule.init_std, rule.lr) for rule in table}

    assert rules(how) == rules("loop")


class Joined(nn.Module):
    """Two maps of one input as rows of one matrix, two of two inputs as columns of another; or each by itself."""

    def __init__(self, width, joined, by=0.0):
        super().__init__()
        self.first, self.out, self.by = nn.Linear(7, width, bias=False), nn.Linear(width, 5), 1 / width**by
        for name, shape in {"a": (width, width), "b": (3, width), "c": (width, width), "e": (width, 3), "f": (width,), "g": (3,)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.joined = joined

    def forward(self, x):
        x = self.first(x)
        if self.joined:
            rows = torch.tanh(F.linear(x, torch.cat([self.a, self.b]), torch.cat([self.f, self.g])) * self.by)
            return self.out(F.linear(rows, torch.cat([self.c, self.e], 1)))
        rows, few = torch.tanh(F.linear(x, self.a, self.f) * self.by), torch.tanh(F.linear(x, self.b, self.g) * self.by)
        return self.out(F.linear(rows, self.c) + F.linear(few, self.e))


@pytest.mark.parametrize("by", [0, 1])
def test_weights_joined_to_one_matrix_have_the_rules_of_maps_of_their_own(by):
    """With what multiplies the whole made up for in every one of them."""

    def rules(joined):
        table = derive(lambda width: Joined(width, joined, by), (torch.zeros(2, 7),), widths=(32, 48))
        return {rule.name: (rule.role, rule.fan_in, rule.fan_out, rule.init_std, rule.lr) for rule in table}

    apart = rules(joined=False)
    assert rules(joined=True) == apart
    assert [apart[name][0] for name in "abce"] == ["hidden", "output", "hidden", "input"]
    assert exponent(apart["b"][3]) == by - 1


# --- products summed -----------------------------------------------------------------------------------------------------------------


class Scored(nn.Module):
    """Attention of GATv2 (Brody et al. 2021, arXiv 2105.14491) over 5 neighbours and 2 heads, with `score(h, att)` as one writes it."""

    def __init__(self, width, score):
        super().__init__()
        self.score, self.stem = score, nn.Linear(12, 2 * width)
        self.att, self.right, self.out = nn.Parameter(torch.randn(2, width)), nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, 7)

    def forward(self, x):
        h = F.elu(self.stem(x))
        right = self.right(h).unflatten(-1, (2, -1))
        weights = self.score(F.leaky_relu(right), self.att).softmax(1)
        return self.out((right * weights.unsqueeze(-1)).sum(1).flatten(1))


def as_einsum(h, att):
    return torch.einsum("bnhc,hc->bnh", h, att)


SUMS = {
    "mul, sum": lambda h, att: (h * att).sum(-1),
    "sum over a tuple, kept": lambda h, att: torch.sum(att * h, dim=(3,), keepdim=True).squeeze(-1),
    "with axes of one": lambda h, att: (h * att[None, None]).sum(dim=-1),
}


@pytest.mark.parametrize("how", SUMS)
def test_a_weight_times_data_summed_over_the_width_is_a_map_and_no_gain(how):
    x = torch.randn(3, 5, 12)
    exact, same = (derive(lambda width, score=score: Scored(width, score), x, widths=(32, 64))["att"] for score in (SUMS[how], as_einsum))
    assert (
        (exact.fan_in, exact.fan_out, exact.copies, exact.role)
        == (same.fan_in, same.fan_out, same.copies, same.role)
        == (d, 1, 2, "output")
    )
    assert (exact.init_std, exact.lr) == (same.init_std, same.lr)
    guessed, same = (derive(Scored(32, score), x)["att"] for score in (SUMS[how], as_einsum))  # 32 is a head's size there
    assert (guessed.fan_in, guessed.init_std, guessed.lr) == (same.fan_in, same.init_std, same.lr)


def test_the_flow_of_a_summed_product_is_that_of_a_readout():
    table = derive(lambda width: Scored(width, SUMS["mul, sum"]), torch.randn(3, 5, 12), widths=(32, 64))
    for family in ("adam", "muon"):
        result = flow(table, family)
        (score,) = [value for value in result.values if value.operator == "aten.sum" and "h * att" in value.source.code]
        assert (score.init, score.first, score.change) == (-Rational(1, 2), 0, 0)
        assert result.of("out").change == 0


def test_a_matrix_times_a_vector_written_out_is_a_linear_map():
    def written(width, product):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.out = nn.Linear(12, width), nn.Linear(width, 7)
                self.W = nn.Parameter(torch.randn(2 * width, width))
                self.back = nn.Linear(2 * width, width)

            def forward(self, x):
                return self.out(self.back(product(self.stem(x).relu(), self.W).relu()))

        return Net()

    plain, summed = (
        derive(lambda width, product=product: written(width, product), torch.randn(3, 12), widths=(32, 64))["W"]
        for product in (F.linear, lambda x, W: (x.unsqueeze(-2) * W).sum(-1))
    )
    assert (summed.fan_in, summed.fan_out, summed.role) == (plain.fan_in, plain.fan_out, plain.role) == (d, 2 * d, "hidden")
    assert (summed.init_std, summed.lr) == (plain.init_std, plain.lr)


GAINS = {
    "over the tokens": lambda h, gain: (h * gain).sum(1, keepdim=True).sum(-1),
    "used elsewhere too": lambda h, gain: (scaled := h * gain).mean(-1) + 0 * scaled.sum(-1),
    "a mean, which has its 1/d": lambda h, gain: (h * gain).mean(-1),
}


@pytest.mark.parametrize("how", GAINS)
def test_a_gain_stays_one_where_its_own_axis_is_not_summed_alone(how):
    table = derive(lambda width: Scored(width, GAINS[how]), torch.randn(3, 5, 12), widths=(32, 64))
    assert (table["att"].fan_in, table["att"].role) == (1, "vector")


def test_softmax_over_the_edges_of_a_graph_has_a_flow():
    class Edges(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.stem, self.att, self.out = nn.Linear(12, width), nn.Parameter(torch.randn(width)), nn.Linear(width, 7)

        def forward(self, x, edges):
            h, (source, target) = self.stem(x), edges
            score = (F.leaky_relu(h[source] + h[target]) * self.att).sum(-1)
            largest = torch.zeros(len(x)).scatter_reduce(0, target, score, "amax")
            weights = (score - largest[target]).exp()
            weights = weights / torch.zeros(len(x)).scatter_add(0, target, weights)[target]
            return self.out(torch.zeros_like(h).index_add(0, target, h[source] * weights.unsqueeze(-1)))

    edges = torch.cat([torch.randint(0, 9, (2, 30), generator=torch.Generator().manual_seed(0)), torch.arange(9).expand(2, 9)], dim=1)
    result = flow(derive(Edges, (torch.randn(9, 12), edges), widths=(32, 64)), "adam")
    assert result.unknown == ()
    assert {value.change for value in result.values if value.operator in {"aten.scatter_reduce", "aten.scatter_add"}} == {0}
    assert (result.of("out").init, result.of("out").change) == (-Rational(1, 2), 0)


class WavLMAttention(nn.Module):
    """Three projections, whose biases torch's function wants in one row and takes apart again."""

    def __init__(self, d):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, d), nn.Linear(d, 50)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        x = self.embed(x).transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            x, x, x, x.size(-1), x.size(-1) // 16, None, torch.cat((self.q.bias, self.k.bias, self.v.bias)), None, None, False, 0.0,
            self.o.weight, self.o.bias, use_separate_proj_weight=True, q_proj_weight=self.q.weight, k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
        )  # fmt: skip
        return self.head(x + y)


def test_a_bias_taken_from_a_row_of_several_is_judged_alone():
    table = derive(WavLMAttention(32), (torch.randint(0, 50, (2, 8)),), also=WavLMAttention(64))
    assert [table[f"{name}.bias"].role for name in "qkvo"] == ["vector"] * 4
    assert [len(table[f"{name}.bias"].uses) for name in "qkvo"] == [1] * 4
    assert table["v.bias"].exponent("adam") == 0


class Scaled(nn.Module):
    """A matrix that another weight multiplies before data is met: per input, per output, entry by entry (a KAN's splines)."""

    def __init__(self, width, shape):
        super().__init__()
        self.first, self.last, self.matrix = nn.Linear(7, width), nn.Linear(width, 5), nn.Parameter(torch.randn(width, width, 3))
        self.scale = nn.Parameter(torch.randn(*(width if long else 1 for long in shape), 1))

    def forward(self, x):
        return self.last(F.linear(torch.cat([self.first(x)] * 3, -1), (self.matrix * self.scale).flatten(1)))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((True, False), (0, 1, 0)), ((False, True), (0, 1, 0)), ((True, True), (0, 1, Rational(-1, 2)))],
    ids=["per output", "per input", "entry by entry"],
)
def test_a_weight_that_multiplies_a_matrix_is_no_second_matrix(shape, wanted):
    """Measured at widths 64 to 512: init and change of the map are Θ(1), of either factor; as matrices both, d^-1/2.

    Entry by entry Δs meets entries of 1/√fan_in that are aligned with x, which makes it √fan_in·Δs: its rate is 1/√fan_in.
    """
    table = derive(lambda width: Scaled(width, shape), (torch.zeros(4, 7),), widths=(32, 64, 96))
    assert tuple(table["scale"].exponent(name) for name in ("init_std", "sgd", "adam")) == wanted
    assert tuple(table["matrix"].exponent(name) for name in ("init_std", "sgd", "adam")) == (Rational(-1, 2), 0, -1)
    init = [value.init for value in flow(table).values if value.operator == "aten.linear"]
    assert init == [0, 0, Rational(-1, 2)]


class ToOneNumber(nn.Module):
    """The weight of the readout is a vector."""

    def __init__(self, d):
        super().__init__()
        self.first, self.last = nn.Linear(5, d), nn.Parameter(torch.randn(d))

    def forward(self, x):
        return F.linear(self.first(x).relu(), self.last)


def test_a_linear_map_whose_weight_is_a_vector_has_it_as_its_only_row():
    """As D-FINE takes the mean over its bins."""
    rule = derive(ToOneNumber, (torch.randn(3, 5),), widths=(32, 64))["last"]
    row = derive(lambda width: nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 1)), (torch.randn(3, 5),), widths=(32, 64))
    assert rule.role == "output"
    assert [rule.exponent(name) for name in ("init_std", "sgd", "adam")] == [
        row["2.weight"].exponent(name) for name in ("init_std", "sgd", "adam")
    ]
