"""The pitfalls of THEORY section 5: the right rule is derived and the naive one rejected, or the user is told.

Most are tested where their mechanism is; `ELSEWHERE` says where. The rest are here, in THEORY's order.
"""

import ast
import re
from pathlib import Path

import pytest
import sympy
import torch
import torch.nn.functional as F
from models import GPT, MLP, ids
from torch import nn

import compiler
from compiler.optimizer import SpectralOptimizer
from scaling import derive, flow, verify
from scaling.errors import ConflictingUses
from scaling.limits import WIDTH, exponent
from scaling.parametrizations import parametrization

d, R, ONE = WIDTH, sympy.Rational, sympy.Integer(1)
root = sympy.sqrt(d)
X = torch.zeros(4, 16)

ELSEWHERE = {
    "P01": "test_verify.py::test_p01_a_tied_embedding_needs_its_multiplier_on_the_readout_use_only",
    "P04": "test_compile.py::test_each_map_keeps_the_update_at_its_spectral_norm",
    "P06": "test_weights.py::test_each_gate_of_a_recurrent_layer_is_a_hidden_map",
    "P07": "test_derive.py::test_a_convolution_sums_its_kernel_taps_and_a_depthwise_one_only_those",
    "P08": "test_optimizer.py::test_a_conv_kernel_is_one_matrix_of_out_times_in_taps",
    "P09": "test_verify.py::test_pitfall",
    "P10": "test_derive.py::test_a_lookup_and_a_linear_of_one_hot_have_the_same_exponents",
    "P12": "test_weights.py::test_a_fixed_number_of_groups_keeps_a_convolution_hidden",
    "P13": "test_verify.py::test_pitfall",
    "P14": "test_weights.py::test_a_flattened_map_sums_channels_times_grid",
    "P18": "test_errors.py::test_conflicting_uses_name_both_lines",
    "P19": "test_errors.py::test_three_growing_axes",
    "P20": "test_weights.py::test_pixel_shuffle_and_patch_merging_keep_their_fans",
    "P21": "test_verify.py::test_pitfall",
    "P24": "test_verify.py::test_p24_an_output_bias_at_lr_d_moves_logits_and_no_feature",
    "P25": "test_verify.py::test_pitfall",
    "P26": "test_compile.py::test_init_keeps_constants_padding_and_vectors_with_a_law_of_their_own_and_zeroes_random_biases",
    "P28": "test_weights.py::test_the_direction_of_a_weight_normed_matrix_is_hidden_and_its_norm_a_vector",
    "P30": "test_verify.py::test_p30_what_the_root_of_d_in_attention_leaves_missing_must_be_folded",
    "P31": "test_verify.py::test_p31_heads_that_grow_leave_nothing_missing",
    "P32": "test_derive.py::test_a_growing_head_dimension_folds_the_rest_of_its_1_over_d_into_q_alone",
    "P34": "test_weights.py::test_grouped_query_attention_has_hidden_keys_while_their_heads_grow_and_output_like_ones_if_not",
    "P36": "test_depth_executed.py::test_p36_a_multiplier_on_the_stream_is_no_branch_multiplier",
    "P37": "test_depth_executed.py::test_p37_the_init_of_gpt2_alone_is_not_equivalent_to_a_branch_multiplier",
    "P38": "test_depth_executed.py::test_p38_a_depth_factor_on_the_learning_rate_of_all_weights_is_rejected",
    "P39": "test_depth_executed.py::test_p39_the_unshared_sgd_rule_is_rejected_for_shared_blocks",
    "P40": "test_depth_executed.py::test_p40_concatenated_skips_are_no_residual_branches",
    "P41": "test_verify.py::test_pitfall",
    "P42": "test_verify.py::test_pitfall",
    "P43": "test_verify.py::test_p43_svc_clips_at_a_scale_that_follows_the_width",
    "P44": "test_verify.py::test_p44_a_constant_epsilon_is_a_failure_where_gradients_shrink",
    "P46": "test_parametrizations.py::test_clipping_the_global_norm_depends_on_the_gauge_and_ours_does_not",
    "P47": "test_verify.py::test_p47_a_constant_coupled_decay_fades_on_hidden_weights_alone",
    "P48": "test_parametrizations.py::test_a_naive_shift_changes_five_steps",
    "P49": "test_lint.py::test_l2_inside_adam_is_found",
    "P50": "test_transfer.py::test_schedulers_keep_the_ratio_of_effective_learning_rates",
    "P51": "test_verify.py::test_pitfall",
    "P52": "test_compile.py::test_initialising_twice_is_refused",
    "P53": "test_optimizer.py::test_deepcopy_and_pickle_go_on_as_the_original",
    "P55": "test_verify.py::test_pitfall",
    "P57": "test_verify.py::test_pitfall",
    "P60": "test_verify.py::test_a_readout_that_starts_at_zero_is_mup_all_the_same",
    "P61": "test_verify.py::test_p61_logits_that_vanish_at_init_are_no_failure_and_good_inits_no_proof",
    "P62": "test_lint.py::test_a_matrix_with_a_mean_is_found",
    "P64": "test_capture.py::test_frozen_weights_have_no_rule",
}


