"""Lint: hand-written muP in three gauges passes, each missing factor is found alone, and the faults of public code are named."""

import math

import models
import mup
import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import compiler
from compiler.compile import OPTIMIZERS
from scaling import derive
from scaling.errors import CannotMeasure, CaptureFailed
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


def test_plain_pytorch_is_told_each_factor_it_lacks():
    def build(d):
        model = models.MLP(d)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    report = lint(build, torch.zeros(2, 16), (32, 64, 128))
    found = {(f.kind, f.weights, f.factor) for f in report.faults}
    hidden = {"second.weight": 1 / D, "third.weight": 1 / D}
    assert of(found, "lr") == hidden | {"head.weight": 1 / D}
    assert of(found, "init") == {"head.weight": 1 / sympy.sqrt(D)}
    assert {k for k, *_ in found} == {"lr", "init"}
    notes = {(f.kind, f.weights, f.factor) for f in report.findings if f.severity == "note"}
    assert of(notes, "weight_decay") == dict.fromkeys([*hidden, "head.weight"], D)  # lr·weight_decay is right until lr is mended


def test_the_report_names_weight_factor_line_and_cure():
    def build(d):
        model = models.GPT(d)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)

    report = lint(build, models.ids())
    assert not report.passed
    text = str(report)
    assert "✗ learning rate of a hidden weight under AdamW is constant in d, should be 1/d" in text
    assert text.count("✗ learning rate of a hidden weight") == 1
    assert "\n    fix: a param group of its own, with lr multiplied by 1/d\n    h.[0-1].attn.c_attn.weight\n        at " in text
    assert "models.py" in text
    assert "failed" in text
    assert LintReport.from_json(report.to_json()) == report
    rows = report.to_markdown().splitlines()
    assert rows[0].startswith("**Failed: ")
    assert len(rows) == 7 + len(report.findings) - 1
    assert all(row.count(" | ") == 6 for row in rows if "`" in row)


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
    (clipped,) = lint(build(True), x, (32, 64, 128), clip=1.0).faults  # SGD's steps follow the clipped gradient, Adam's do not
    assert (clipped.kind, clipped.severity, clipped.weights, clipped.factor) == ("clip", "error", ("head.weight",), sympy.sqrt(D))
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


# --- public faults, rebuilt small: the report has this finding and no other ----------------------------------------------------------


def changed(change, table="table 8", **options):
    """A correct nanoGPT, then changed: `change(model, groups, m)`, with the param group of each kind of weight."""

    def build(d):
        model, optimizer = nano(table, **options)(d)
        groups = dict(zip(("embed", "readout", "hidden", "gain"), optimizer.param_groups, strict=True))
        change(model, groups, d / BASE)
        return model, optimizer

    return build


def init_over_m(model, groups, m):
    """EleutherAI/gpt-neox#1087: the init divided by m, not by √m."""
    for block in model.h:
        nn.init.normal_(block.up.weight, std=0.1 / m)


def lions_head(model, groups, m):
    """allenai/OLMo-core#854: Lion's 1/√d for the head lr, under AdamW."""
    groups["readout"]["lr"] = 1e-3 * m**-0.5


def root_d_attention(model, groups, m):
    """cloneofsimo/minRF#10."""
    for block in model.h:
        block.attn.scale = (16 * m) ** -0.5


def default_attention(model, groups, m):
    """The same, hidden in scaled_dot_product_attention."""
    for block in model.h:
        block.attn.scale = None


def decay_not_times_m(model, groups, m):
    """microsoft/mup#73."""
    groups["hidden"]["weight_decay"] = 0.1


class Conv1D(nn.Module):
    """An output layer in GPT-2's (in, out) layout, read as (out, in) by its init: fan_in = 61, and by its group (P03)."""

    def __init__(self, d, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, outputs) / outputs**0.5)

    def forward(self, x):
        return x @ self.weight


