"""Flow: predicted sizes against theorems and against slopes measured on models that train."""

from fractions import Fraction as Q

import models
import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scaling import derive
from scaling.errors import NoGraph, ScalingError, UnknownName
from scaling.flow import Flow, flow, predicted_slopes
from scaling.limits import WIDTH
from scaling.parametrizations import parametrization
from scaling.records import Law, Parametrization

HALF = Q(1, 2)


def power(exponent):
    return (
        WIDTH ** sympy.Rational(exponent.numerator, exponent.denominator) if isinstance(exponent, Q) else WIDTH ** sympy.Integer(exponent)
    )


# --- the theorems -------------------------------------------------------------------------------------------------------------------

QUARTERS = st.integers(-6, 6).map(lambda k: Q(k, 4))
LAYERS = ("first", "second", "third", "head")
MLP_TABLE = derive(models.MLP, widths=(64, 128))


def abc(family, a, b, c):
    """The MLP under multipliers d^-a, init d^-b, lr d^-c per layer; biases do not move."""
    made = {}
    for rule in MLP_TABLE:
        layer = LAYERS.index(rule.name.partition(".")[0])
        init = None if b[layer] is None else power(-b[layer])
        law = Law(multiplier=power(-a[layer]), init_std=init, lr=power(-c[layer]))
        made[rule.name] = (law if rule.name.endswith("weight") else Law(lr=power(Q(-50))),)
    return flow(MLP_TABLE, family, Parametrization(name="abc", family=family, laws=made))


def rates(family, a, b, c):
    """r_l of every layer but the last, and how fast the readout's own update makes the logits move (TP4 prop. 5.3, TP4b def. 2.8.5)."""
    if family == "sgd":
        backward = min(a[3] + b[3], 2 * a[3] + c[3])
        return [backward + c[k] - 1 + 2 * a[k] + (k == 0) for k in range(3)], 2 * a[3] + c[3] - 1
    if family == "muon":
        return [a[k] + c[k] + (HALF if k == 0 else 0) for k in range(3)], a[3] + c[3] - HALF
    return [a[k] + c[k] - (k > 0) for k in range(3)], a[3] + c[3] - 1


@pytest.mark.parametrize("family", ["sgd", "adam", "muon"])
@given(a=st.tuples(*[QUARTERS] * 4), readout=st.sampled_from([HALF, Q(3, 4), Q(1), Q(3, 2)]), c=st.tuples(*[QUARTERS] * 4))
@settings(max_examples=40, deadline=None)
def test_an_mlp_moves_as_the_theorems_of_tensor_programs_say(family, a, readout, c):
    b = (-a[0], HALF - a[1], HALF - a[2], readout - a[3])
    r, own = rates(family, a, b, c)
    result = abc(family, a, b, c)
    assert [result.of(layer).init for layer in LAYERS] == [
        0,
        0,
        0,
        sympy.Rational(1, 2) - sympy.Rational(readout.numerator, readout.denominator),
    ]
    changes = [result.of(layer).change for layer in LAYERS]
    if min(r) >= 0:
        assert changes[:3] == [-min(r[: k + 1]) for k in range(3)]
        assert changes[3] == max(1 - readout - min(r), -own, -own - min(r))
    else:
        assert max(changes[:3]) > 0


