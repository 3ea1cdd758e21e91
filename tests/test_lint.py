"""Lint: hand-written muP in three gauges passes, each missing factor is found alone, and the faults of public code are named."""

import math

import models
import mup
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

import compiler
from scaling import derive
from scaling.errors import CannotMeasure
from scaling.limits import WIDTH
from scaling.lint import LintReport, lint

BASE = 64
VOCAB = 61
TOKENS = torch.arange(16).reshape(2, 8)
D = WIDTH


class Attention(nn.Module):
    def __init__(self, d, heads, scale):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.heads, self.scale = heads, scale

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, d, heads, scale):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, heads, scale)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class NanoGPT(nn.Module):
    """A nanoGPT with muP's multipliers written in by hand; 4 heads, so that a head grows with d."""

    def __init__(self, d, embed=1.0, readout=1.0, attention=None, tie=False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, d), nn.Embedding(32, d)
        self.h = nn.ModuleList(Block(d, 4, attention) for _ in range(2))
        self.ln_f = nn.LayerNorm(d)
        self.head = nn.Linear(d, VOCAB, bias=False)
        self.embed, self.readout = embed, readout
        if tie:
            self.head.weight = self.wte.weight

    def forward(self, idx):
        x = self.wte(idx) * self.embed + self.wpe(torch.arange(idx.shape[1])) * self.embed
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x)) * self.readout


# a gauge: the power of d in the multiplier, init and Adam lr of embeddings and readout
TABLES = {
    "table 3": {"embed": (0, 0, 0), "readout": (0, -1, -1)},
    "table 8": {"embed": (0, 0, 0), "readout": (-1, 0, 0)},
    "table 9": {"embed": (0.5, -0.5, -0.5), "readout": (-0.5, -0.5, -0.5)},
}


def nano(table="table 8", *, without=(), eps=1e-5, decay=0.1, optimizer=torch.optim.AdamW, zero_readout=False, tie=False):
    """`build` of correct muP for AdamW in one gauge; `without` leaves factors out."""
    gauge = TABLES[table]

    def power(name, exponent, m):
        return 1.0 if name in without else m**exponent

    def build(d):
        m = d / BASE
        head = d // 4
        attention = head**-0.5 if "attention scale" in without else 1 / head
        embed, readout = power("embedding multiplier", gauge["embed"][0], m), power("readout multiplier", gauge["readout"][0], m)
        model = NanoGPT(d, embed, readout, attention, tie)
        kinds = {"embed": [model.wte.weight, model.wpe.weight], "readout": [] if tie else [model.head.weight], "hidden": [], "gain": []}
        for name, weight in model.h.named_parameters():
            kinds["gain" if "ln_" in name else "hidden"].append(weight)
        kinds["gain"] += list(model.ln_f.parameters())
        init = {"embed": gauge["embed"][1], "readout": gauge["readout"][1], "hidden": -0.5}
        lr = {"embed": gauge["embed"][2], "readout": gauge["readout"][2], "hidden": -1, "gain": 0}
        gradient = {"embed": -1 + gauge["embed"][0], "readout": gauge["readout"][0], "hidden": -1, "gain": -1}
        for kind, exponent in init.items():
            for weight in kinds[kind]:
                nn.init.normal_(weight, std=(0.1 if kind == "hidden" else 0.5) * power(f"{kind} init", exponent, m))
        if zero_readout:
            nn.init.zeros_(model.head.weight)
        groups = [
            {
                "params": weights,
                "lr": 1e-3 * power(f"{kind} lr", lr[kind], m) * (m**-1 if f"{kind} lr/m" in without else 1),
                "weight_decay": 0 if kind == "gain" else decay * power(f"{kind} decay", -lr[kind], m),
                "eps": eps * power(f"{kind} eps", gradient[kind], m),
            }
            for kind, weights in kinds.items()
            if weights
        ]
        return model, optimizer(groups)

    return build


def faults(build, args=TOKENS, widths=(32, 64, 128), **options):
    """(kind, weights, missing factor) of every finding that is no note."""
    return {(f.kind, f.weights, f.factor) for f in lint(build, args, widths, **options).faults}


HIDDEN = tuple(f"h.{i}.{name}.weight" for name in ("attn.qkv", "attn.out", "up", "down") for i in (0, 1))
EMBEDDINGS = ("wte.weight", "wpe.weight")