def conv1d(table):
    def build(d):
        model, optimizer = nano(table, eps=1e-12)(d)
        head = Conv1D(d, VOCAB)
        for group in optimizer.param_groups:
            group["params"] = [head.weight if w is model.head.weight else w for w in group["params"]]
            if group["params"][0] is head.weight:
                group |= {"lr": 1e-3, "weight_decay": 0.1}
        model.head = head
        return model, optimizer

    return build


UPS = ("h.0.up.weight", "h.1.up.weight")
QKV = ("h.0.attn.qkv.weight", "h.1.attn.qkv.weight")
ROOT = sympy.sqrt(D)
SDPA = "scaled_dot_product_attention"
PUBLIC = {
    "init over m": (changed(init_over_m), "init", UPS, "1/d", "1/√d", ROOT, "self.up(", "multiply its init_std by √d"),
    "Lion's head lr": (
        changed(lions_head, "table 3", eps=1e-12, decay=0),
        "lr", ("head.weight",), "1/√d", "1/d", 1 / ROOT, "self.head(", "lr multiplied by 1/√d",
    ),
    "1/√d attention": (changed(root_d_attention), "attention", QKV, "2/√d", "4/d", 1 / ROOT, SDPA, "multiply by 2/√d"),
    "hidden 1/√d attention": (changed(default_attention), "attention", QKV, "2/√d", "4/d", 1 / ROOT, SDPA, "takes scale="),
    "decay without m": (
        changed(decay_not_times_m),
        "weight_decay", HIDDEN, "1/d", "constant in d", D, "self.", "multiply its weight_decay by d",
    ),
    "Conv1D as (out, in)": (
        conv1d("table 3"),
        "multiplier", ("head.weight",), "constant in d", "1/d", 1 / D, "x @ self.weight", "multiply what it makes here by 1/d",
    ),
    "Muon's max(1, ·) on a readout": (
        muon("original", readout=True), "lr", ("head.weight",), "constant in d", "1/√d", 1 / ROOT, "self.head(", "lr multiplied by 1/√d",
    ),
    "embedding in Muon": (
        muon("original", embedding=True),
        "matrix optimizer", ("wte.weight",), "updated as one matrix", "updated row by row", None, "self.wte(", "give embeddings to AdamW",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLIC)
def test_a_public_fault_is_named_alone_with_weight_value_factor_line_and_cure(case):
    build, kind, weights, found, expected, factor, code, fix = PUBLIC[case]
    findings = lint(build, TOKENS, (64, 128, 256)).faults
    assert {f.kind for f in findings} == {kind}
    assert {name for f in findings for name in f.weights} == set(weights)
    for finding in findings:
        assert (finding.severity, finding.found, finding.expected, finding.factor) == ("error", found, expected, factor)
        assert code in finding.where.code
        assert finding.where.file.endswith("test_lint.py")
        assert fix in finding.fix


class WithMHA(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.stem, self.attn = nn.Linear(16, d, bias=False), nn.MultiheadAttention(d, 4, bias=False, batch_first=True)
        self.head = nn.Linear(d, 10, bias=False)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.attn(x, x, x, need_weights=False)[0])


def test_one_over_root_d_inside_torchs_multihead_attention_is_found():
    def build(d):
        model = WithMHA(d)
        hidden = [model.attn.in_proj_weight, model.attn.out_proj.weight]
        for weight in hidden:
            nn.init.normal_(weight, std=d**-0.5)
        nn.init.normal_(model.head.weight, std=1 / d)
        groups = [{"params": [*hidden, model.head.weight], "lr": 1 / d}, {"params": [model.stem.weight]}]
        return model, torch.optim.AdamW(groups, weight_decay=0)

    (finding,) = lint(build, torch.randn(2, 3, 16), (32, 64, 128)).findings
    assert (finding.kind, finding.weights, finding.factor) == ("attention", ("attn.in_proj_weight",), 1 / ROOT)
    assert "self.attn(x, x, x" in finding.where.code
    assert "scale q" in finding.fix


def test_mup_that_is_silently_off_is_found_factor_by_factor():
    """EleutherAI/gpt-neox#1061: always built with use_mup=False."""
    off = {"readout multiplier", "hidden init", "hidden lr", "hidden decay", "attention scale"}
    report = lint(nano(without=off, eps=1e-12), TOKENS)
    found = {(f.kind, f.severity): {name for g in report.findings if g.kind == f.kind for name in g.weights} for f in report.findings}
    assert found == {
        ("multiplier", "error"): {"head.weight"},
        ("init", "error"): set(HIDDEN),
        ("lr", "error"): set(HIDDEN),
        ("attention", "error"): set(QKV),
        ("weight_decay", "note"): set(HIDDEN),
    }


def test_a_bare_tie_lacks_the_readout_multiplier_on_its_later_use():
    assert faults(nano(tie=True)) == set()
    (finding,) = lint(nano(tie=True, without={"readout multiplier"}), TOKENS).faults
    assert (finding.kind, finding.weight, finding.factor) == ("multiplier", "wte.weight", 1 / D)
    assert "self.head" in finding.where.code


def test_at_a_later_use_of_a_tie_only_the_multiplier_is_judged():
    """KellerJordan/modded-nanogpt 2024-10-10: a tied head, with the init 1/√d of nn.Linear."""

    def build(d):
        model, optimizer = nano(tie=True, without={"readout multiplier"})(d)
        nn.init.normal_(model.wte.weight, std=d**-0.5)
        return model, optimizer

    found = {(f.kind, f.factor, f.where.code) for f in lint(build, TOKENS).faults}
    embedding, head = (
        "x = self.wte(idx) * self.embed + self.wpe(torch.arange(idx.shape[1])) * self.embed",
        "return self.head(self.ln_f(x)) * self.readout",
    )
    assert found == {("init", ROOT, embedding), ("multiplier", 1 / D, head)}


class Normed(nn.Module):
    """Two attentions in which a norm without weights ends q and k, as in cloneofsimo/minRF."""

    def __init__(self, d):
        super().__init__()
        self.stem, self.qkv, self.out = nn.Linear(16, d), nn.Linear(d, 3 * d), nn.Linear(d, 4)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:]), v)
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(x + F.scaled_dot_product_attention(F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]), v))