def test_every_pitfall_has_a_test():
    here = {one.upper() for one in re.findall(r"^def test_(p\d\d)_", Path(__file__).read_text(), re.MULTILINE)}
    assert sorted(here | set(ELSEWHERE)) == [f"P{i:02}" for i in range(1, 66)]
    for file, name in (place.split("::") for place in ELSEWHERE.values()):
        tree = ast.parse((Path(__file__).parent / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, name)


def rejected(table, name, family="adam", blocks=None, **law):
    """What fails, as {(weight, obligation): excess}, if the blocks of one weight have a naive law and all else is muP."""
    right = parametrization(table, "table3", family)
    assert verify(right, table=table)
    if "lr" in law:
        law["weight_decay"] = 1 / law["lr"]
    laws = tuple(one.model_copy(update=law if blocks is None or i in blocks else {}) for i, one in enumerate(right.laws[name]))
    verdict = verify(right.model_copy(update={"laws": {**right.laws, name: laws}}), table=table)
    return {(one.weight, one.name): one.excess for one in verdict.failed}


class Net(nn.Module):
    """Parts by name, and a forward given as a function."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.run(self, *args)


def linear(*sizes):
    return nn.Linear(*sizes, bias=False)


def net(forward, parts, *inputs):
    """The table of a model with a stem 16 → d, the parts at width d, and a readout `out` if there is none."""
    return derive(lambda w: Net(forward, **{"stem": linear(16, w), "out": linear(w, 5), **parts(w)}), inputs or (X,), widths=(64, 128))


# --- weights, layouts, fusion -------------------------------------------------------------------------------------------------------


def test_p02_an_embedding_times_the_root_of_d_that_is_tied_needs_form_c():
    class Gemma(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.wte, self.mid, self.norm, self.scale = nn.Embedding(61, width), linear(width, width), nn.LayerNorm(width), width**0.5

        def forward(self, tokens):
            return F.linear(self.norm(self.mid(self.wte(tokens) * self.scale)), self.wte.weight)

    table = derive(Gemma, ids(), widths=(64, 128))
    rule = table["wte.weight"]
    assert [rule.exponent(name) for name in ("init_std", "adam", "sgd")] == [R(-1, 2), R(-1, 2), 0]
    assert [use.multiplier for use in rule.uses] == [1, 1 / root]
    form_b = rejected(table, "wte.weight", init_std=ONE, lr=ONE, eps=1 / d)
    assert form_b["wte.weight", "init"] == form_b["wte.weight", "update"] == R(1, 2)


def test_p03_a_head_kept_as_in_and_out_is_an_output_and_not_an_input():
    table = net(lambda m, x: torch.tanh(m.stem(x)) @ m.out, lambda w: {"out": nn.Parameter(torch.zeros(w, 5))})
    assert (table["out"].role, table["out"].fan_in, table["out"].fan_out) == ("output", d, 5)
    naive = rejected(table, "out", init_std=1 / sympy.sqrt(5), lr=ONE)
    assert (naive["out", "init"], naive["out", "update"]) == (1, 1)


@pytest.mark.parametrize(("kv", "role", "fan_out"), [(lambda w: w // 32, "hidden", d / 2), (lambda w: 2, "output", 32)])
def test_p05_q_k_v_of_grouped_queries_fused_are_three_unequal_blocks(kv, role, fan_out):
    def run(m, x):
        sizes = [m.q, m.kv, m.kv]
        q, k, v = (y.unflatten(-1, (-1, 16)).transpose(1, 2) for y in m.qkv(m.stem(x)[None]).split(sizes, -1))
        return m.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(-2))

    table = net(run, lambda w: {"qkv": linear(w, w + 2 * 16 * kv(w)), "q": w, "kv": 16 * kv(w)})
    assert [(b.role, b.fan_out) for b in table["qkv.weight"].blocks] == [("hidden", d), (role, fan_out), (role, fan_out)]
    if role == "output":  # one class for the tensor: its SGD rate is d too large for k and v
        assert set(rejected(table, "qkv.weight", "sgd", lr=ONE).values()) == {1}


def test_p11_a_transposed_convolution_to_an_image_is_no_input():
    table = net(
        lambda m, x: m.image(m.stem(x)[..., None, None]),
        lambda w: {"image": nn.ConvTranspose2d(w, 3, 4, 2, bias=False), "out": nn.Identity()},
    )
    naive = rejected(table, "image.weight", init_std=ONE, lr=ONE)  # torch's fan_in is 3·k²
    assert (naive["image.weight", "init"], naive["image.weight", "update"]) == (1, 1)


def test_p15_columns_of_constant_features_are_no_hidden_columns():
    table = net(lambda m, x: m.out(torch.tanh(m.mid(torch.cat([m.stem(x), x], -1)))), lambda w: {"mid": linear(w + 16, w)})
    assert [block.role for block in table["mid.weight"].blocks] == ["hidden", "input"]
    naive = rejected(table, "mid.weight", blocks={1}, init_std=1 / root, lr=1 / d)
    assert {name: excess for (_, name), excess in naive.items()} == {"init": R(-1, 2), "update": -1}


def test_p16_finite_rows_of_a_hidden_matrix_are_an_output():
    def run(m, x):
        y = m.mid(m.stem(x))
        return m.out(y[:, 3:] * y[:, :3].sum(-1, keepdim=True))

    table = net(run, lambda w: {"mid": linear(w, w + 3)})
    assert [block.role for block in table["mid.weight"].blocks] == ["output", "hidden"]
    naive = rejected(table, "mid.weight", "sgd", blocks={0}, init_std=1 / root, lr=ONE)
    assert {name: excess for (_, name), excess in naive.items()} == {"init": R(1, 2), "update": 1}


@pytest.mark.parametrize(("code", "ratio"), [(lambda w: 8, 1), (lambda w: w // 2, 0)])
def test_p17_a_tied_decoder_is_multiplied_by_width_over_code(code, ratio):
    table = net(lambda m, x: m.out(F.linear(torch.tanh(m.stem(x)), m.W) @ m.W), lambda w: {"W": nn.Parameter(torch.zeros(code(w), w))})
    first, second = table["W"].uses
    assert sympy.degree(second.multiplier / first.multiplier, d) == ratio
    bare = table["W"].model_copy(update={"uses": (first, second.model_copy(update={"multiplier": ONE}))})
    untied = table.model_copy(update={"rules": tuple(bare if rule.name == "W" else rule for rule in table)})
    assert bool(verify(untied)) == (ratio == 0)  # Θ(1), hence optional, where the code grows with the width


# --- vector-like and scalar-like ----------------------------------------------------------------------------------------------------


def test_p22_a_norm_of_a_latent_of_fixed_rank_is_warned_of():
    def written_out(m, x):
        y = m.down(m.stem(x))
        return m.out(m.up(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)))

    fused = lambda m, x: m.out(m.up(F.rms_norm(m.down(m.stem(x)), (m.r,))))  # noqa: E731
    for run in (fused, written_out):
        for rank, warned in ((lambda w: 8, 1), (lambda w: w // 4, 0)):
            table = net(run, lambda w, rank=rank: {"down": linear(w, rank(w)), "up": linear(rank(w), w), "r": rank(w)})
            notes = [note for note in table.notes if "which no rule mends" in note]
            assert len(notes) == warned
            assert all("(down)" in note and "test_pitfalls.py" in note for note in notes)
            assert len(notes) == str(table).count("which no rule")
            without = net(
                lambda m, x: m.out(m.up(m.down(m.stem(x)))), lambda w, rank=rank: {"down": linear(w, rank(w)), "up": linear(rank(w), w)}
            )
            handed_back = [flow(one).of("stem").gradient_at_init for one in (table, without)]
            assert handed_back[0] - handed_back[1] == (R(1, 2) if warned else 0)


def test_p23_a_gain_shared_by_growing_heads_is_a_scalar_and_no_vector():
    def run(m, x):
        y = m.stem(x).unflatten(-1, (-1, 16))
        return m.out((F.rms_norm(y, (16,)) * m.gain).flatten(-2))

    table = net(run, lambda w: {"gain": nn.Parameter(torch.ones(16))})
    assert table["gain"].role == "scalar"
    assert rejected(table, "gain", "sgd", lr=d)["gain", "update"] == 1


def test_p27_a_table_of_relative_positions_is_a_vector_of_the_heads():
    def run(m, x):
        q = m.stem(x).unflatten(-1, (-1, 16)).transpose(0, 1)
        weights = (q @ q.mT / 16 + m.table[:, None, :4]).softmax(-1)
        return m.out((weights @ q).transpose(0, 1).flatten(-2))

    table = net(run, lambda w: {"table": nn.Parameter(torch.zeros(w // 16, 8))})
    rule = table["table"]
    assert [rule.exponent(name) for name in ("sgd", "adam", "eps")] == [1, 0, -1]
    assert rejected(table, "table", "sgd", lr=ONE)["table", "update"] == -1


def test_p29_a_temperature_has_a_constant_rate_and_the_sum_it_scales_needs_1_over_d():
    parts = lambda w: {"right": linear(16, w), "out": nn.Identity(), "t": nn.Parameter(torch.ones(()))}  # noqa: E731
    bare = net(lambda m, x: m.t * (m.stem(x) @ m.right(x).mT), parts)
    assert [bare["t"].exponent(name) for name in ("sgd", "adam", "eps")] == [0, 0, 0]
    [product] = bare.contractions
    assert (product.present, bool(product.folded)) == (1, True)  # made up for in a tower
    scaled = net(lambda m, x: m.t * (m.stem(x) @ m.right(x).mT) / m.stem.out_features, parts)
    assert (scaled.contractions[0].present, scaled.contractions[0].folded) == (1 / d, ())
    assert rejected(scaled, "t", "sgd", lr=d)["t", "update"] == 1


SUMS = {
    "nansum": (lambda h: h.nansum(-1), 1),
    "cumsum": (lambda h: h.cumsum(-1)[:, -1], 1),
    "einsum": (lambda h: torch.einsum("bi->b", h), 1),
    "scatter_add": (lambda h: h.new_zeros(len(h), 4).scatter_add(1, (torch.arange(h.shape[1]) % 4).expand_as(h), h), 1),
    "index_add": (lambda h: h.new_zeros(len(h), 4).index_add(1, torch.arange(h.shape[1]) % 4, h), 1),
    "dist": (lambda h: torch.dist(h[0], h[1]), R(1, 2)),
    "1-norm": (lambda h: h.norm(p=1, dim=-1), 1),
    "mse_loss": (lambda h: F.mse_loss(h, h.relu(), reduction="sum"), 1),
    "l1_loss": (lambda h: F.l1_loss(h, h.relu(), reduction="sum"), 1),
    "their means": (lambda h: h.nansum(-1) / h.shape[1] + F.mse_loss(h, h.relu()) + h.norm(p=1, dim=-1) / h.shape[1], 0),
}


@pytest.mark.parametrize("name", SUMS)
def test_p58_a_sum_over_the_width_by_any_operator_is_as_large_as_its_terms_are_many(name):
    summed, power = SUMS[name]
    table = net(lambda m, x: summed(m.stem(x)), lambda w: {"out": nn.Identity()})
    assert [exponent(one.dim) for one in table.contractions] == ([power] if power else [])
    assert flow(table).of("").change == power
    assert bool(verify(table)) is (power == 0)


def test_p58_a_map_after_a_sum_over_the_width_makes_up_for_it_by_its_init_too():
    def build(w):
        return Net(lambda m, x: m.head(m.stem(x).sum(-1, keepdim=True)), stem=linear(16, w), head=linear(1, 4))

    model = build(64)
    before = model.head.weight.detach().clone()
    compiler.init_(model, derive(build, X, widths=(64, 128)))
    assert torch.equal(model.head.weight, before / 64)


def test_p58_fourier_transforms_are_larger_by_the_root_of_the_width_unless_normed():
    for norm, power in ((None, R(1, 2)), ("ortho", 0)):
        table = net(lambda m, x, norm=norm: m.out(torch.fft.fft(m.stem(x), norm=norm).real), lambda w: {})
        assert exponent(table["out.weight"].uses[0].input_scale) == power


def test_p58_sums_over_the_width_that_no_map_follows_are_a_failure_with_their_line():
    still = {"out": nn.Identity()}
    towers = lambda w: {"right": linear(16, w), **still}  # noqa: E731
    distance = net(lambda m, x: (m.stem(x) - m.right(x)).pow(2).sum(-1), towers)
    features = net(lambda m, x: F.relu(m.stem(x)).sum(-1) * m.stem.out_features**-0.5, lambda w: still)
    prototypes = net(lambda m, x: torch.cdist(m.stem(x), m.p), lambda w: {"p": nn.Parameter(torch.randn(10, w)), **still})
    assert prototypes["p"].role == "embedding"
    pairs = net(lambda m, x: F.pdist(m.stem(x)), lambda w: still)
    for table, power in ((distance, 1), (features, R(1, 2)), (prototypes, R(1, 2)), (pairs, R(1, 2))):
        assert flow(table).of("").change == power
        verdict = verify(table)
        assert verdict.verdict == "unstable_logits"
        assert [(one.name, one.excess) for one in verdict.failed] == [("contraction", power)]
        assert "multiply by it in the forward" in verdict.cures[0]
        assert re.search(r"test_pitfalls\.py:\d+$", verdict.cures[0])
    for run in (lambda m, x: (m.stem(x) - m.right(x)).pow(2).mean(-1), lambda m, x: F.normalize(m.stem(x), dim=-1).square().sum(-1)):
        table = net(run, towers)
        assert (table.contractions, flow(table).of("").change <= 0) == ((), True)


# --- attention ----------------------------------------------------------------------------------------------------------------------


def test_p33_w_o_sums_over_heads_times_head_dim_and_not_over_the_width():
    def run(m, x):
        q, k, v = (y.unflatten(-1, (-1, 24)).transpose(0, 1) for y in (m.q(m.stem(x)), m.k(m.stem(x)), m.v(m.stem(x))))
        return m.out(m.o(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(-2)))

    inner = lambda w: w // 16 * 24  # noqa: E731
    table = net(run, lambda w: {**{name: linear(w, inner(w)) for name in "qkv"}, "o": linear(inner(w), w)})
    assert (table["o.weight"].fan_in, table["o.weight"].fan_out) == (3 * d / 2, d)
    assert (table["q.weight"].fan_in, table["q.weight"].fan_out) == (d, 3 * d / 2)
    assert table["o.weight"].lr["adam"] == 1 / (3 * d / 2)


def test_p35_keys_of_a_frozen_finite_encoder_are_inputs():
    def run(m, x, encoded):
        q, k, v = (y.unflatten(-1, (-1, 16)).transpose(0, 1) for y in (m.q(m.stem(x)), m.k(encoded), m.v(encoded)))
        return m.out(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(-2))

    table = net(run, lambda w: {"q": linear(w, w), "k": linear(24, w), "v": linear(24, w)}, X, torch.zeros(6, 24))
    assert [table[f"{name}.weight"].role for name in "qkv"] == ["hidden", "input", "input"]
    for name in "kv":
        assert rejected(table, f"{name}.weight", lr=1 / d) == {(f"{name}.weight", "update"): -1}


# --- optimizer plumbing -------------------------------------------------------------------------------------------------------------


def test_p45_a_threshold_after_msign_shrinks_the_update_and_one_before_it_does_not():
    norms = []
    for width in (64, 256):
        torch.manual_seed(0)
        U = compiler.msign(torch.randn(width, width, dtype=torch.float64))
        norms.append([torch.linalg.matrix_norm(u, 2).item() for u in (U, U / U.norm().clamp(min=1.0))])
    (raw, clipped), (wide, wide_clipped) = norms
    assert wide == pytest.approx(raw, rel=1e-2)
    assert wide_clipped == pytest.approx(clipped / 2, rel=1e-2)  # 1/√n
    steps = []
    for clip in (None, 1e-3):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(16, 16))
        optimizer = SpectralOptimizer([weight], lr=0.1, map="msign")
        weight.grad = torch.randn(16, 16)
        if clip:
            compiler.clip_grad_norm_(optimizer, clip)
        before = weight.detach().clone()
        optimizer.step()
        steps.append(weight.detach() - before)
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-4)


def test_p54_what_grows_is_not_told_by_coincidence_of_sizes():
    """A vocabulary, a context and inputs as long as the width are fixed, outputs where a second model says so; d² is no multiple of d."""
    table = derive(MLP(64, inputs=64, outputs=64), (torch.zeros(4, 64),), also=MLP(96, inputs=64, outputs=64))
    assert [table[f"{name}.weight"].role for name in ("first", "second", "head")] == ["input", "hidden", "output"]
    table = derive(GPT(64, vocab=64, length=64), ids(), also=GPT(96, vocab=64, length=64))
    assert [table[name].role for name in ("wte.weight", "wpe.weight", "lm_head.weight")] == ["embedding", "embedding", "output"]
    table = net(lambda m, x: m.out(m.down(F.relu(m.up(m.stem(x))))), lambda w: {"up": linear(w, w * w), "down": linear(w * w, w)})
    assert table["up.weight"].dims == (d**2, d)
    assert [table["down.weight"].exponent(name) for name in ("init_std", "adam", "sgd")] == [R(-3, 2), -2, -1]


# --- architectures ------------------------------------------------------------------------------------------------------------------


def test_p56_experts_are_matrices_of_their_own_and_their_router_is_an_output():
    def run(m, x):
        x = m.stem(x)
        y = torch.einsum("efd,nd->nef", m.up, x).relu()
        y = torch.einsum("edf,nef->ned", m.down, y)
        return m.out((m.router(x).softmax(-1)[..., None] * y).sum(1))

    parts = {
        "up": lambda w: nn.Parameter(torch.zeros(4, 2 * w, w)),
        "down": lambda w: nn.Parameter(torch.zeros(4, w, 2 * w)),
        "router": lambda w: linear(w, 4),
    }
    table = net(run, lambda w: {name: part(w) for name, part in parts.items()})
    assert [(table[name].role, table[name].fan_in, table[name].fan_out) for name in parts if name != "router"] == [
        ("hidden", d, 2 * d),
        ("hidden", 2 * d, d),
    ]
    assert rejected(table, "up", init_std=1 / d)["up", "init"] == R(-1, 2)  # torch's fan_in of [E, f, d] is f·d
    assert set(rejected(table, "router.weight", "sgd", init_std=1 / root, lr=ONE).values()) == {R(1, 2), 1}


def test_p59_a_gate_changes_nothing_and_the_inner_product_of_two_towers_is_1_over_d():
    gated = net(lambda m, x: m.out(F.silu(m.gate(m.stem(x))) * m.up(m.stem(x))), lambda w: {"gate": linear(w, w), "up": linear(w, w)})
    assert gated.contractions == ()
    assert {rule.multiplier for rule in gated} == {1}
    assert gated["up.weight"].blocks[0].target == gated["gate.weight"].blocks[0].target == 1
    towers = lambda w: {"right": linear(16, w), "out": nn.Identity()}  # noqa: E731
    cosine = net(lambda m, x: (F.normalize(m.stem(x), dim=-1) * F.normalize(m.right(x), dim=-1)).sum(-1), towers)
    assert [(one.present, one.folded) for one in cosine.contractions] == [(1 / d, ())]
    assert flow(cosine).of("").change == 0
    rooted = net(lambda m, x: (m.stem(x) * m.right(x)).sum(-1) / m.stem.out_features**0.5, towers)
    assert [(one.present, one.folded) for one in rooted.contractions] == [(1 / root, ("stem.weight",))]  # a tower has what is missing
    assert flow(rooted).of("").change == 0
    naive = parametrization(rooted, "table3")
    plain = {name: tuple(law.model_copy(update={"init_std": ONE, "lr": ONE}) for law in laws) for name, laws in naive.laws.items()}
    assert flow(rooted, None, naive.model_copy(update={"laws": plain})).of("").change == R(1, 2)


@pytest.mark.parametrize(
    "product",
    [lambda h: h @ h.mT, lambda h: torch.inner(h, h), lambda h: torch.einsum("bi,bi->b", h, h), lambda h: h @ h.mT / h.shape[1] ** 0.5],
)
def test_p59_a_product_of_features_with_themselves_is_made_up_for_once_in_their_map(product):
    table = net(lambda m, x: product(m.stem(x)), lambda w: {"out": nn.Identity()})
    [contraction] = table.contractions
    assert (contraction.folded, contraction.both) == (("stem.weight",), True)
    assert table["stem.weight"].blocks[0].target ** 2 * contraction.dim * contraction.present == 1
    assert flow(table).of("").change == 0
    assert verify(table)
    assert not verify(parametrization(table, "standard"), table=table)


def test_p59_an_unbiased_covariance_has_its_factor():
    table = net(lambda m, x: torch.cov(m.stem(x)), lambda w: {"out": nn.Identity()})
    assert {one.present for one in table.contractions} == {1 / d}


def test_p59_what_a_softmax_over_the_width_weights_is_an_embedding_of_like_size():
    memory = lambda w: {"keys": linear(w, 4 * w), "values": linear(4 * w, w)}  # noqa: E731
    table = net(lambda m, x: m.out(m.values(m.keys(m.stem(x)).softmax(-1))), memory)
    assert [table["values.weight"].exponent(name) for name in ("init_std", "adam")] == [R(1, 2), 0]
    assert table["keys.weight"].exponent("adam") == -1


def test_p62_a_curve_over_a_matrix_is_said_and_no_number_after_it_is_the_matrix_own():
    def run(m, x):
        return m.out(F.linear(m.stem(x), m.mid.weight.exp() / m.mid.in_features))

    table = net(run, lambda w: {"mid": linear(w, w)})
    assert table["mid.weight"].exponent("init_std") == R(-1, 2)
    assert ["exp of mid.weight sums over the width" in note for note in table.notes] == [True]


def test_p63_dropout_rotations_and_masks_leave_every_rule_as_it_is():
    def run(m, x, extra):
        q, k, v = (y.unflatten(-1, (-1, 16)).transpose(0, 1) for y in (m.q(m.stem(x)), m.k(m.stem(x)), m.v(m.stem(x))))
        if extra:
            angle = torch.arange(4.0)[:, None] / 100 ** (torch.arange(8.0) / 8)
            turn = lambda y: torch.cat([y[..., :8] * angle.cos() - y[..., 8:] * angle.sin(), y[..., 8:] * angle.cos()], -1)  # noqa: E731
            q, k = turn(q), turn(k)
        scores = q @ k.mT / 4
        if extra:
            scores = F.dropout(scores.masked_fill(torch.ones(4, 4).triu(1) > 0, float("-inf")), 0.1)
        y = m.out((scores.softmax(-1) @ v).transpose(0, 1).flatten(-2))
        return F.dropout(y, 0.1).mean(0, keepdim=True) if extra else y

    plain, dressed = (net(lambda m, x, e=e: run(m, x, e), lambda w: {n: linear(w, w) for n in "qkv"}) for e in (False, True))
    assert [rule.blocks for rule in plain] == [rule.blocks for rule in dressed]


def test_p65_a_weight_that_the_loss_uses_once_more_has_both_uses():
    class Model(nn.Module):
        """A second head predicts the token after the next by the same unembedding, in the loss alone."""

        def __init__(self, width, *, loss):
            super().__init__()
            self.wte, self.mid, self.next = nn.Embedding(61, width), linear(width, width), linear(width, width)
            self.head, self.loss = linear(width, 61), loss

        def forward(self, tokens):
            x = torch.tanh(self.mid(self.wte(tokens)))
            logits = self.head(x)
            if not self.loss:
                return logits
            later = self.head(torch.tanh(self.next(x)))
            return F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:]) + F.cross_entropy(later[:, :-2].mT, tokens[:, 2:])

    model, loss = (derive(lambda w, on=on: Model(w, loss=on), ids(), widths=(64, 128)) for on in (False, True))
    assert model.coverage.unreached == ("next.weight",)  # the model alone does not tell
    assert not verify(model)
    assert (len(loss["head.weight"].uses), loss["next.weight"].role, loss.coverage.unreached) == (2, "hidden", ())
    assert verify(loss)


def test_p65_a_penalty_that_uses_a_matrix_elementwise_conflicts_with_its_linear_use():
    class Penalty(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.stem, self.mid, self.head = linear(16, width), linear(width, width), linear(width, 5)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.mid(x)).square().mean() + (self.mid.weight * x[0]).square().mean()

    with pytest.raises(ConflictingUses, match=r"mid\.weight"):
        derive(Penalty, (X,), widths=(64, 128))
