"""Published parametrizations as data, and the gauge: exact in sympy, and bit for bit in training."""

import math

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GPT, MLP, ids
from torch import nn

import compiler
from compiler.errors import NotExpressible
from scaling import ScalingTable, derive
from scaling.errors import ScalingError, UnknownName
from scaling.limits import WIDTH, exact, exponent
from scaling.optimizers import DEGREES, LEARNING_RATES
from scaling.parametrizations import (
    CLASSES,
    GAUGES,
    PARAMETRIZATIONS,
    TABLES,
    class_of,
    gauge,
    invariants,
    order,
    parametrization,
    shifted,
)
from scaling.records import Block, Coverage, Factor, Law, Source, Use, WeightRule

d, ONE, R = WIDTH, sympy.Integer(1), sympy.Rational


def block(fan_in, fan_out, **options):
    """A block with fans d^fan_in → d^fan_out."""
    return Block(fan_in=d ** R(fan_in), fan_out=d ** R(fan_out), axes=(), **options)


# --- oracles ------------------------------------------------------------------------------------------------------------------------

# THEORY 2.4, oracle width_rows: powers of d. Rows tok_embed, hidden, output_A and output_B are Yang et al. 2022, arXiv 2203.03466, tables 3
# and 8; input_formC and output_C its table 9; norm_gain, scalar and bias_hidden its appendix B; lora_A and lora_B Hayou et al. 2024,
# arXiv 2402.12354; the others follow by the same counting.
WIDTH_ROWS = """
id                      m     Fin  Fout  s     sigma  sgd   adam  msign  eps   lam
tok_embed               0     0    1     0     0      1     0     1/2    -1    0
input_linear            0     0    1     0     0      1     0     1/2    -1    0
input_formC             1/2   0    1     0     -1/2   0     -1/2  0      -1/2  1/2
hidden                  0     1    1     0     -1/2   0     -1    0      -1    1
hidden_ntk_gauge        -1/2  1    1     0     0      1     -1/2  1/2    -3/2  1/2
output_A                0     1    0     0     -1     -1    -1    -1/2   0     1
output_B                -1    1    0     0     0      1     0     1/2    -1    0
output_C                -1/2  1    0     0     -1/2   0     -1/2  0      -1/2  1/2
bias_hidden             0     0    1     0     0      1     0     -      -1    0
bias_output             0     0    0     0     0      0     0     -      0     0
norm_gain               0     0    1     0     -      1     0     -      -1    0
qk_gain_heads_grow      0     0    0     0     -      0     0     -      0     0
qk_gain_dhead_grows     0     0    1     0     -      1     0     -      -1    0
scalar                  0     0    0     0     -      0     0     -      0     0
kv_fixed_heads_grow     0     1    0     0     -1     -1    -1    -1/2   0     1
router_A                0     1    0     0     -1     -1    -1    -1/2   0     1
bottleneck_up           0     0    1     0     0      1     0     1/2    -1    0
lora_A                  0     1    0     0     -      -1    -1    -1/2   0     1
lora_B                  0     0    1     0     -      1     0     1/2    -1    0
depthwise               0     0    1     0     0      1     0     -      -1    0
linear_after_l2norm     0     1    1     1/2   0      1     -1/2  1/2    -3/2  1/2
linear_on_nflat_sum     0     1    1     -1    -3/2   -2    -2    -1     0     2
ffn_up_fixed_dff        0     1    0     0     -1     -1    -1    -1/2   0     1
ffn_down_fixed_dff      0     0    1     0     0      1     0     1/2    -1    0
wide_ffn_up_n_to_n2     0     1    2     0     -1/2   1     -1    1/2    -2    1
wide_ffn_down_n2_to_n   0     2    1     0     -3/2   -1    -2    -1/2   -1    2
flatten_conv_to_fc      0     1    1     0     -1/2   0     -1    0      -1    1
"""
HEADINGS, *ROWS = [line.split() for line in WIDTH_ROWS.strip().splitlines()]
QUANTITIES = {"sigma": "init_std", "sgd": "sgd", "adam": "adam", "msign": "muon", "eps": "eps", "lam": "weight_decay"}


@pytest.mark.parametrize("row", [dict(zip(HEADINGS, row, strict=True)) for row in ROWS], ids=lambda row: row["id"])
def test_a_block_has_the_exponents_of_the_width_rows(row):
    for s in ({"input_scale": d ** -R(row["s"])}, {"target": d ** R(row["s"])}):
        one = block(row["Fin"], row["Fout"], multiplier=d ** R(row["m"]), **s)
        for column, quantity in QUANTITIES.items():
            if row[column] != "-":
                assert one.exponent(quantity) == R(row[column]), column