def test_findings_of_no_weight_are_told_apart_by_their_lines():
    def build(d):
        model = Normed(d)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    report = lint(build, torch.randn(2, 3, 16), (32, 64, 128))
    found = [f for f in report.findings if f.kind == "attention"]
    assert [f.weights for f in found] == [(), ()]
    assert [norm in f.where.code for f, norm in zip(found, ("layer_norm", "rms_norm"), strict=True)] == [True, True]
    assert all(f.where.code in str(report) for f in found)
    assert not any(line.isspace() or not line for line in str(report).splitlines())


def test_an_embedding_normalised_column_by_column_is_not_updated_as_one_matrix():
    """LIONS-EPFL/scion, RowNorm(transpose=True): each feature by its norm over the vocabulary, which is finite."""

    class Columns(torch.optim.Optimizer):
        def step(self, closure=None):
            for W in self.param_groups[0]["params"]:
                W.data.sub_(W.grad / W.grad.norm(dim=0, keepdim=True), alpha=self.param_groups[0]["lr"])

    def build(d):
        model, optimizer = nano(decay=0)(d)
        groups = [{**group, "params": [w for w in group["params"] if w is not model.wte.weight]} for group in optimizer.param_groups]
        return model, [torch.optim.AdamW(groups), Columns([model.wte.weight], {"lr": 0.1})]

    assert lint(build, TOKENS).findings == ()


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