def of(found, kind):
    return {name: factor for found_kind, names, factor in found if found_kind == kind for name in names}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("zero_readout", [False, True])
def test_correct_mup_in_any_gauge_has_no_finding(table, zero_readout):
    report = lint(nano(table, zero_readout=zero_readout), TOKENS)
    assert report.findings == ()
    assert report.passed


@pytest.mark.parametrize(
    ("without", "kind", "weights", "factor"),
    [
        ("embed lr/m", "lr", EMBEDDINGS, D),
        ("hidden init", "init", HIDDEN, 1 / sympy.sqrt(D)),
        ("hidden lr", "lr", HIDDEN, 1 / D),
        ("readout multiplier", "multiplier", ("head.weight",), 1 / D),
        ("hidden decay", "weight_decay", HIDDEN, D),
        ("hidden eps", "eps", HIDDEN, 1 / D),
        ("embed eps", "eps", EMBEDDINGS, 1 / D),
    ],
)
def test_each_missing_factor_is_the_only_finding(without, kind, weights, factor):
    found = faults(nano("table 8", without={without}))
    assert {k for k, *_ in found} == {kind}
    assert of(found, kind) == dict.fromkeys(weights, factor)


@pytest.mark.parametrize(
    ("table", "without", "kind", "weights", "factor"),
    [
        ("table 3", "readout init", "init", ("head.weight",), 1 / D),
        ("table 3", "readout lr", "lr", ("head.weight",), 1 / D),
        ("table 9", "embed init", "init", EMBEDDINGS, 1 / sympy.sqrt(D)),
        ("table 9", "embed lr", "lr", EMBEDDINGS, 1 / sympy.sqrt(D)),
        ("table 9", "embedding multiplier", "multiplier", EMBEDDINGS, sympy.sqrt(D)),
        ("table 9", "readout multiplier", "multiplier", ("head.weight",), 1 / sympy.sqrt(D)),
        ("table 9", "readout lr", "lr", ("head.weight",), 1 / sympy.sqrt(D)),
    ],
)
def test_a_factor_missing_in_another_gauge_is_found_in_that_gauge(table, without, kind, weights, factor):
    found = faults(nano(table, without={without}, eps=1e-12))
    assert {k for k, *_ in found} == {kind}
    assert of(found, kind) == dict.fromkeys(weights, factor)


def test_one_over_root_d_attention_left_in_is_one_finding_with_its_line():
    report = lint(nano(without={"attention scale"}), TOKENS)
    (finding,) = report.findings
    assert (finding.kind, finding.factor) == ("attention", 1 / sympy.sqrt(D))
    assert "scaled_dot_product_attention" in finding.where.code
    assert set(finding.weights) == {"h.0.attn.qkv.weight", "h.1.attn.qkv.weight"}


def test_the_scale_that_torch_hides_is_found_too():
    def build(d):
        model, optimizer = nano()(d)
        for block in model.h:
            block.attn.scale = None
        return model, optimizer

    assert {f.kind for f in lint(build, TOKENS).findings} == {"attention"}


def test_plain_pytorch_is_told_each_factor_it_lacks():
    def build(d):
        model = models.MLP(d)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    found = faults(build, torch.zeros(2, 16))
    hidden = {"second.weight": 1 / D, "third.weight": 1 / D}
    assert of(found, "lr") == hidden | {"head.weight": 1 / D}
    assert of(found, "init") == {"head.weight": 1 / sympy.sqrt(D)}
    assert of(found, "weight_decay") == dict.fromkeys([*hidden, "head.weight"], D)
    assert {k for k, *_ in found} == {"lr", "init", "weight_decay"}


def test_the_report_names_weight_factor_line_and_cure():
    def build(d):
        model = models.GPT(d)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)

    report = lint(build, models.ids())
    assert not report.passed
    text = str(report)
    assert "✗ learning rate of a hidden weight under AdamW: h.[0-1].attn.c_attn.weight" in text
    assert "is constant in d, should be 1/d" in text
    assert "lr multiplied by 1/d" in text
    assert "models.py" in text
    assert "failed" in text
    assert LintReport.model_validate_json(report.to_json()) == report