# THEORY 2.5, oracle finite_gpt2: the finite forms of a GPT-2 block and of a convolution, all sizes symbols.
FINITE = """
       Fin      Fout m    sigma                                      adam          sgd            msign                eps
W_q    d        H*h  1    Min(1,sqrt(H*h/d))/sqrt(d)                 1/d           H*h/d          sqrt(H*h/d)          1/(H*h)
W_o    H*h      d    1    Min(1,sqrt(d/(H*h)))/sqrt(H*h)             1/(H*h)       d/(H*h)        sqrt(d/(H*h))        1/d
W_up   d        f    1    Min(1,sqrt(f/d))/sqrt(d)                   1/d           f/d            sqrt(f/d)            1/f
W_down f        d    1    Min(1,sqrt(d/f))/sqrt(f)                   1/f           d/f            sqrt(d/f)            1/d
wte    1        d    1    1                                          1             d              sqrt(d)              1/d
head_A d        V    1    Min(1,sqrt(V/d))/sqrt(d)                   1/d           V/d            sqrt(V/d)            1/V
head_B d        V    1/d  sqrt(d)*Min(1,sqrt(V/d))                   1             V*d            sqrt(V*d)            1/(d*V)
conv   C0*k**2  C1   1    Min(1,sqrt(C1/(C0*k**2)))/sqrt(C0*k**2)    1/(C0*k**2)   C1/(C0*k**2)   sqrt(C1/(C0*k**2))   1/C1
ln_gain 1       d    1    -                                          1             d              -                    1/d
"""
LETTERS = ("d", "H", "h", "f", "V", "C0", "C1", "k")
SIZES = [dict(zip(LETTERS, sizes, strict=True)) for sizes in ((64, 4, 8, 256, 61, 3, 64, 3), (9, 2, 50, 8, 100, 16, 9, 2))]


@pytest.mark.parametrize("line", FINITE.strip("\n").splitlines()[1:], ids=lambda line: line.split()[0])
def test_a_block_has_the_finite_forms_of_gpt2(line):
    name, fan_in, fan_out, m, sigma, *rates = line.split()
    sizes = {letter: sympy.Symbol(letter, positive=True) for letter in LETTERS}
    read = lambda text: sympy.sympify(text, locals=sizes)  # noqa: E731
    one = Block(fan_in=read(fan_in), fan_out=read(fan_out), multiplier=read(m), axes=())
    if name == "ln_gain":
        one = Block(fan_in=1, fan_out=1, copies=read(fan_out), axes=())
    found = [one.lr["adam"], one.lr["sgd"], one.lr["muon"], one.eps]
    for value, text in zip(found, rates, strict=True):
        assert text == "-" or sympy.simplify(value / read(text)) == 1, text
    if sigma != "-":
        for at in SIZES:  # Min of roots and root of a Min: the same at sizes on either side
            given = {sizes[key]: sympy.Integer(size) for key, size in at.items()}
            assert sympy.simplify(one.init_std.subs(given) - read(sigma).subs(given)) == 0


# Yang et al. 2022, arXiv 2203.03466, tables 3, 8, 9 (SP: their grey values); uMP: Blake et al. 2024, arXiv 2407.17465, its muP-equivalent
# version. Powers of d of multiplier, init variance, SGD lr, Adam lr.
TP5_TABLES = """
table3    input  0    0  1  0      output  0    -2 -1 -1     hidden  0    -1 0 -1
table8    input  0    0  1  0      output  -1   0  1  0      hidden  0    -1 0 -1
table9    input  1/2  -1 0  -1/2   output  -1/2 -1 0  -1/2   hidden  0    -1 0 -1
standard  input  0    0  0  0      output  0    -1 0  0      hidden  0    -1 0 0
u-mup     input  0    0  1  0      output  -1   0  1  0      hidden  -1/2 0  1 -1/2
"""
UNITS = {"input": block(0, 1), "hidden": block(1, 1), "output": block(1, 0)}