def test_a_decay_that_lr_does_not_multiply_stays_as_it_is():
    """P48: independent decay (u-muP, Loshchilov & Hutter's own), rescaled by m as torch's would have to be."""

    class Independent(torch.optim.Optimizer):
        def __init__(self, groups):
            super().__init__([{k: g[k] for k in ("params", "lr", "weight_decay")} for g in groups], {})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for W in group["params"]:
                    if W.grad is not None:
                        W.mul_(1 - group["weight_decay"]).sub_(W.grad.sign(), alpha=group["lr"])

    found = lint(nano("table 3", optimizer=Independent, decay=1e-3), TOKENS, (32, 64, 128)).faults
    assert {(f.kind, f.factor) for f in found} == {("weight_decay", 1 / D)}
    assert {name for f in found for name in f.weights} == {*HIDDEN, "head.weight"}
    assert all("lr does not multiply it" in f.fix for f in found)
    constant = nano("table 3", optimizer=Independent, without=("hidden decay", "readout decay"), decay=1e-3)
    assert faults(constant) == set()


@pytest.mark.parametrize(
    ("table", "clip", "power"),
    [
        ("table 3", 1.0, 1 / 2),
        ("table 8", 1.0, 0),
        ("table 9", 1.0, 0),
        ("table 8", lambda d: BASE / d, 1),
        ("table 3", lambda d: d**0.5, 0),
    ],
)
def test_a_constant_clipping_threshold_needs_a_gauge_of_constant_gradients(table, clip, power):
    """P46, D2: in table 3 the readout's gradient grows like √d."""
    report = lint(nano(table), TOKENS, (32, 64, 128), clip=clip)
    if not power:
        assert report.findings == ()
        return
    (finding,) = report.findings
    assert finding.factor == D ** sympy.Rational(str(power))
    assert finding.severity == "warning"
    assert ("head.weight" in finding.weights) == (table == "table 3")


def whole(make):
    def build(d):
        model = make(d)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    return build


@pytest.mark.parametrize(("make", "depth"), [(models.gpt2, "transformer.h.0."), (models.llama, "model.layers.0.")])
def test_a_hugging_face_model_is_told_that_initializer_range_ignores_width(make, depth):
    """P51: σ = 0.02 at every width; embeddings and gains are right as they are."""
    found = faults(whole(make), models.ids())
    hidden = {name for name, W in make(32).named_parameters() if W.ndim == 2 and name.startswith(depth)}
    for kind, factor in (("init", 1 / ROOT), ("lr", 1 / D)):
        assert {n: f for n, f in of(found, kind).items() if n.startswith(depth)} == dict.fromkeys(hidden, factor)
    (readout,) = [(names, factor) for kind, names, factor in found if kind == "multiplier"]
    assert readout == (("transformer.wte.weight",) if make is models.gpt2 else ("lm_head.weight",), 1 / D)
    assert {kind for kind, *_ in found} == {"init", "lr", "multiplier"}


@pytest.mark.parametrize("init", [nn.init.orthogonal_, nn.init.eye_, nn.init.zeros_, nn.init.ones_], ids=lambda f: f.__name__)
def test_orthogonal_identity_and_zero_matrices_are_right_and_constant_ones_are_not(init):
    def build(d):
        model, optimizer = nano()(d)
        for block in model.h:
            init(block.attn.out.weight)
            with torch.no_grad():
                block.attn.out.weight.mul_(d**-0.5 if init is nn.init.ones_ else 1)
        return model, optimizer

    assert {k for k, *_ in faults(build)} == ({"mean"} if init is nn.init.ones_ else set())


def test_frozen_weights_and_buffers_are_no_matter_of_lint():
    def build(d):
        model, optimizer = nano()(d)
        model.wpe.weight.requires_grad_(False)
        model.register_buffer("steps", torch.zeros(d))
        return model, optimizer

    assert faults(build) == set()