@pytest.mark.parametrize("place", ["on the weight", "before", "after", "after a bias and a view", "doubled"])
def test_a_multiplier_is_found_wherever_the_forward_applies_it(place):
    class Readout(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.stem, self.weight, self.bias = (
                nn.Linear(16, d, bias=False),
                nn.Parameter(torch.randn(10, d)),
                nn.Parameter(torch.zeros(10)),
            )
            self.m = BASE / d

        def forward(self, x):
            x = torch.tanh(self.stem(x))
            if place == "on the weight":
                return F.linear(x, self.weight * self.m)
            if place == "before":
                return F.linear(x * self.m, self.weight)
            if place == "after":
                return F.linear(x, self.weight) * self.m
            if place == "doubled":
                return F.linear(x * self.m, self.weight) * self.m
            return (F.linear(x, self.weight).view(-1, 2, 5) + self.bias.view(2, 5)) / (1 / self.m)

    def build(d):
        model = Readout(d)
        weights = [model.stem.weight, model.weight]
        return model, torch.optim.Adam([{"params": weights}, {"params": model.bias, "lr": 1e-3 / model.m}])

    report = lint(build, torch.zeros(2, 16))
    expected = {("multiplier", ("weight",), D)} if place == "doubled" else set()
    assert {(f.kind, f.weights, f.factor) for f in report.faults if f.weight != "bias" and f.kind != "unused"} == expected


def test_sgd_needs_its_own_factors():
    """P41: vector-like weights want d, readouts 1/d (table 3); Adam's factors under SGD are found."""

    def build(right):
        def built(d):
            m, model = d / BASE, models.MLP(d)
            rates = (
                {"first": m, "second": 1, "third": 1, "head": 1 / m}
                if right
                else {"first": 1, "second": 1 / m, "third": 1 / m, "head": 1 / m}
            )
            nn.init.normal_(model.head.weight, std=1 / d)
            groups = []
            for name, layer in model.named_children():
                nn.init.zeros_(layer.bias)
                bias = {"head": 1}.get(name, m if right else 1)
                groups += [{"params": [layer.weight], "lr": 0.1 * rates[name]}, {"params": [layer.bias], "lr": 0.1 * bias}]
            return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9)

        return built

    x = torch.zeros(2, 16)
    assert faults(build(True), x) == set()
    assert of(faults(build(False), x), "lr") == {
        "first.weight": D, "first.bias": D, "second.weight": D, "second.bias": D, "third.weight": D, "third.bias": D,
    }  # fmt: skip


# --- Muon ---------------------------------------------------------------------------------------------------------------------------


def muon(mode, *, readout=False, embedding=False):
    """Muon for the matrices, AdamW for the rest, table 3."""

    def build(d):
        m, model = d / BASE, NanoGPT(d, attention=4 / d)
        hidden = [w for n, w in model.h.named_parameters() if w.ndim == 2]
        for weight in hidden:
            nn.init.normal_(weight, std=0.1 * m**-0.5)
        nn.init.normal_(model.head.weight, std=0.1 / m)
        matrices = [*hidden, *([model.head.weight] if readout else []), *([model.wte.weight] if embedding else [])]
        rest = [w for w in model.parameters() if not any(w is other for other in matrices)]
        groups = [{"params": [w], "lr": 1e-3 / (m if w is model.head.weight else 1), "weight_decay": 0.0} for w in rest]
        return model, [torch.optim.Muon(matrices, lr=0.02, adjust_lr_fn=mode), torch.optim.AdamW(groups)]

    return build


@pytest.mark.parametrize("mode", ["original", None])
def test_muon_beside_adam_passes_on_hidden_matrices(mode):
    assert faults(muon(mode)) == set()


def test_muon_that_matches_adams_rms_grows_with_width():
    assert of(faults(muon("match_rms_adamw")), "lr") == dict.fromkeys(HIDDEN, 1 / sympy.sqrt(D))


def test_muons_max_factor_on_a_readout_is_found():
    found = faults(muon("original", readout=True), widths=(64, 128, 256))  # wider than the vocabulary, below which max(1, ·) is right
    assert of(found, "lr") == {"head.weight": 1 / sympy.sqrt(D)}


def test_an_embedding_among_the_2d_weights_of_muon_is_found():
    assert of(faults(muon("original", embedding=True)), "matrix optimizer") == {"wte.weight": None}


# --- public faults, rebuilt small ---------------------------------------------------------------------------------------------------