@pytest.mark.parametrize("line", TP5_TABLES.strip().splitlines(), ids=lambda line: line.split()[0])
def test_the_published_tables_are_those_of_tp5(line):
    name, *cells = line.split()
    for start in range(0, 15, 5):
        role, *wanted = cells[start : start + 5]
        sgd, adam = (PARAMETRIZATIONS[name](UNITS[role], family) for family in ("sgd", "adam"))
        assert sgd.multiplier == adam.multiplier
        found = [exponent(sgd.multiplier), 2 * exponent(sgd.init_std), exponent(sgd.lr), exponent(adam.lr)]
        assert found == list(map(R, wanted)), role


def test_a_finite_weight_and_a_gain_get_tp5s_scalar_and_vector_rules():
    scalar, gain = block(0, 0), Block(fan_in=1, fan_out=1, copies=d, axes=())
    for name in TABLES:
        laws = [PARAMETRIZATIONS[name](scalar, family) for family in ("sgd", "adam")]
        assert {exponent(value) for law in laws for value in (law.multiplier, law.init_std, law.lr)} == {0}
    assert [exponent(PARAMETRIZATIONS["table3"](gain, family).lr) for family in ("sgd", "adam")] == [1, 0]
    assert PARAMETRIZATIONS["table9"](gain, "sgd").multiplier == sympy.sqrt(d)


# Yang & Littwin 2023, arXiv 2308.01814, §2.2 and 2.26: a, b, c, d of NTP for Adam, by [input, hidden, output].
def test_ntk_is_tp4bs_ntp_for_adam():
    laws = [PARAMETRIZATIONS["ntk"](UNITS[role], "adam") for role in ("input", "hidden", "output")]
    assert [-exponent(law.multiplier) for law in laws] == [0, R(1, 2), R(1, 2)]
    assert [-exponent(law.init_std) for law in laws] == [0, 0, 0]
    assert [-exponent(law.lr) for law in laws] == [R(1, 2), 1, R(1, 2)]
    assert [-exponent(law.eps) for law in laws] == [R(1, 2), 1, R(1, 2)]


@pytest.mark.parametrize("family", ["sgd", "adam"])
def test_up_goes_from_mup_to_ntk(family):
    for role, one in UNITS.items():
        ends = [PARAMETRIZATIONS["up"](one, family, s=s) for s in (R(0), R(1, 2))]
        assert invariants(ends[0], family) == invariants(PARAMETRIZATIONS["table3"](one, family), family), role
        assert invariants(ends[1], family) == invariants(PARAMETRIZATIONS["ntk"](one, family), family), role


@pytest.mark.parametrize("family", sorted(CLASSES))
@pytest.mark.parametrize("name", ["table3", "table8", "table9", "u-mup"])
def test_the_mup_tables_have_the_invariants_of_the_spectral_formulas(name, family):
    folded = UNITS["hidden"].model_copy(update={"target": 1 / sympy.sqrt(d)})
    for one in (*UNITS.values(), folded, Block(fan_in=1, fan_out=1, copies=d, axes=())):
        assert invariants(PARAMETRIZATIONS[name](one, family), family) == invariants(PARAMETRIZATIONS["spectral"](one, family), family)


# --- the shift ----------------------------------------------------------------------------------------------------------------------

rationals = st.fractions(-2, 2, max_denominator=4)
thetas = rationals.map(lambda power: d ** R(power.numerator, power.denominator))


@given(theta=thetas, fan_in=st.integers(0, 2), fan_out=st.integers(0, 2), family=st.sampled_from(sorted(LEARNING_RATES)))
@settings(max_examples=200, deadline=None)
def test_the_shift_and_the_formulas_at_another_multiplier_are_the_same(theta, fan_in, fan_out, family):
    before, after = block(fan_in, fan_out), block(fan_in, fan_out, multiplier=theta)
    law = shifted(PARAMETRIZATIONS["spectral"](before, family), theta, family)
    wanted = PARAMETRIZATIONS["spectral"](after, family)
    assert all(sympy.simplify(getattr(law, name) / getattr(wanted, name)) == 1 for name in Law.model_fields)
    assert exponent(after.spectral_norm) == exponent(before.spectral_norm / theta)  # the pre-scale of SVC


@given(theta=thetas, values=st.tuples(*[rationals] * 5), family=st.sampled_from(sorted(CLASSES)))
@settings(max_examples=200, deadline=None)
def test_the_shift_leaves_the_invariants_alone(theta, values, family):
    m, sigma, lr, eps, decay = (d ** R(value.numerator, value.denominator) for value in values)
    law = Law(multiplier=m, init_std=sigma, lr=lr, eps=eps, weight_decay=decay)
    assert invariants(shifted(law, theta, family), family) == invariants(law, family)
    if theta != 1:
        naive = shifted(law, theta, family).model_copy(update={"lr": law.lr / theta ** (class_of(family).shift + 1)})
        assert invariants(naive, family) != invariants(law, family)