def test_lr_scale_as_in_nanogpt_mup_counts_as_the_training_loop_counts_it():
    def build(right):
        def built(d):
            model, optimizer = nano()(d)
            groups = [
                {"params": g["params"], "weight_decay": 0.0, "lr_scale": g["lr"] / 1e-3 if right else 1.0} for g in optimizer.param_groups
            ]
            return model, torch.optim.AdamW(groups, lr=1e-3, eps=1e-12)

        return built

    assert faults(build(right=True)) == set()
    assert of(faults(build(right=False)), "lr") == dict.fromkeys(HIDDEN, 1 / D)


def test_a_weight_whose_lr_is_zero_is_a_warning():
    def build(d):
        model, optimizer = nano()(d)
        optimizer.param_groups[0]["lr"] = 0.0
        return model, optimizer

    found = {(f.kind, f.severity, f.weight, f.found) for f in lint(build, TOKENS, (32, 64)).findings}
    assert found == {("lr", "warning", name, "0") for name in EMBEDDINGS}


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


class MupShared(nn.Module):
    def __init__(self, d, readout=mup.MuReadout):
        super().__init__()
        self.wte, self.block = nn.Embedding(VOCAB, d), Block(d, 4, 4 / d)
        self.head = mup.MuSharedReadout(self.wte.weight, bias=False)

    def forward(self, idx):
        return self.head(self.block(self.wte(idx)))


def test_mups_shared_readout_passes_once_its_init_is_made_again():
    """set_base_shapes multiplies the shared embedding by √m (microsoft/mup#55), which is found."""

    def build(d):
        model, optimizer = with_mup(MupShared, mup.MuAdamW, weight_decay=0.1)(d)
        mup.init.normal_(model.wte.weight, std=0.5)
        return model, optimizer

    assert faults(build, seeds=(0, 1, 2)) == set()
    ((kind, weights, factor),) = faults(with_mup(MupShared, mup.MuAdamW, weight_decay=0.1))
    assert (kind, weights, factor) == ("init", ("wte.weight",), 1 / ROOT)


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


class UnitBlock(nn.Module):
    """u-muP: unit init, and 1/√fan_in on what every map gives; `apart` has q, k and v as three maps."""

    def __init__(self, d, heads, apart, scale):
        super().__init__()
        names = ("q", "k", "v") if apart else ("qkv",)
        self.maps = nn.ModuleDict({name: nn.Linear(d, d * (3 // len(names)), bias=False) for name in names})
        self.out, self.up, self.down = nn.Linear(d, d, bias=False), nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)
        self.heads, self.scale = heads, scale

    def scaled(self, layer, x):
        return layer(x) * layer.weight.shape[1] ** -0.5

    def forward(self, x):
        y = F.rms_norm(x, x.shape[-1:])
        parts = [self.scaled(layer, y) for layer in self.maps.values()]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (parts if len(parts) == 3 else parts[0].chunk(3, -1)))
        y = F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** self.scale)
        x = x + self.scaled(self.out, y.transpose(1, 2).flatten(-2))
        return x + self.scaled(self.down, F.silu(self.scaled(self.up, F.rms_norm(x, x.shape[-1:]))))


class UnitGPT(nn.Module):
    def __init__(self, d, heads, apart, scale=-1, readout=-1):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, d)
        self.h = nn.ModuleList(UnitBlock(d, heads, apart, scale) for _ in range(2))
        self.head = nn.Linear(d, VOCAB, bias=False)
        self.readout = d**readout
        for weight in self.parameters():
            nn.init.normal_(weight)

    def forward(self, idx):
        x = self.wte(idx)
        for block in self.h:
            x = block(x)
        return self.head(x) * self.readout