ABC_CASES = [  # THEORY 3.5: (optimizer, a, b, c) of input, hidden, output -> r, and whether logits stay stable
    ("sgd", (0, 0, 0), (0, HALF, HALF), (0, 0, 0), Q(-1), None),
    ("sgd", (0, HALF, HALF), (0, 0, 0), (0, 0, 0), HALF, True),
    ("sgd", (-HALF, 0, HALF), (HALF, HALF, HALF), (0, 0, 0), 0, True),
    ("sgd", (0, 0, 1), (0, HALF, 0), (-1, 0, -1), 0, True),
    ("sgd", (0, 0, 0), (0, HALF, 1), (0, 1, 1), 1, True),
    ("sgd", (0, 0, 0), (0, HALF, 1), (-1, 1, 1), 0, True),
    ("sgd", (0, 0, 0), (0, HALF, HALF), (-HALF, HALF, 1), 0, False),
    ("sgd", (0, 0, 0), (0, HALF, None), (-1, 0, 1), 0, True),
    ("adam", (0, 0, 0), (0, HALF, HALF), (1, 1, 1), 0, False),
    ("adam", (0, 0, 0), (0, HALF, HALF), (0, 1, 1), 0, False),
    ("adam", (0, HALF, HALF), (0, 0, 0), (HALF, 1, HALF), HALF, True),
    ("adam", (0, 0, 0), (0, HALF, 1), (0, 1, 1), 0, True),
    ("adam", (-HALF, 0, HALF), (HALF, HALF, HALF), (HALF, 1, HALF), 0, True),
    ("adam", (0, HALF, 1), (0, 0, 0), (0, HALF, 0), 0, True),
    ("adam", (0, 0, 0), (0, HALF, Q(3, 4)), (Q(1, 4), Q(5, 4), 1), Q(1, 4), True),
    ("muon", (0, 0, 0), (0, HALF, 1), (-HALF, 0, HALF), 0, True),
    ("muon", (0, 0, 0), (0, HALF, 1), (-HALF, 0, 0), 0, False),
    ("muon", (0, 0, 0), (0, HALF, 1), (-HALF, -HALF, -HALF), -HALF, None),
]


@pytest.mark.parametrize(("family", "a", "b", "c", "r", "stable"), ABC_CASES)
def test_named_parametrizations_move_as_their_verdict_says(family, a, b, c, r, stable):
    spread = lambda x: tuple(None if v is None else Q(v) for v in (x[0], x[1], x[1], x[2]))  # noqa: E731
    result = abc(family, spread(a), spread(b), spread(c))
    moved = result.of("third").change
    assert moved > 0 if r < 0 else moved == -r
    if stable is not None:
        assert (result.of("head").change <= 0) == stable


def test_a_zero_readout_lets_the_layers_below_move_from_the_second_step_on():
    result = abc("adam", (0, 0, 0, 0), (0, HALF, HALF, None), (0, 1, 1, 1))
    assert (result.of("head").init, result.of("head").first) == (-sympy.oo, 0)
    assert (result.of("third").first, result.of("third").change) == (-sympy.oo, 0)


def test_gradient_norms_at_init_are_those_of_tables_3_8_and_9():
    expected = {"T3": (-HALF, 0, 0, HALF), "T8": (-HALF, 0, 0, -HALF), "T9": (0, 0, 0, 0)}
    ab = {"T3": ((0, 0, 0, 0), (0, HALF, HALF, 1)), "T8": ((0, 0, 0, 1), (0, HALF, HALF, 0)), "T9": ((-HALF, 0, 0, HALF), (HALF,) * 4)}
    for name, (a, b) in ab.items():
        result = abc("adam", tuple(map(Q, a)), tuple(map(Q, b)), (Q(0),) * 4)
        norms = {weight.name: weight.norm for weight in result.weights}
        assert [norms[f"{layer}.weight"] for layer in LAYERS] == [sympy.Rational(str(Q(x))) for x in expected[name]]


# --- the operators ------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Parts by name, and a forward given as a function."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.run(self, *args)


def sizes(make, *inputs, optimizer="adam", module, **options):
    result = flow(derive(make, inputs, widths=(64, 128, 256), **options), optimizer)
    value = result.of(module)
    return value.init, value.change


def linear(*sizes):
    return nn.Linear(*sizes, bias=False)


def body(d, **more):
    return {"stem": linear(16, d), **more}