def test_invariants_of_a_weight_that_starts_at_zero():
    assert invariants(Law(multiplier=1 / d, init_std=None, lr=ONE), "adam").init == sympy.oo
    assert order(None) == order(sympy.Integer(0)) == -sympy.oo


def test_degrees_agree_with_the_optimizer_table():
    assert {family: class_of(family).degree for family in DEGREES} == DEGREES
    for family in LEARNING_RATES:
        for one in UNITS.values():
            assert sympy.simplify(class_of(family).rate(one, one.init_std) / one.lr[family]) == 1


# THEORY 6.4: five steps of a tanh MLP 16 → 32 → 32 → 10 in float64, θ = (4, 1/4, 16) on its layers, with optimizers the compiler has not.


def _shampoo_root(M, power):
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values.clamp(min=1e-300) ** power) @ vectors.mT


def _lion(W, G, law, state):
    before = state.setdefault("m", torch.zeros_like(W))
    U = (0.9 * before + 0.1 * G).sign()
    before.lerp_(G, 0.01)
    return W - law.lr * (U + law.weight_decay * W)


def _shampoo(W, G, law, state):
    """Total inverse exponent 1/4, undamped: degree 1/2."""
    L = state["l"] = state.get("l", 0) + G @ G.mT
    Q = state["r"] = state.get("r", 0) + G.mT @ G
    return W - law.lr * _shampoo_root(L + 1e-9 * L.trace() * torch.eye(len(L)), -0.125) @ G @ _shampoo_root(
        Q + 1e-9 * Q.trace() * torch.eye(len(Q)), -0.125
    )


def _adafactor(W, G, law, state):
    """With parameter scaling: the step is relative to the weight."""
    V = state["v"] = state.get("v", 0) + G.square()
    return W - law.lr * W.square().mean().sqrt() * G / V.sqrt()


def _adam(W, G, law, state, l2=False, independent=False):
    G = G + law.weight_decay * W if l2 else G
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * G
    v = state["v"] = 0.99 * state.get("v", 0) + 0.01 * G.square()
    kept = 1 - (law.weight_decay if independent else 0.0)
    return kept * W - law.lr * m / (v.sqrt() + (0 if l2 else law.eps))


def _sgd_l2(W, G, law, state):
    return W - law.lr * (G + law.weight_decay * W)


class _Numbers:
    def __init__(self, law):
        self.__dict__ = {name: float(value) for name, value in law}


def _trajectory(step, theta, family, decay="coupled", naive=None, lr=0.01):
    torch.manual_seed(0)
    shapes = [(32, 16), (32, 32), (10, 32)]
    x, y = torch.randn(20, 16, dtype=torch.float64), torch.randint(10, (20,))
    laws = [Law(init_std=exact(f"1/{fan}"), lr=exact(R(str(lr))), eps=R(1, 1000), weight_decay=R(1, 10)) for fan in (4, 6, 6)]
    laws = [shifted(law, t, family, decay) for law, t in zip(laws, theta, strict=True)]
    laws = [_Numbers(naive(law, t) if naive else law) for law, t in zip(laws, theta, strict=True)]
    weights = [torch.randn(s, dtype=torch.float64) * law.init_std for s, law in zip(shapes, laws, strict=True)]
    states, logits = [{} for _ in laws], []
    for _ in range(5):
        weights = [W.detach().requires_grad_() for W in weights]
        h = x
        for i, (W, law) in enumerate(zip(weights, laws, strict=True)):
            h = F.linear(h, law.multiplier * W)
            h = h if i == 2 else h.tanh()
        logits.append(h.detach())
        grads = torch.autograd.grad(F.cross_entropy(h, y), weights)
        weights = [step(W.detach(), G, law, state) for W, G, law, state in zip(weights, grads, laws, states, strict=True)]
    return torch.stack(logits)


THETAS = (R(4), R(1, 4), R(16))
LONE = {
    "Lion": (_lion, "lion", "coupled", 0.0),
    "Shampoo of degree 1/2": (_shampoo, R(1, 2), "coupled", 1e-9),
    "Adafactor with parameter scaling": (_adafactor, "adafactor", "coupled", 0.0),
    "Adam with independent decay": (lambda *a: _adam(*a, independent=True), "adam", "independent", 0.0),
    "Adam with L2": (lambda *a: _adam(*a, l2=True), "adam", "l2", 0.0),
    "SGD with L2": (_sgd_l2, "sgd", "l2", 0.0),
}