def test_an_init_divided_by_m_and_not_its_root_is_found():
    def build(d):
        model, optimizer = nano()(d)
        for block in model.h:
            nn.init.normal_(block.up.weight, std=0.1 / (d / BASE))
        return model, optimizer

    assert of(faults(build), "init") == dict.fromkeys(("h.0.up.weight", "h.1.up.weight"), sympy.sqrt(D))


def test_mup_that_is_silently_off_is_found_factor_by_factor():
    off = {"readout multiplier", "hidden init", "hidden lr", "hidden decay", "attention scale"}
    found = faults(nano(without=off, eps=1e-12))
    assert {k for k, *_ in found} == {"multiplier", "init", "lr", "weight_decay", "attention"}


def test_lions_one_over_root_d_head_lr_under_adamw_is_found():
    def build(d):
        model, optimizer = nano("table 3", eps=1e-12, decay=0)(d)
        for group in optimizer.param_groups:
            if group["params"][0] is model.head.weight:
                group["lr"] = 1e-3 * (d / BASE) ** -0.5
        return model, optimizer

    assert faults(build) == {("lr", ("head.weight",), 1 / sympy.sqrt(D))}


def test_a_head_kept_in_and_out_order_and_read_as_a_linear_is_found():
    """P03: fan_in is what is summed over, not the second axis."""

    class Conv1D(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.stem = nn.Linear(16, d, bias=False)
            self.weight = nn.Parameter(torch.randn(d, 10) / math.sqrt(10))

        def forward(self, x):
            return torch.relu(self.stem(x)) @ self.weight

    def build(d):
        model = Conv1D(d)
        return model, torch.optim.Adam(model.parameters(), lr=1e-3)

    assert faults(build, torch.zeros(2, 16)) == {("multiplier", ("weight",), 1 / D)}


def test_a_bare_tie_lacks_the_readout_multiplier_on_its_later_use():
    assert faults(nano(tie=True)) == set()
    (finding,) = lint(nano(tie=True, without={"readout multiplier"}), TOKENS).faults
    assert (finding.kind, finding.weight, finding.factor) == ("multiplier", "wte.weight", 1 / D)
    assert "self.head" in finding.where.code


def test_l2_inside_adam_is_found():
    report = lint(nano(optimizer=torch.optim.Adam), TOKENS)
    assert {f.kind for f in report.findings} == {"weight_decay"}
    assert "use AdamW" in report.findings[0].fix


def test_a_matrix_with_a_mean_is_found():
    def build(d):
        model, optimizer = nano()(d)
        nn.init.uniform_(model.h[0].up.weight, 0, 0.2 * math.sqrt(3) / math.sqrt(d / BASE))
        return model, optimizer

    assert ("mean", ("h.0.up.weight",)) in {(k, w) for k, w, _ in faults(build)}


def test_weights_in_no_group_or_in_two_are_found():
    def build(d):
        model, optimizer = nano()(d)
        optimizer.param_groups = [g for g in optimizer.param_groups if g["params"][0] is not model.head.weight]
        return model, [optimizer, torch.optim.SGD([model.wpe.weight], lr=0.1)]

    found = {f.weight: f.found for f in lint(build, TOKENS).findings if f.kind == "group"}
    assert found["head.weight"] == "in none"
    assert found["wpe.weight"] == "in 2 (AdamW, SGD)"
    assert set(found) == {"head.weight", "wpe.weight"}


def test_a_trainable_weight_that_is_not_used_is_said_to_be():
    def build(d):
        model, optimizer = nano()(d)
        model.extra = nn.Linear(d, d, bias=False)
        optimizer.add_param_group({"params": [model.extra.weight]})
        return model, optimizer

    report = lint(build, TOKENS)
    assert {(f.kind, f.severity, f.weight) for f in report.findings} == {("unused", "warning", "extra.weight")}
    assert report.passed


def test_torchs_bias_init_is_noted_but_does_not_fail():
    def build(d):
        m, model = d / BASE, models.MLP(d)
        nn.init.normal_(model.head.weight, std=1 / d)
        groups = [{"params": [w], "lr": 1e-3 / (m if w.ndim == 2 and w.shape[1] == d else 1)} for w in model.parameters()]
        return model, torch.optim.Adam(groups)

    report = lint(build, torch.zeros(2, 16), seeds=(0, 1, 2, 3))
    assert report.passed
    assert report.faults == ()
    assert {f.weight for f in report.findings} <= {"second.bias", "third.bias", "head.bias"}
    assert {"second.bias", "third.bias"} <= {name for f in report.findings for name in f.weights}


# --- the mup package ----------------------------------------------------------------------------------------------------------------


class MupMLP(nn.Module):
    def __init__(self, d, readout=mup.MuReadout):
        super().__init__()
        self.first, self.second = nn.Linear(16, d), nn.Linear(d, d)
        self.head = readout(d, 10)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class MupTransformer(nn.Module):
    def __init__(self, d, readout=mup.MuReadout):
        super().__init__()
        self.wte, self.block = nn.Embedding(VOCAB, d), Block(d, 4, 4 / d)
        self.head = readout(d, VOCAB, bias=False)

    def forward(self, idx):
        return self.head(self.block(self.wte(idx)))


def with_mup(make, optimizer, *, readout=mup.MuReadout, **options):
    def build(d):
        model = make(d, readout)
        mup.set_base_shapes(model, make(BASE, readout), delta=make(BASE + 32, readout), do_assert=False)
        return model, optimizer(model.parameters(), lr=0.01, **options)

    return build


@pytest.mark.parametrize("optimizer", [mup.MuAdam, mup.MuAdamW, mup.MuSGD])
@pytest.mark.parametrize(("make", "args"), [(MupMLP, torch.zeros(2, 16)), (MupTransformer, TOKENS)])
def test_the_mup_package_in_correct_use_passes(make, args, optimizer):
    options = {"weight_decay": 0.1} if optimizer is not mup.MuAdam else {}
    assert faults(with_mup(make, optimizer, **options), args, seeds=(0, 1, 2)) == set()


@pytest.mark.parametrize(("make", "args"), [(MupMLP, torch.zeros(2, 16)), (MupTransformer, TOKENS)])
def test_a_plain_linear_in_place_of_a_mu_readout_is_found(make, args):
    found = faults(with_mup(make, mup.MuAdam, readout=nn.Linear), args)
    assert {names for _, names, _ in found} == {("head.weight",)}
    assert of(found, "init") == {"head.weight": 1 / sympy.sqrt(D)}
    assert of(found, "lr") == {"head.weight": 1 / D}


def test_u_mup_passes_and_its_embedding_lr_is_noted():
    class Unit(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.wte, self.hidden, self.head = nn.Embedding(VOCAB, d), nn.Linear(d, d, bias=False), nn.Linear(d, VOCAB, bias=False)
            for weight in self.parameters():
                nn.init.normal_(weight)
            self.d = d

        def forward(self, idx):
            x = self.hidden(self.wte(idx)) * self.d**-0.5
            return self.head(F.silu(x)) / self.d

    def build(d):
        model = Unit(d)
        lr = {"wte": d**-0.5, "hidden": d**-0.5, "head": 1.0}
        return model, torch.optim.AdamW([{"params": [getattr(model, n).weight], "lr": value} for n, value in lr.items()], weight_decay=0)

    report = lint(build, TOKENS)
    assert report.passed
    assert report.faults == ()
    assert [(f.kind, f.severity, f.weight) for f in report.findings] == [("lr", "note", "wte.weight")]


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
@pytest.mark.parametrize(("make", "args"), [(models.CNN, None), (lambda d: models.GPT(d, heads=4), models.ids())])
def test_what_this_project_compiles_passes(make, args, optimizer):
    """Attention's 1/√d stays in the model: q's init and learning rate carry the rest, block by block."""
    table = derive(make, args, widths=(64, 128, 256))

    def build(d):
        return compiler.compile(make(d), table, optimizer=optimizer, lr=0.01, weight_decay=0.1)

    assert faults(build, args) == set()


# --- wrong use ----------------------------------------------------------------------------------------------------------------------


def test_wrong_use_is_refused_with_what_to_do():
    with pytest.raises(CannotMeasure, match="not a pair"):
        lint(models.MLP, torch.zeros(2, 16))
    with pytest.raises(CannotMeasure, match="no two widths"):
        lint(nano(), TOKENS, (64,))
    with pytest.raises(CannotMeasure, match="in place of an optimizer"):
        lint(lambda d: (models.MLP(d), 3), torch.zeros(2, 16))