def unit(*, heads=lambda d: 4, apart=False, **broken):
    def build(d):
        model = UnitGPT(d, heads(d), apart, **broken)
        rates = {"wte": d**-0.5, "head": 1.0}
        groups = [{"params": [w], "lr": rates.get(n.split(".")[0], w.shape[1] ** -0.5)} for n, w in model.named_parameters()]
        return model, torch.optim.AdamW(groups, weight_decay=0)

    return build


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("heads", [lambda d: 4, lambda d: d // 16], ids=["heads fixed", "heads grow"])
def test_a_u_mup_gpt_passes(heads, apart):
    """The factors 1/√fan_in after q, k and v are those maps' own: q·k has its 1/dim already."""
    assert faults(unit(heads=heads, apart=apart)) == set()


@pytest.mark.parametrize("apart", [False, True])
def test_a_u_mup_gpt_with_one_factor_wrong_has_that_finding(apart):
    assert faults(unit(apart=apart, readout=-0.5)) == {("multiplier", ("head.weight",), 1 / ROOT)}
    found = faults(unit(apart=apart, scale=-0.5))
    assert {(kind, factor) for kind, _, factor in found} == {("attention", 1 / ROOT)}


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
@pytest.mark.parametrize(("make", "args"), [(models.CNN, None), (lambda d: models.GPT(d, heads=4), models.ids())])
def test_what_this_project_compiles_passes(make, args, optimizer):
    """Attention's 1/√d stays in the model: q's init and learning rate carry the rest, block by block."""
    table = derive(make, args, widths=(64, 128, 256))

    def build(d):
        return compiler.compile(make(d), table, optimizer=optimizer, lr=0.01, weight_decay=0.1)

    assert faults(build, args) == set()


# --- laws ---------------------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """One weight of every role: embedding, input and hidden maps, gain, readout; 7 classes, fewer than any width."""

    def __init__(self, d):
        super().__init__()
        self.wte, self.stem = nn.Embedding(7, d), nn.Linear(3, d, bias=False)
        self.norm, self.hidden = nn.LayerNorm(d, bias=False), nn.Linear(d, 2 * d, bias=False)
        self.head = nn.Linear(2 * d, 7, bias=False)

    def forward(self, idx, x):
        return self.head(torch.tanh(self.hidden(self.norm(self.wte(idx) + self.stem(x)))))


SMALL = (torch.arange(6).reshape(2, 3), torch.zeros(2, 3, 3))
SMALL_TABLE = derive(Small, SMALL, widths=(32, 64, 128))
NAMES = [rule.name for rule in SMALL_TABLE]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("gauge", ["table3", "table8", "table9", "u-mup"])
def test_what_compile_makes_of_any_gauge_for_any_optimizer_passes(gauge, optimizer):
    table = SMALL_TABLE.gauge(gauge)

    def build(d):
        return compiler.compile(Small(d), table, optimizer=optimizer, lr=0.01, weight_decay=0.1, eps=1e-3)

    assert lint(build, SMALL, (32, 64, 128)).findings == ()


FACTORS = {
    "adam": lambda groups: torch.optim.AdamW(groups),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    gauge=st.sampled_from(["table3", "table8", "table9"]),
    family=st.sampled_from(sorted(FACTORS)),
    name=st.sampled_from(NAMES),
    quantity=st.sampled_from(["init", "lr", "weight_decay", "eps"]),
    power=st.sampled_from([-1, -0.5, 0.5, 1]),
)
def test_one_factor_of_one_weight_that_is_off_by_a_power_of_d_is_the_one_finding(gauge, family, name, quantity, power):
    if (quantity == "eps" and family == "sgd") or (quantity == "init" and name == "norm.weight"):
        return
    table = SMALL_TABLE.gauge(gauge)

    def build(d):
        model = compiler.init_(Small(d), table)
        groups = compiler.param_groups(model, table, family, lr=0.01, weight_decay=0.1, eps=1e-2 if quantity == "eps" else 1e-12)
        split = [
            {**group, "params": [W], "param_names": [n]}
            for group in groups
            for n, W in zip(group["param_names"], group["params"], strict=True)
        ]
        (own,) = [group for group in split if group["param_names"] == [name]]
        if quantity == "init":
            with torch.no_grad():
                own["params"][0].mul_((d / 32) ** power)
        else:
            own[quantity] *= (d / 32) ** power
            if quantity == "lr":
                own["weight_decay"] /= (d / 32) ** power
        for group in split:
            group.pop("param_names")
        return model, FACTORS[family](split)

    found = {(f.kind, f.weights, f.factor) for f in lint(build, SMALL, (32, 64, 128), seeds=(0, 1, 2)).faults}
    # a wrong embedding lr of 1/√d is u-muP's choice, a note
    chosen = quantity == "lr" and name == "wte.weight" and power == -0.5 and family == "adam"
    factor = D ** -sympy.Rational(str(power))
    if quantity == "lr":  # lr·weight_decay is as it was, and follows the lr once that is mended: a note
        assert found == (set() if chosen else {("lr", (name,), factor)})
    else:
        assert found == {(quantity, (name,), factor)}


# --- wrong use ----------------------------------------------------------------------------------------------------------------------


LATER = {}


def cached(d):
    return LATER.setdefault(d, nano()(d))


def remade(d):
    return nano()(d)[0], nano()(d)[1]


def deeper(d):
    model, optimizer = nano()(d)
    model.more = nn.ModuleList(nn.Linear(d, d) for _ in range(d // 32))
    return model, optimizer


def on_meta(d):
    with torch.device("meta"):
        model = models.MLP(d)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def raises(d):
    class Broken(models.MLP):
        def forward(self, x):
            raise ValueError("not today")

    model = Broken(d)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


REFUSED = {
    "a model alone": (models.MLP, (32, 64), CannotMeasure, r"returned a MLP, not a pair \(model, optimizer\)"),
    "three things": (lambda d: (*nano()(d), None), (32, 64), CannotMeasure, r"returned \(NanoGPT, AdamW, NoneType\), not a pair"),
    "the other way round": (lambda d: nano()(d)[::-1], (32, 64), CannotMeasure, r"returned \(AdamW, NanoGPT\)"),
    "no optimizer": (lambda d: (models.MLP(d), 3), (32, 64), CannotMeasure, "returned a int in place of an optimizer"),
    "one width": (nano(), (64, 64), CannotMeasure, "no two widths"),
    "a width that is ignored": (lambda d: nano()(64), (32, 64), CannotMeasure, "same shapes\n.*follow build's argument"),
    "the same model again": (cached, (32, 64), CannotMeasure, "the same model twice"),
    "an optimizer of another model": (remade, (32, 64), CannotMeasure, "none of the model's weights"),
    "depth that changes too": (deeper, (32, 64), CannotMeasure, r"different weights: more\.1"),
    "a model without values": (on_meta, (32, 64), CannotMeasure, "meta device"),
    "a model that cannot run": (raises, (32, 64), CaptureFailed, "not today"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_use_is_refused_with_what_to_do(case):
    build, widths, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        lint(build, TOKENS if case != "a model that cannot run" else torch.zeros(2, 16), widths)


def test_the_order_of_widths_does_not_matter():
    one, two = (lint(nano(without={"hidden lr"}), TOKENS, widths) for widths in ((32, 64, 128), (128, 32, 64, 64)))
    assert one.findings == two.findings


def test_no_training_happens_and_what_build_returned_stays_as_it_was():
    kept = []

    def build(d):
        kept.append(nano()(d))
        return kept[-1]

    lint(build, TOKENS, (32, 64))
    for model, optimizer in kept:
        width = model.wte.embedding_dim
        with torch.random.fork_rng():
            torch.manual_seed(0 if model in (kept[0][0], kept[2][0]) else 1)
            fresh, _ = nano()(width)
        torch.testing.assert_close(model.state_dict(), fresh.state_dict(), rtol=0, atol=0)
        assert all(W.grad is None for W in model.parameters())
        assert not optimizer.state