@pytest.mark.parametrize("name", LONE)
def test_the_shift_leaves_five_steps_as_they_are(name):
    step, family, decay, tolerance = LONE[name]
    plain, moved = _trajectory(step, (ONE,) * 3, family, decay), _trajectory(step, THETAS, family, decay)
    assert (plain[1:] - plain[0]).abs().max() > 1e-3
    assert (plain - moved).abs().max() <= tolerance


NAIVE_LONE = {
    "Shampoo at 1/θ": ("Shampoo of degree 1/2", lambda law, t: law.model_copy(update={"lr": law.lr * t ** R(1, 2)})),
    "Adafactor at 1/θ": ("Adafactor with parameter scaling", lambda law, t: law.model_copy(update={"lr": law.lr / t})),
    "SGD with L2, λ constant": ("SGD with L2", lambda law, t: law.model_copy(update={"weight_decay": R(1, 10)})),
    "Adam with L2, λ constant": ("Adam with L2", lambda law, t: law.model_copy(update={"weight_decay": R(1, 10)})),
    "Adam with independent decay, λ·θ": (
        "Adam with independent decay",
        lambda law, t: law.model_copy(update={"weight_decay": law.weight_decay * t}),
    ),
}


@pytest.mark.parametrize("name", NAIVE_LONE)
def test_a_naive_shift_changes_five_steps(name):
    kind, naive = NAIVE_LONE[name]
    step, family, decay, _ = LONE[kind]
    plain, moved = _trajectory(step, (ONE,) * 3, family, decay), _trajectory(step, THETAS, family, decay, naive)
    assert (plain - moved).abs().max() > 1e-4


# --- gauges of a table --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables():
    with torch.random.fork_rng():
        return {
            "MLP": derive(MLP, widths=(64, 128)),
            "GPT": derive(GPT, ids, widths=(64, 128)),
            "tied": derive(lambda d: GPT(d, tie=True), ids, widths=(64, 128)),
            "fixed heads": derive(lambda d: GPT(d, heads=4), ids, widths=(64, 128)),
        }