X = torch.zeros(4, 16)
MINUS_HALF = sympy.Rational(-1, 2)
ARCHITECTURES = {  # THEORY 6.5 and section 5: forward, parts besides `stem`, (init, change) of `out` by the derived rules
    "linear after F.normalize": (
        lambda m, x: m.out(F.normalize(m.stem(x), dim=-1)),
        lambda d: {"out": linear(d, d)},
        (0, 0),
    ),
    "sum over width of relu features": (lambda m, x: m.out(F.relu(m.stem(x)).sum(-1, True)), lambda d: {"out": linear(1, 10)}, (0, 0)),
    "sum over width of zero-mean features": (
        lambda m, x: m.out(m.stem(x).sum(-1, True)),
        lambda d: {"out": linear(1, 10)},
        (MINUS_HALF, 0),
    ),
    "mean over width": (lambda m, x: m.out(m.stem(x).mean(-1, True)), lambda d: {"out": linear(1, 10)}, (MINUS_HALF, 0)),
    "router": (lambda m, x: m.out(torch.tanh(m.stem(x))), lambda d: {"out": linear(d, 8)}, (MINUS_HALF, 0)),
    "bottleneck": (lambda m, x: m.out(m.down(m.stem(x))), lambda d: {"down": linear(d, 4), "out": linear(4, d)}, (MINUS_HALF, 0)),
    "norm after a bottleneck": (lambda m, x: m.out(m.down(m.stem(x))), lambda d: {"down": linear(d, 4), "out": nn.LayerNorm(4)}, (0, 0)),
    "gated": (lambda m, x: m.out(F.silu(m.stem(x)) * m.up(x)), lambda d: {"up": linear(16, d), "out": linear(d, d)}, (0, 0)),
    "depthwise": (lambda m, x: m.out(m.stem(x)[..., None, None]), lambda d: {"out": nn.Conv2d(d, d, 3, padding=1, groups=d)}, (0, 0)),
    "residual": (lambda m, x: m.out(m.stem(x) + m.mid(m.stem(x))), lambda d: {"mid": linear(d, d), "out": nn.RMSNorm(d)}, (0, 0)),
    "columns of width and constant": (lambda m, x: m.out(torch.cat([m.stem(x), x], -1)), lambda d: {"out": linear(d + 16, d)}, (0, 0)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_the_sizes_theory_gives(name):
    forward, parts, expected = ARCHITECTURES[name]
    assert sizes(lambda d: Net(forward, **body(d, **parts(d))), X, module="out") == expected


@pytest.mark.parametrize("family", ["sgd", "adam", "muon"])
def test_rows_of_one_matrix_that_differ_have_sizes_of_their_own(family):
    """P16: the finite rows of a matrix are output-like, its growing rows are hidden."""

    def make(d):
        def run(m, x):
            y = m.mid(m.stem(x))
            return m.few(y[:, d:]) + m.many(y[:, :d])

        return Net(run, **body(d, mid=linear(d, d + 3), few=linear(3, d), many=linear(d, d)))

    result = flow(derive(make, (X,), widths=(64, 128, 256)), family)
    many, few = (result.of(name) for name in ("many", "few"))
    assert (few.init, few.change) == (MINUS_HALF, 0)
    assert (many.init, many.change) == (0, 0)


def towers(scale):
    def run(m, x, y):
        return m.out(((m.left(x) * m.right(y)).sum(-1) * m.d**-scale)[..., None])

    def make(d):
        net = Net(run, left=linear(16, d), right=linear(16, d), out=nn.Identity())
        net.d = d
        return net

    return make


def inner_product(table, **options):
    """Init and change of the last product of the model."""
    value = flow(table, **options).values[-1]
    return value.init, value.change


@pytest.mark.parametrize(("scale", "expected"), [(1, (MINUS_HALF, 0)), (0.5, (0, -MINUS_HALF)), (0, (-MINUS_HALF, 1))])
def test_an_inner_product_of_towers_is_root_n_at_init_and_n_once_trained(scale, expected):
    table = derive(towers(scale), (X, X), widths=(64, 128, 256))
    plain = Parametrization(name="plain", family="adam", laws={rule.name: (Law(init_std=1, lr=1),) for rule in table})
    assert inner_product(table, parametrization=plain) == expected


def test_one_tower_with_itself_is_aligned_from_the_start():
    def make(d):
        return Net(lambda m, x, y: (m.left(x) * m.left(y)).sum(-1) / d, left=linear(16, d))

    assert inner_product(derive(make, (X, X), widths=(64, 128)))[0] == 0


@pytest.mark.parametrize(("manual", "operator"), [(False, "attention logits"), (True, "aten.masked_fill")])
def test_attention_over_a_growing_head_needs_the_rule_that_the_table_folds_into_q(manual, operator):
    table = derive(lambda d: models.GPT(d, heads=4, manual=manual), models.ids(), widths=(64, 128, 256))
    result = flow(table)
    moved = {v.change for v in result.values if v.module.startswith("h.") and v.operator not in {"getitem", "aten.matmul"}}
    assert moved <= {0, MINUS_HALF}  # q itself is smaller by 1/√d
    laws = {rule.name: tuple(Law(init_std=b.init_std / b.target, lr=b.lr["adam"] / b.target) for b in rule.blocks) for rule in table}
    naive = flow(table, parametrization=Parametrization(name="1/√d attention", family="adam", laws=laws))
    assert {(v.init, v.change) for v in result.values if v.operator == operator} == {(MINUS_HALF, 0)}
    assert {(v.init, v.change) for v in naive.values if v.operator == operator} == {(0, -MINUS_HALF)}
    assert naive.blows_up[0].operator == ("aten.matmul" if manual else operator)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("scale", [-1, 0, 1])
def test_a_norm_undoes_any_scale_and_its_change_stays_of_order_1(norm, scale):
    def make(d):
        return Net(lambda m, x: m.out(m.norm(m.stem(x) * d**scale)), **body(d, norm=norm(d, elementwise_affine=False), out=linear(d, 10)))

    table = derive(make, (X,), widths=(64, 128, 256))
    value = flow(table).of("norm")
    assert (value.init, value.change) == (0, 0)
    large = {rule.name: (Law(init_std=1, lr=WIDTH),) for rule in table}
    value = flow(table, None, Parametrization(name="large steps", family="adam", laws=large)).of("norm")
    assert (value.init, value.change) == (0, 0)


def test_a_softmax_over_width_spreads_one_over_it_and_is_not_known_where_its_logits_grow():
    def make(d):
        return Net(lambda m, x: m.out(torch.softmax(m.stem(x), -1)), **body(d, out=linear(d, 10)))

    table = derive(make, (X,), widths=(64, 128))
    softmax = next(value for value in flow(table).values if value.operator == "aten.softmax")
    assert (softmax.init, softmax.change) == (-1, -1)
    grown = Parametrization(name="large", family="adam", laws={rule.name: (Law(init_std=WIDTH, lr=1),) for rule in table})
    assert next(value for value in flow(table, None, grown).values if value.operator == "aten.softmax").init is None


def test_q_and_k_gradients_start_smaller_than_they_become():
    """1/d attention: n^-3/2 at init, n^-1 once trained (THEORY 1.5)."""

    def run(m, x):
        h = torch.tanh(m.stem(x))
        return m.out(F.scaled_dot_product_attention(m.q(h), m.k(h), m.v(h), scale=1 / h.shape[-1]))

    def make(d):
        return Net(run, **body(d, q=linear(d, d), k=linear(d, d), v=linear(d, d), out=linear(d, 10)))

    result = flow(derive(make, (torch.zeros(2, 5, 16),), widths=(64, 128, 256)))
    assert result.of("q").gradient_at_init == sympy.Rational(-3, 2)
    assert (result.of("v").gradient_at_init, result.of("q").gradient) == (-1, -1)


@pytest.mark.parametrize(("heads", "size", "expected"), [("grow", 8, 0), ("fixed", None, -1)])
def test_the_gradient_of_a_gain_shared_over_heads_is_summed_over_them(heads, size, expected):
    """QK-norm gains, THEORY 2.2 rows 10a and 10b."""

    def make(d):
        width = size or d // 4

        def run(m, x):
            h = m.stem(x)
            h = h.view(*h.shape[:-1], d // width, width)
            return m.out((F.rms_norm(h, (width,)) * m.gain).flatten(-2))

        net = Net(run, **body(d, out=linear(d, 10)))
        net.gain = nn.Parameter(torch.ones(width))
        return net

    result = flow(derive(make, (X,), widths=(64, 128, 256)), "sgd")
    gradients = {value.name: value.gradient for value in result.values if value.operator == "aten.mul"}
    assert set(gradients.values()) == {-1}
    change = {weight.name: weight.change for weight in result.weights}["gain"]
    assert change == 0  # lr d^(0 or 1) times a gradient of d^(0 or -1)


@pytest.mark.parametrize(("equation", "expected"), [("bn->nb", {0}), ("bn->b", {sympy.S.Half, 1})])
def test_einsum_of_one_operand_orders_axes_anew_or_sums_over_them(equation, expected):
    def make(d):
        return Net(lambda m, x: torch.einsum(equation, torch.tanh(m.stem(x))), stem=nn.Linear(16, d))

    result = flow(derive(make, (torch.zeros(4, 16),), widths=(64, 128)))
    [value] = [value for value in result.values if value.operator == "aten.einsum"]
    assert not result.unknown
    assert {value.init, value.change} == expected
    assert result.of("stem").gradient == (-1 if equation == "bn->nb" else 0)


def _complex(x):
    return torch.view_as_real(torch.polar(x.exp(), x)[:, :-1:2])


@pytest.mark.parametrize(
    "moved",
    [
        lambda x: torch.cat((x, x[:, x.shape[1] :]), 1),  # rotary embeddings of a whole head leave nothing
        lambda x: torch.zeros(2, x.shape[1]).scatter_add(0, (torch.arange(len(x)) % 2)[:, None].expand_as(x), x),
        _complex,
    ],
    ids=["empty", "scattered", "complex"],
)
def test_parts_that_differ_are_followed_through_what_is(moved):
    def make(d):
        return Net(lambda m, x: moved(torch.cat((m.stem(x), m.out(m.stem(x))), 1)).sum(), **body(d, out=linear(d, 4)))

    result = flow(derive(make, (X,), widths=(32, 64, 96)))
    assert result.of("out").init == MINUS_HALF


def test_an_operator_without_a_rule_is_said_to_be_unknown_and_not_guessed():
    def make(d):
        return Net(
            lambda m, x: m.out(torch.linalg.matrix_exp(m.stem(x).unsqueeze(-1) @ m.stem(x).unsqueeze(-2)).sum(-1)),
            **body(d, out=linear(d, 10)),
        )

    result = flow(derive(make, (X,), widths=(32, 64)))
    assert result.of("stem").init == 0
    assert result.of("out").init is None
    assert result.of("out").change is None
    assert len(result.unknown) == 1
    assert "matrix_exp" in result.unknown[0]
    assert "no rule: aten.linalg_matrix_exp" in str(result)


@pytest.mark.parametrize("name", models.MODELS)
def test_the_derived_table_moves_every_value_of_every_model_by_order_1(name):
    make, args = models.MODELS[name]
    table = derive(make, args, widths=(64, 128))
    for family in ("sgd", "adam", "muon"):
        result = flow(table, family)
        assert not result.unknown
        assert {value.change for value in result.values} <= {0, -sympy.oo}
        assert {value.init for value in result.values} <= {0, MINUS_HALF}
        small = {value.module for value in result.values if value.init == MINUS_HALF and value.operator != "aten.mean"}
        assert len(small) == (
            name not in {"GPT, tied", "GPT-2", "TransformerEncoder"}
        )  # only the readout's; tied, a token's own logit is Θ(1)


def test_from_one_width_the_flow_is_that_of_several():
    for name in ("MLP", "GPT", "CNN"):
        make, args = models.MODELS[name]
        one, many = flow(derive(make(64), args)), flow(derive(make, args, widths=(64, 128)))
        assert [v.sizes for v in one.values] == [v.sizes for v in many.values]


def test_wrong_input_is_refused_by_name():
    with pytest.raises(UnknownName, match="adamm"):
        flow(MLP_TABLE, "adamm")
    with pytest.raises(ScalingError, match="is for 'sgd', not for 'adam'"):
        flow(MLP_TABLE, "adam", Parametrization(name="x", family="sgd", laws={}))
    with pytest.raises(ScalingError, match=r"no law for 'first.weight'"):
        flow(MLP_TABLE, "adam", Parametrization(name="x", family="adam", laws={}))
    with pytest.raises(NoGraph):
        flow(type(MLP_TABLE).from_json(MLP_TABLE.to_json()))
    with pytest.raises(UnknownName, match="nowhere"):
        flow(MLP_TABLE).of("nowhere")


def test_a_flow_prints_one_line_for_repeated_layers_and_writes_json():
    result = flow(derive(models.GPT, models.ids(), widths=(64, 128)))
    lines = str(result).splitlines()
    assert sum("attn.c_proj" in line for line in lines) == 1
    assert any(line.startswith("h.[0-1].attn.c_proj") and "models.py" in line for line in lines)
    assert Flow.model_validate_json(result.to_json()).of("lm_head").init == MINUS_HALF
    assert predicted_slopes(result)["lm_head"] == {0: MINUS_HALF, 1: 0, 2: 0}
    assert predicted_slopes(result)["(model)"] == predicted_slopes(result)["lm_head"]


EQUIVALENT = ("spectral", "table3", "table8", "table9", "u-mup")


@pytest.mark.parametrize("family", ["sgd", "adam", "muon", "muon+adam", "shampoo", "adafactor"])
@pytest.mark.parametrize("make", [models.GPT, lambda d: models.GPT(d, tie=True), models.ResNet], ids=["GPT", "tied GPT", "ResNet"])
def test_gauges_of_one_parametrization_have_one_flow_under_every_optimizer(make, family):
    table = derive(make, models.ids() if make is not models.ResNet else None, widths=(64, 128))
    flows = [flow(table, None, parametrization(table, name, family)) for name in EQUIVALENT]
    first = [(value.name, *value.sizes) for value in flows[0].values]
    assert all([(value.name, *value.sizes) for value in other.values] == first for other in flows[1:])
    assert all(change in {0, -sympy.oo} for _, _, _, change, *_ in first)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_have_the_sizes_of_hidden_matrices(kind):
    class Recurrent(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.cell, self.head = kind(16, d, num_layers=2, batch_first=True), nn.Linear(d, 10)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    table = derive(Recurrent, (torch.zeros(2, 5, 16),), widths=(64, 128))
    for family in ("sgd", "adam"):
        result = flow(table, family)
        assert [result.of(name).change for name in ("cell", "head")] == [0, 0]
        assert {w.change for w in result.weights if "weight_hh" in w.name} == {-1}
    standard = flow(table, None, parametrization(table, "standard", "adam"))
    assert standard.of("head").change == 1


def test_a_matrix_that_is_used_again_and_its_transpose_keep_sizes():
    """‖W‖₂ bounds what W makes of W·x, however aligned they are."""

    class Again(nn.Module):
        def __init__(self, d, transposed):
            super().__init__()
            self.stem, self.W, self.out, self.transposed = nn.Linear(16, d), nn.Parameter(torch.randn(d, d)), nn.Linear(d, 4), transposed

        def forward(self, x):
            h = F.relu(F.linear(F.relu(self.stem(x)), self.W))
            return self.out(F.linear(h, self.W.mT if self.transposed else self.W))

    for transposed in (False, True):
        table = derive(lambda d, t=transposed: Again(d, t), torch.zeros(4, 16), widths=(64, 128))
        assert [flow(table).of("").init, flow(table).of("").change] == [sympy.Rational(-1, 2), 0]


@pytest.mark.parametrize("shape", [lambda d: (d, 1), lambda d: (1, d), lambda d: ()], ids=["rows", "columns", "one"])
def test_a_change_of_a_gain_on_a_weight_is_as_random_as_the_weight(shape):
    """diag(Δg)·W·x is Θ(1), measured: no coherent sum, as W does not follow x (weight_norm, a scale on a whole matrix)."""

    class Gained(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.stem, self.W, self.g, self.out = (
                nn.Linear(16, d),
                nn.Parameter(torch.randn(d, d)),
                nn.Parameter(torch.ones(shape(d))),
                nn.Linear(d, 4),
            )

        def forward(self, x):
            return self.out(F.linear(F.relu(self.stem(x)), self.W * self.g))

    table = derive(Gained, torch.zeros(4, 16), widths=(64, 128))
    assert [flow(table).of("").init, flow(table).of("").change] == [sympy.Rational(-1, 2), 0]