# THEORY 1.6: powers of d of (multiplier, σ, SGD, Adam, ε) of inputs, hidden weights and outputs in the three forms.
FORMS = {
    "table3": ("0 0 1 0 -1", "0 -1/2 0 -1 -1", "0 -1 -1 -1 0"),
    "table8": ("0 0 1 0 -1", "0 -1/2 0 -1 -1", "-1 0 1 0 -1"),
    "table9": ("1/2 -1/2 0 -1/2 -1/2", "0 -1/2 0 -1 -1", "-1/2 -1/2 0 -1/2 -1/2"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", ["MLP", "GPT"])
def test_a_gauge_puts_every_weight_into_its_form(tables, model, form):
    table = tables[model].gauge(form)
    names = {"MLP": ("first.weight", "second.weight", "head.weight"), "GPT": ("wte.weight", "h.1.mlp.2.weight", "lm_head.weight")}[model]
    for name, wanted in zip(names, FORMS[form], strict=True):
        found = [table[name].exponent(quantity) for quantity in ("multiplier", "init_std", "sgd", "adam", "eps")]
        assert found == list(map(R, wanted.split()))
        assert all(use.multiplier == table[name].multiplier for use in table[name].uses)


def test_a_gauge_leaves_the_table_it_is_taken_of_alone(tables):
    table = tables["GPT"]
    before, found = table.to_json(), table["lm_head.weight"]  # fills the table's index of names
    moved = table.gauge("table8")
    assert moved["lm_head.weight"].multiplier == 1 / d
    assert table["lm_head.weight"] is found
    assert table.to_json() == before
    assert moved.trace is table.trace
    assert moved.gauge("table3").to_json() == before


def test_a_gauge_of_a_gauge_is_the_second_gauge(tables):
    for table in tables.values():
        for to in GAUGES:
            assert table.gauge("u-mup").gauge(to).rules == table.gauge(to).rules


def test_a_gauged_table_is_read_back_from_json_and_printed(tables):
    table = tables["tied"].gauge("table9")
    assert ScalingTable.from_json(table.to_json()).rules == table.rules
    assert "multiplied by" in str(table)
    assert "1/√d" in table.explain("lm_head.weight")


def test_table9_of_a_tied_embedding_is_form_c(tables):
    rule = tables["tied"].gauge("table9")["wte.weight"]
    assert [use.multiplier for use in rule.uses] == [sympy.sqrt(d), 1 / sympy.sqrt(d)]
    assert [rule.exponent(q) for q in ("init_std", "sgd", "adam", "eps")] == [R(-1, 2), 0, R(-1, 2), R(-1, 2)]
    assert [note for note in rule.notes if "multiplied by 1/d" in note] == []
    assert [use.multiplier for use in tables["tied"].gauge("table8")["wte.weight"].uses] == [1, 1 / d]


def test_uses_of_a_tied_weight_keep_the_ratio_of_their_multipliers(tables):
    for to in (*GAUGES, {"wte.weight": 16}, {"lm_head.*": "sqrt(d)"}):
        first, second = tables["tied"].gauge(to)["wte.weight"].uses
        assert second.multiplier / first.multiplier == 1 / d


def test_named_gauges_leave_gains_biases_and_added_tables_alone(tables):
    table = tables["GPT"].gauge("table9")
    for name in ("ln_f.weight", "ln_f.bias", "h.0.mlp.0.bias"):
        assert table[name] == tables["GPT"][name]
    assert tables["GPT"].gauge({"ln_f.weight": "d"})["ln_f.weight"].multiplier == d  # but one can


def test_a_mapping_gauges_what_its_patterns_name(tables):
    table = tables["MLP"].gauge({"*.weight": 4, "head.weight": "1/d"})
    assert [rule.multiplier for rule in table] == [4, 1, 4, 1, 4, 1, 1 / d, 1]
    assert table["second.weight"].init_std == 1 / (4 * sympy.sqrt(d))
    assert table["second.weight"].lr == {"sgd": R(1, 16), "adam": 1 / (4 * d), "muon": R(1, 4)}


def test_a_weight_whose_blocks_would_need_different_multipliers_keeps_its_own():
    columns = Factor(size=d + 16, part="in", start=0, stop=d), Factor(size=d + 16, part="in", start=d, stop=d + 16)
    rows = Factor(size=d, part="out", start=0, stop=d)
    blocks = [Block(fan_in=fan, fan_out=d, axes=((rows,), (part,))) for fan, part in zip((d, exact(16)), columns, strict=True)]
    use = Use(operator="aten.linear", source=Source(file="m.py", line=1, code="y", module="fc"), fan_in=d + 16, fan_out=d)
    rule = WeightRule(names=("fc.weight",), shape=(64, 80), dims=(d, d + 16), uses=(use,), blocks=tuple(blocks))
    table = gauge(ScalingTable(size=64, rules=(rule,), coverage=Coverage(trainable=1, reached=1)), "table9")
    assert [one.multiplier for one in (*table["fc.weight"].blocks, *table["fc.weight"].uses)] == [1, 1, 1]
    assert "keeps its multiplier" in table["fc.weight"].notes[-1]


def test_what_a_gauge_does_not_know_is_an_error(tables):
    table = tables["MLP"]
    with pytest.raises(UnknownName, match="unknown gauge 'table7'; known: table3, table8, table9, u-mup"):
        table.gauge("table7")
    with pytest.raises(UnknownName, match=r"unknown weight pattern 'heat\.\*'; known: first\.weight"):
        table.gauge({"heat.*": 2})
    with pytest.raises(ScalingError, match="is not positive"):
        table.gauge({"head.weight": "-d"})
    with pytest.raises(ValueError, match=r"0\.5 is a float"):
        table.gauge({"head.weight": 0.5})


def test_what_a_parametrization_does_not_know_is_an_error(tables):
    table = tables["MLP"]
    with pytest.raises(UnknownName, match="unknown parametrization 'mup'; known: spectral, table3"):
        parametrization(table, "mup")
    with pytest.raises(UnknownName, match="unknown optimizer 'adagrad'"):
        parametrization(table, "table3", "adagrad")
    with pytest.raises(UnknownName, match="unknown optimizer 'nothing'"):
        parametrization(table, "table3", "muon+nothing")
    with pytest.raises(UnknownName, match="unknown kind of weight decay"):
        shifted(Law(), ONE, "adam", "none")
    for name, s, message in (("up", None, "needs s"), ("up", "3/4", r"not a rational in \[0, 1/2\]"), ("ntk", "1/4", "takes no s")):
        with pytest.raises(ScalingError, match=message):
            parametrization(table, name, s=s)


def test_a_mixed_family_maps_matrices_and_leaves_the_rest_to_the_second(tables):
    table = tables["GPT"]
    mixed, muon, adam = (parametrization(table, "spectral", family).laws for family in ("muon+adam", "muon", "adam"))
    for rule in table:
        assert mixed[rule.name] == (muon if rule.role == "hidden" else adam)[rule.name]


# --- training: two gauges of one table take the same steps --------------------------------------------------------------------------

OPTIONS = {
    "sgd": {"optimizer": "sgd", "lr": 0.01},
    "sgd with momentum": {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9},
    "adam": {"optimizer": "adam", "lr": 0.02, "eps": 1e-2},
    "sign": {"optimizer": "sign", "lr": 0.02},
    "muon": {"optimizer": "muon", "lr": 0.05, "eps": 1e-2, "matrices": "all"},
    "adam-msign": {"optimizer": "adam-msign", "lr": 0.05, "eps": 1e-2, "matrices": "all"},
    "sn": {"optimizer": "sn", "lr": 0.05, "eps": 1e-2, "matrices": "all"},
    "svc": {"optimizer": "svc", "lr": 0.05, "eps": 1e-2, "matrices": "all", "clip": 4.0},
}
EVERY = {"first.weight": 4, "second.weight": "1/4", "third.weight": 8, "head.weight": 16}
DECODER = {"wte.weight": 4, "wpe.weight": 2, "*.c_attn.weight": "1/4", "*.c_proj.weight": 8, "*.mlp.0.weight": "1/2", "lm_head.weight": 16}
MODELS = {
    "MLP": (MLP, EVERY),
    "GPT": (lambda width: GPT(width, layers=1), DECODER),
    "tied": (lambda width: GPT(width, tie=True, layers=1), {}),
}


def _data(model):
    generator = torch.Generator().manual_seed(3)
    if model == "MLP":
        return torch.randn(12, 16, generator=generator, dtype=torch.float64), torch.randint(10, (12,), generator=generator)
    tokens = torch.randint(61, (3, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def _tables(model):
    return derive(MODELS[model][0], None if model == "MLP" else ids, widths=(64, 128))


@pytest.fixture(scope="module")
def trained():
    """Trained logits, by model, optimizer, gauge; each is needed more than once."""
    made = {model: _tables(model) for model in MODELS}
    known = {}

    def train(model, options, to="table3", tamper=None, clip=None, device="cpu", dtype=torch.float64):
        key = (model, str(options), str(to), clip, str(device), dtype)
        if tamper is None and key in known:
            return known[key]
        logits = _train(model, made[model], options, to, tamper, clip, device, dtype)
        return logits if tamper else known.setdefault(key, logits)

    return train


def _train(model, table, options, to, tamper, clip, device, dtype):
    torch.manual_seed(0)
    network = MODELS[model][0](64).to(device, dtype)
    x, y = (tensor.to(device, dtype if tensor.is_floating_point() else None) for tensor in _data(model))
    gauged = table.gauge(to)
    network, optimizer = compiler.compile(network, gauged, weight_decay=0.5, generator=_generator(device), **options)
    if tamper is not None:
        _tamper(optimizer, table, gauged, tamper)
    logits = []
    for _ in range(4):
        optimizer.zero_grad()
        out = network(x)
        logits.append(out.detach())
        F.cross_entropy(out.flatten(0, -2), y.flatten()).backward()
        if clip is not None:
            clip(network, optimizer)
        optimizer.step()
    return torch.stack(logits)


def _generator(device):
    return torch.Generator(device).manual_seed(5)


def _tamper(optimizer, table, gauged, tamper):
    """Change an option of every group by a power of its weight's θ."""
    option, power = tamper
    for group in optimizer.param_groups:
        name = group["param_names"][0]
        theta = float((gauged[name].blocks[0].multiplier / table[name].blocks[0].multiplier).subs(d, 64))
        for part in (group, *(group["blocks"] or ())):
            if option in part:
                part[option] *= theta**power


@pytest.mark.parametrize("to", ["every", "table8", "table9", "u-mup"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", ["MLP", "GPT"])
def test_two_gauges_of_one_table_train_bit_identically(trained, device, model, options, to):
    if device.type == "cuda" and to != "every":
        pytest.skip("one gauge on the second device")
    plain = trained(model, OPTIONS[options], device=device)
    moved = trained(model, OPTIONS[options], MODELS[model][1] if to == "every" else to, device=device)
    assert plain.isfinite().all()
    assert (plain[1:] - plain[0]).abs().max() > 1e-3
    assert (plain - moved).abs().max() <= (1e-10 if options in {"muon", "adam-msign", "sn", "svc"} else 0)


@pytest.mark.parametrize("options", ["sgd with momentum", "adam", "sign"])
@pytest.mark.parametrize("model", ["MLP", "GPT"])
def test_two_gauges_train_bit_identically_in_float32_too(trained, model, options):
    plain, moved = (trained(model, OPTIONS[options], to, dtype=torch.float32) for to in ("table3", MODELS[model][1]))
    assert plain.isfinite().all()
    assert torch.equal(plain, moved)


@pytest.mark.parametrize("options", ["sgd", "adam", "sign"])
def test_a_tied_embedding_trains_bit_identically_in_forms_b_and_c(trained, options):
    plain, moved = (trained("tied", OPTIONS[options], to) for to in ("table8", "table9"))
    assert (plain[1:] - plain[0]).abs().max() > 1e-3
    assert (plain - moved).abs().max() == 0


# THEORY 6.4 "must fail": what is done instead of the shift, as (option, power of θ by which it is off).
NAIVE = {
    "SGD at 1/θ": ("sgd", ("lr_scale", 1)),
    "momentum at 1/θ": ("sgd with momentum", ("lr_scale", 1)),
    "Adam at 1/θ²": ("adam", ("lr_scale", -1)),
    "sign at 1/θ²": ("sign", ("lr_scale", -1)),
    "muon at 1/θ²": ("muon", ("lr_scale", -1)),
    "SN at 1/θ²": ("sn", ("lr_scale", -1)),
    "constant ε": ("adam", ("eps_scale", -1)),
    "SVC at a constant λ": ("svc", ("clip_scale", 1)),
    "AdamW at a constant coupled λ": ("adam", ("wd_scale", -1)),
    "SGD with L2 at a constant λ": ("sgd", ("wd_scale", -2)),
}


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("model", ["MLP", "GPT"])
def test_a_naive_gauge_changes_the_training(trained, model, name):
    options, tamper = NAIVE[name]
    plain = trained(model, OPTIONS[options])
    assert (plain - trained(model, OPTIONS[options], MODELS[model][1], tamper)).abs().max() > 1e-5


def _torch_clip(network, optimizer):
    nn.utils.clip_grad_norm_(network.parameters(), 0.1)


def _own_clip(network, optimizer):
    compiler.clip_grad_norm_(optimizer, 0.1)


@pytest.mark.parametrize("options", ["sgd", "adam"])
def test_clipping_the_global_norm_depends_on_the_gauge_and_ours_does_not(trained, options):
    """P46, and THEORY 6.4: global clip must fail."""
    free = trained("MLP", OPTIONS[options])
    for clip, same in ((_torch_clip, False), (_own_clip, True)):
        plain, moved = (trained("MLP", OPTIONS[options], to, clip=clip) for to in ("table3", EVERY))
        assert (plain - free).abs().max() > 1e-6
        difference = (plain - moved).abs().max()
        assert difference <= 1e-10 if same else difference > 1e-6


def test_the_compiler_refuses_a_gauge_of_what_no_module_applies():
    """P01's multiplier has to be in the forward, so a multiplier on a gain cannot be dropped silently."""
    table = derive(GPT, ids, widths=(64, 128)).gauge({"ln_f.weight": "d"})
    with pytest.raises(NotExpressible, match=r"ln_f\.weight"):
        compiler.compile(GPT(64), table, "adam", lr=0.1)


def test_the_multiplier_is_there_in_evaluation_too():
    """T21: P01's naive readout multiplies in training only."""
    table, network = derive(MLP, widths=(64, 128)).gauge("table8"), MLP(64)
    compiler.compile(network, table, "adam", lr=0.1)
    x = torch.randn(4, 16)
    outputs = [network.train(mode)(x) for mode in (True, False)]
    assert torch.equal(*outputs)
    hidden = torch.tanh(network.third(torch.tanh(network.second(torch.tanh(network.first(x))))))
    torch.testing.assert_close(outputs[0], F.linear(hidden, network.head.weight / 64, network.head.bias))
    assert math.isclose(network.head.weight.detach().std().item(), math.sqrt(10), rel_tol=0.2)
