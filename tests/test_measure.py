"""Measurements against what is known: THEORY 6.1 and 6.3, hand-written parametrizations, functions with a known optimum."""

import json
import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

from scaling import maps, measure, plots
from scaling.errors import CannotMeasure, MissingExtra
from scaling.limits import WIDTH
from scaling.measure import Assumptions, CoordinateCheck, LearningRateSweep, Series, assumptions, coordinate_check, learning_rate_sweep
from scaling.records import Block, Coverage, Factor, ScalingTable, Source, Use, WeightRule
from scaling.trend import trend

WIDTHS = (64, 128, 256, 512)


def mlp(width):
    return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def standard(optimizer, lr):
    def build(width):
        model = mlp(width)
        return model, optimizer(model.parameters(), lr=lr)

    return build


def table3(optimizer, lr, base=64):
    """TP5 table 3, written by hand: variance 1/fan_in (output 1/fan_in²), Adam (1, 1/n, 1/n), SGD (n, 1, 1/n); input and biases first."""

    def build(width):
        model = mlp(width)
        first, hidden, last = model[0], model[2], model[4]
        r = width / base
        nn.init.normal_(first.weight, std=16**-0.5)
        nn.init.normal_(hidden.weight, std=width**-0.5)
        nn.init.normal_(last.weight, std=base**0.5 / width)
        for layer in (first, hidden, last):
            nn.init.zeros_(layer.bias)
        scales = (1, 1 / r, 1 / r) if optimizer is torch.optim.Adam else (r, 1, 1 / r)
        groups = [
            {"params": params, "lr": lr * scale}
            for params, scale in zip(([first.weight, first.bias, hidden.bias], [hidden.weight], [last.weight]), scales, strict=True)
        ]
        return model, optimizer([*groups, {"params": [last.bias], "lr": lr}], lr=lr)

    return build


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(64, 16, generator=generator), torch.randint(10, (64,), generator=generator))]


@pytest.fixture(scope="module")
def default_adam(data):
    return coordinate_check(standard(torch.optim.Adam, 0.01), data, WIDTHS, seeds=(0, 1))


@pytest.fixture(scope="module")
def mup_adam(data):
    return coordinate_check(table3(torch.optim.Adam, 0.01), data, WIDTHS, seeds=(0, 1))


def rule(name, shape, *axes):
    """The rule of a weight with one block: per axis a list of (size, part)."""
    factors = tuple(tuple(Factor(size=size, part=part, start=0, stop=size) for size, part in axis) for axis in axes)

    def product(*parts):
        return sympy.Mul(*(factor.extent for axis in factors for factor in axis if factor.part in parts))

    lookup = any(factor.part == "lookup" for axis in factors for factor in axis)
    fans = {"fan_in": product("in"), "fan_out": product("out"), "copies": product("copy"), "lookup": lookup}
    use = Use(operator="aten.linear", source=Source(file="", line=0, code="", module=""), **fans)
    dims = tuple(sympy.Mul(*(factor.size for factor in axis)) for axis in factors)
    return WeightRule(names=(name,), shape=shape, dims=dims, uses=(use,), blocks=(Block(axes=factors, **fans),))


def table_of(*rules, size):
    return ScalingTable(size=size, rules=rules, coverage=Coverage(trainable=len(rules), reached=len(rules)))


# coordinate check


def test_the_default_parametrization_fails_under_adam(default_adam):
    assert not default_adam.passed
    assert default_adam.slopes["2"][1] > 0.7, "THEORY 6.1: +0.89"
    assert default_adam.slopes["4"][1] > 0.9, "THEORY 6.1: +1.14"
    assert {"2", "4"} <= {series.name for series in default_adam.failures}


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.Adam, 0.01), (torch.optim.SGD, 0.5)])
def test_table_3_passes(optimizer, lr, data):
    check = coordinate_check(table3(optimizer, lr), data, WIDTHS, seeds=(0, 1))
    assert check.passed, str(check)
    assert all(abs(by_step[step]) < 0.1 for by_step in check.slopes.values() for step in (1, 5)), str(check)


def test_logits_of_table_3_start_small_and_that_is_no_failure(mup_adam):
    assert mup_adam.slopes["4"][0] == pytest.approx(-0.5, abs=0.1), "THEORY 6.1: -0.47"
    assert mup_adam.predicted["4"] == {0: None, 1: 0.0, 5: 0.0}
    assert mup_adam.passed


def test_sgd_under_the_default_parametrization_has_the_slopes_of_theory(data):
    check = coordinate_check(standard(torch.optim.SGD, 0.5), data, (*WIDTHS, 1024), steps=(1,), seeds=(0, 1, 2))
    expected = {"0": -0.48, "2": 0.41, "4": 0.93}
    assert {name: check.slopes[name][1] for name in expected} == pytest.approx(expected, abs=0.12)


def test_a_weight_that_does_not_move_yet_is_no_failure(data):
    def build(width):
        model, optimizer = table3(torch.optim.Adam, 0.01)(width)
        nn.init.zeros_(model[4].weight)
        return model, optimizer

    check = coordinate_check(build, data, WIDTHS, steps=(1, 5), seeds=(0,))
    assert check.slopes["0"][1] is None
    assert abs(check.slopes["0"][5]) < 0.15
    assert check.passed, str(check)


def test_a_check_in_which_nothing_moves_does_not_pass(data):
    check = coordinate_check(standard(torch.optim.SGD, 0.0), data, (8, 16), seeds=(0,))
    assert not check.passed
    assert "nothing was checked" in str(check)


def test_a_model_that_diverges_at_one_width_fails(data):
    def build(width):
        model = mlp(width)
        return model, torch.optim.SGD(model.parameters(), lr=math.inf if width == 16 else 0.1)

    check = coordinate_check(build, data, (8, 16, 32), steps=(1,), seeds=(0,))
    assert math.isnan(check.slopes["4"][1])
    assert not check.passed
    again = CoordinateCheck.from_json(check.to_json())
    assert math.isnan(again.slopes["4"][1])


def test_the_same_seeds_give_the_same_numbers_and_leave_the_callers_alone(data):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    checks = [coordinate_check(standard(torch.optim.Adam, 0.01), data, (8, 16), seeds=(3,)) for _ in range(2)]
    assert checks[0] == checks[1]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_measuring_does_not_change_the_training(data):
    """Weights after 3 steps are those of a plain loop, dropout's random numbers and BatchNorm's statistics included."""
    built = {}

    def build(width):
        model = nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 10))
        built[width] = model
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    coordinate_check(build, data, (8, 16), steps=(1, 2, 3), seeds=(5,))
    torch.manual_seed(5)
    measured = built[8]
    plain, optimizer = build(8)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(data[0][0]), data[0][1]).backward()
        optimizer.step()
    for (name, a), (_, b) in zip(measured.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not any(module._forward_hooks for module in measured.modules())


def test_dropout_masks_are_not_taken_for_changes(data):
    def build(width):
        model = nn.Sequential(nn.Linear(16, width), nn.Dropout(0.5), nn.Linear(width, 10))
        return model, torch.optim.SGD(model.parameters(), lr=0.0)

    check = coordinate_check(build, data, (8, 16), steps=(1,), seeds=(0,))
    assert all(series.values == (0.0, 0.0) for series in check.series if series.quantity == "change")


def test_every_call_and_every_tensor_of_an_output_is_kept_apart(data):
    class Twice(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inner, self.act, self.outer = nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 10)

        def forward(self, x):
            y = self.outer(self.act(self.act(self.inner(x))))
            return {"logits": y, "extra": (y.sum(), [y[:, :2], y.argmax(-1)])}

    def build(width):
        model = Twice(width)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    check = coordinate_check(
        build, data, (8, 16), steps=(1,), seeds=(0,), loss=lambda model, batch: F.cross_entropy(model(batch[0])["logits"], batch[1])
    )
    assert list(check.slopes) == ["inner", "act", "act call 2", "outer", "(model)[logits]", "(model)[extra][1][0]"]


def test_in_place_activations_do_not_overwrite_what_was_recorded(data):
    def checked(inplace):
        def build(width):
            model = nn.Sequential(nn.Linear(16, width), nn.ReLU(inplace=inplace), nn.Linear(width, 10))
            return model, torch.optim.SGD(model.parameters(), lr=0.1)

        return coordinate_check(build, data, (8, 16), steps=(1,), seeds=(0,))

    assert checked(inplace=True) == checked(inplace=False)


def test_tensors_that_not_every_width_has_are_named(data):
    class Heads(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(16, 10) for _ in range(width // 8))

        def forward(self, x):
            return sum(head(x) for head in self.heads)

    def build(width):
        model = Heads(width)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    check = coordinate_check(build, data, (8, 16), steps=(1,), seeds=(0,))
    assert set(check.skipped) == {"heads.1", "heads.1.weight", "heads.1.bias"}
    assert "left out" in str(check)
    assert "heads.1.weight" in str(check)


def test_norms_are_those_of_each_map_of_the_table():
    """A gain, a lookup, stacked experts and an (in, out) matrix, each against the norm written out by hand."""
    d = WIDTH
    table = table_of(
        rule("gain", (8,), [(d, "copy")]),
        rule("embed", (5, 8), [(5, "lookup")], [(d, "out")]),
        rule("experts", (3, 8, 8), [(3, "copy")], [(d, "out")], [(d, "in")]),
        rule("conv1d", (8, 10), [(d, "in")], [(10, "out")]),
        size=8,
    )

    class Odd(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(width))
            self.embed = nn.Parameter(torch.randn(5, width))
            self.experts = nn.Parameter(torch.randn(3, width, width))
            self.conv1d = nn.Parameter(torch.randn(width, 10))

        def forward(self, tokens):
            x = self.embed[tokens] * self.gain
            return torch.einsum("eoi,bi->bo", self.experts, x) @ self.conv1d

    models = {}

    def build(width):
        models[width] = Odd(width)
        start[width] = {name: weight.detach().clone() for name, weight in models[width].named_parameters()}
        return models[width], torch.optim.SGD(models[width].parameters(), lr=1e-3)

    start = {}
    batch = (torch.arange(5), torch.arange(5))
    check = coordinate_check(build, [batch], (8, 16), steps=(1,), seeds=(0,), table=table)
    by_hand = {
        "gain": lambda w: w.abs().max(),
        "embed": lambda w: w.norm(dim=1).max(),
        "experts": lambda w: max(torch.linalg.matrix_norm(expert, 2) for expert in w),
        "conv1d": lambda w: torch.linalg.matrix_norm(w, 2),
    }
    measured = check.select("weight", "update")
    for name, norm in by_hand.items():
        assert measured[name][0].values == pytest.approx([float(norm(start[width][name])) for width in (8, 16)], rel=1e-5), name
        moved = [float(norm(getattr(models[width], name).detach() - start[width][name])) for width in (8, 16)]
        assert measured[name][1].values == pytest.approx(moved, rel=1e-5), name
    assert {name: measured[name][0].predicted for name in by_hand} == {"gain": 0, "embed": 0.5, "experts": 0, "conv1d": -0.5}


def test_fused_blocks_have_norms_of_their_own():
    def part(start, stop):
        axes = ((Factor(size=3 * WIDTH, part="out", start=start, stop=stop),), (Factor(size=WIDTH, part="in", start=0, stop=WIDTH),))
        return Block(axes=axes, fan_in=WIDTH, fan_out=WIDTH, copies=1)

    weight = nn.Linear(8, 24, bias=False)
    blocks = tuple(part(i * WIDTH, (i + 1) * WIDTH) for i in range(3))
    fused = WeightRule(names=("weight",), shape=(24, 8), dims=(3 * WIDTH, WIDTH), uses=(), blocks=blocks)
    weights = maps.WeightMaps(weight, table_of(fused, size=8))
    norms = dict(weights.norms(weights.values()))
    expected = {f"weight block {i}": float(torch.linalg.matrix_norm(chunk, 2)) for i, chunk in enumerate(weight.weight.detach().chunk(3))}
    assert norms == pytest.approx(expected)


def test_a_map_has_its_fans_where_the_table_says_and_not_where_the_shape_does():
    conv1d, conv = (
        rule("conv1d", (8, 10), [(WIDTH, "in")], [(10, "out")]),
        rule("conv", (8, 4, 3), [(WIDTH, "out")], [(4, "in")], [(3, "in")]),
    )
    model = nn.ParameterDict({"conv1d": nn.Parameter(torch.randn(8, 10)), "conv": nn.Parameter(torch.randn(8, 4, 3))})
    weights = maps.WeightMaps(model, table_of(conv1d, conv, size=8))
    found = dict(weights.maps(weights.values()))
    assert torch.equal(found["conv1d"][0], model["conv1d"].T)
    assert torch.equal(found["conv"][0], model["conv"].flatten(1))
    assert maps.predicted_norms(table_of(conv1d, conv, size=8)) == {"conv1d": -0.5, "conv": 0.5}


def test_norms_of_table_3_follow_the_spectral_condition(mup_adam):
    slopes = mup_adam.norm_slopes
    assert slopes["2.weight"] == pytest.approx({0: 0, 1: 0, 5: 0}, abs=0.1)
    assert slopes["4.weight"] == pytest.approx({0: -0.5, 1: -0.5, 5: -0.5}, abs=0.15)
    assert slopes["0.weight"] == pytest.approx({0: 0.5, 1: 0.5, 5: 0.5}, abs=0.15)


# a module's own part of a change


class Wrapped(nn.Module):
    """Weights in every form: a matrix, a gain whose module has in-place and random parts, a module with weights of its own and inside."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(16, width)
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.5, batch_first=True)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(width, 10))

    def forward(self, x):
        x = self.first(x)[:, None].expand(-1, 3, -1)
        x = self.rnn(x)[0]
        x = x + self.attention(x, x, x)[0]
        return self.last(self.norm(x.mean(1)))


def test_own_and_inherited_parts_are_those_of_the_initial_weights_on_the_same_input(data):
    """(W - W₀)x + (b - b₀) and W₀(x - x₀), written out for the last layer of two."""
    models, starts = {}, {}

    def build(width):
        models[width] = mlp(width)
        starts[width] = {name: weight.detach().clone() for name, weight in models[width].named_parameters()}
        return models[width], torch.optim.SGD(models[width].parameters(), lr=0.1)

    check = coordinate_check(build, data, (8, 16), steps=(3,), seeds=(0,))
    own, inherited = ({s.name: s.values for s in check.series if s.quantity == quantity} for quantity in ("own", "inherited"))
    assert list(own) == [f"{name} by {part}" for name in "024" for part in ("weight", "bias")]
    assert list(inherited) == ["0", "2", "4"]
    assert inherited["0"] == (0, 0), "the data does not change"
    for i, width in enumerate((8, 16)):
        start, model = starts[width], models[width]
        with torch.no_grad():
            x = model[:4](data[0][0])
            before = torch.func.functional_call(model[:4], {n: start[n] for n, _ in model[:4].named_parameters()}, data[0][0])
            moved = F.linear(x, model[4].weight - start["4.weight"])
            shifted = model[4].bias - start["4.bias"]
            passed_on = F.linear(x - before, start["4.weight"])
        for found, expected in ((own["4 by weight"], moved), (own["4 by bias"], shifted), (inherited["4"], passed_on)):
            assert found[i] == pytest.approx(float(expected.square().mean().sqrt()), rel=1e-4)


def test_a_falling_weight_is_seen_beside_a_bias_that_does_not_fall(few):
    """Their sum is flat: the classical check, without a table, does not see the wrong rule; by the norm of the weight it is seen."""
    build = off(table3(torch.optim.Adam, 0.02), 4, lr=-1)
    assert coordinate_check(build, few, WIDTHS).passed
    check = coordinate_check(build, few, WIDTHS, table=mlp_table())
    assert {series.name for series in check.missed} == {"4.weight"}
    assert check.own_slopes["4 by weight"][5] == pytest.approx(-1, abs=0.2)
    assert abs(check.own_slopes["4 by bias"][5]) < 0.2
    assert "by their weights, in the order of the model\n  ΔW·x of 4 by weight, step 1: slope -" in check.verdict


def test_a_replay_leaves_weights_buffers_and_random_numbers_as_they_were(data):
    built = {}

    def build(width):
        built[width] = Wrapped(width)
        return built[width], torch.optim.SGD(built[width].parameters(), lr=0.1)

    check = coordinate_check(build, data, (8, 16), steps=(1, 2, 3), seeds=(5,))
    names = {series.name for series in check.series if series.quantity == "own"}
    assert {name for name in names if "attention[0]" in name} == {
        f"attention[0] by {part}" for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    assert {name for name in names if name.startswith("last")} == {
        f"last by {part}" for part in ("bias", "parametrizations.weight.original0", "parametrizations.weight.original1")
    }
    assert {"rnn[0] by weight_hh_l0", "rnn[1][0] by bias_ih_l0", "norm by weight"} <= names
    torch.manual_seed(5)
    measured = built[8]
    plain, optimizer = build(8)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(data[0][0]), data[0][1]).backward()
        optimizer.step()
    for (name, a), (_, b) in zip(measured.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not any(module._forward_pre_hooks for module in measured.modules())


def test_a_module_whose_weights_do_not_move_has_no_own_part(data):
    """Random parts of a replay are those of the run: dropout inside the module is not taken for a change."""

    def build(width):
        model = Wrapped(width)
        still = {*model.rnn.parameters(), *model.attention.parameters()}
        return model, torch.optim.SGD([p for p in model.parameters() if p not in still], lr=0.1)

    check = coordinate_check(build, data, (8, 16), steps=(2,), seeds=(0,))
    own = {series.name: series for series in check.series if series.quantity == "own"}
    assert own["attention[0] by in_proj_weight"].values == own["rnn[0] by weight_hh_l0"].values == (0, 0)
    assert all(value > 0 for value in own["first by weight"].values)


def test_modules_that_are_given_a_cache_are_not_run_twice(data):
    class Cache:
        def __init__(self):
            self.seen = 0

    class Cached(nn.Linear):
        def forward(self, x, cache):
            cache.seen += 1
            return super().forward(x) * cache.seen

    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first, self.last = Cached(16, width), nn.Linear(width, 10)

        def forward(self, x):
            return self.last(self.first(x, Cache()))

    def build(width):
        model = Model(width)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    check = coordinate_check(build, data, (8, 16), steps=(1,), seeds=(0,))
    assert {series.name for series in check.series if series.quantity == "own"} == {"last by weight", "last by bias"}


# the verdict


def off(build, which, *, lr=0.0, init=0.0, base=64):
    """A parametrization with the learning rate or the init of one layer wrong by a power of the width."""

    def built(width):
        model, optimizer = build(width)
        weight, factor = model[which].weight, width / base
        with torch.no_grad():
            weight.mul_(factor**init)
        groups = []
        for group in optimizer.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            mine = [p for p in group["params"] if p is weight]
            groups += [{**options, "params": [p for p in group["params"] if p is not weight]}]
            groups += [{**options, "lr": group["lr"] * factor**lr, "params": mine}] if mine else []
        return model, type(optimizer)(groups)

    return built


def mlp_table():
    d = WIDTH
    return table_of(
        rule("0.weight", (8, 16), [(d, "out")], [(16, "in")]),
        rule("2.weight", (8, 8), [(d, "out")], [(d, "in")]),
        rule("4.weight", (10, 8), [(10, "out")], [(d, "in")]),
        size=8,
    )


@pytest.mark.parametrize("which", [0, 2, 4])
@pytest.mark.parametrize("power", [1.0, 0.5, -0.5, -1.0])
def test_a_learning_rate_wrong_by_a_power_of_the_width_fails_and_the_first_failure_names_the_weight(which, power, few):
    check = coordinate_check(off(table3(torch.optim.Adam, 0.02), which, lr=power), few, WIDTHS[:3], table=mlp_table())
    assert check.outcome == "failed"
    first = check.failures[0]
    assert (first.name, first.quantity in {"update", "frobenius"}) == (f"{which}.weight", True), check.verdict
    assert first.exponent - first.predicted == pytest.approx(power, abs=0.15)


@pytest.mark.parametrize("which", [0, 2, 4])
@pytest.mark.parametrize("power", [0.5, -0.5])
def test_an_init_wrong_by_a_root_of_the_width_fails_by_the_norm_of_the_weight(which, power, few):
    check = coordinate_check(off(table3(torch.optim.Adam, 0.02), which, init=power), few, WIDTHS[:3], seeds=(0, 1), table=mlp_table())
    [norm] = [series for series in check.failures if series.step == 0]
    assert norm.name == f"{which}.weight"
    assert norm.exponent - norm.predicted == pytest.approx(power, abs=0.05)


@pytest.fixture(scope="module")
def few(data):
    """Eight examples: gradients of a rank far below every width."""
    x, target = data[0]
    return [(x[:8], target[:8])]


@pytest.mark.parametrize("seeds", [(0, 1, 2), (3, 4, 5), (6, 7, 8)])
def test_the_right_rules_pass_under_the_same_setting(seeds, few):
    check = coordinate_check(table3(torch.optim.Adam, 0.02), few, WIDTHS, seeds=seeds, table=mlp_table())
    assert check.passed, str(check)


SMALL = [((64, 128, 256), (0,)), ((64, 256), (0,)), ((64, 128), (0, 1, 2))]
"""What one tries first: few widths, one seed."""


@pytest.mark.parametrize(("widths", "seeds"), SMALL)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_right_rules_pass_and_the_default_ones_do_not_however_small_the_check(widths, seeds, optimizer, data):
    rate = 0.01 if optimizer is torch.optim.Adam else 0.3
    for table in (None, mlp_table()):
        right = coordinate_check(table3(optimizer, rate), data, widths, seeds=seeds, table=table)
        assert right.passed, str(right)
        assert not coordinate_check(standard(optimizer, rate), data, widths, seeds=seeds, table=table).passed


@pytest.mark.parametrize("which", [0, 2, 4])
@pytest.mark.parametrize("power", [1.0, 0.5, -0.5, -1.0])
def test_one_seed_and_two_widths_find_a_wrong_learning_rate_by_the_table(which, power, few):
    check = coordinate_check(off(table3(torch.optim.Adam, 0.02), which, lr=power), few, (64, 256), seeds=(0,), table=mlp_table())
    assert f"{which}.weight" in {series.name for series in check.missed}
    assert not check.passed
    assert "though not excluded: take more seeds or larger widths" in check.verdict


def test_one_run_at_two_widths_passes_by_its_best_estimates_and_says_how_sure_that_is(few):
    check = coordinate_check(table3(torch.optim.Adam, 0.02), few, (64, 256), seeds=(0,), table=mlp_table())
    assert check.passed
    assert check.outcome == "undecided"
    assert not check.failures
    assert "not with 95 % confidence, for which take more seeds or larger widths" in str(check)
    assert "✗" not in str(check)


def test_a_smaller_tolerance_asks_for_more(few):
    """0.15 is THEORY 6.1's, of plain slopes with several seeds."""
    check = coordinate_check(table3(torch.optim.Adam, 0.02), few, WIDTHS, tolerance=0.15)
    assert check.passed, str(check)
    slopes = [abs(by_step[step]) for by_step in check.slopes.values() for step in (1, 5)]
    assert not check.model_copy(update={"tolerance": min(slopes) / 2}).passed


def series_of(quantity, of, noise=0.0):
    samples = tuple(tuple(of(width) * (1 + noise * (seed - 1)) for seed in range(3)) for width in WIDTHS)
    found = trend(WIDTHS, samples, 0.0)
    values = tuple(sum(of_width) / 3 for of_width in samples)
    return Series(
        quantity=quantity, name="gate by weight" if quantity == "own" else "gate", step=5, values=values, samples=samples,
        slope=measure._fitted(WIDTHS, values), predicted=0.0, exponent=found.exponent, interval=(found.low, found.high),
    )  # fmt: skip


def checked(*series):
    return CoordinateCheck(widths=WIDTHS, steps=(0, 5), seeds=(0, 1, 2), series=series, environment=environment(), tolerance=0.25)


def test_a_change_that_falls_is_a_transient_if_most_of_it_is_an_own_part_that_does_not_fall():
    """A router: what it inherits dies out, what its weight learns stays."""
    change = series_of("change", lambda d: 0.3 + d**-0.5 * 22)
    flat, small = (series_of("own", lambda d, c=c: c, noise=0.02) for c in (1.0, 0.3))
    assert not checked(change).passed
    assert checked(change, flat).passed
    assert not checked(change, small).passed


def test_a_change_or_an_own_part_that_grows_is_no_transient_and_an_own_part_that_falls_is_no_failure():
    flat, falls, grows = (series_of("own", lambda d, p=p: d**p, noise=0.02) for p in (0, -0.5, 0.5))
    change = series_of("change", lambda d: 1.0, noise=0.02)
    for own in (flat, falls):
        assert checked(change, own).passed
    assert checked(change, grows).missed == (grows,)
    grown = series_of("change", lambda d: d**0.5, noise=0.02)
    assert checked(grown, flat).failures == (grown,)


def test_an_update_is_judged_by_the_norm_that_is_exact_and_an_init_by_that_of_gaussians():
    """Adam's ‖·‖_F and msign's ‖·‖₂ are exact, the others are off while the gradient's rank grows: here by 0.4."""
    change = series_of("change", lambda d: 1.0, noise=0.02)
    flat, falls, grows = (partial(series_of, of=lambda d, p=p: d**p, noise=0.02) for p in (0, -0.4, 0.4))
    assert checked(change, falls("update"), flat("frobenius")).passed
    assert checked(change, flat("update"), grows("frobenius")).passed
    assert checked(change, grows("update"), grows("frobenius")).missed == (grows("update"),)
    for norm, frobenius in ((grows, flat), (flat, grows)):
        at_init = [one(quantity).model_copy(update={"step": 0}) for one, quantity in ((norm, "weight"), (frobenius, "frobenius"))]
        assert checked(change, *at_init).passed == (frobenius is flat)


def test_a_change_within_rounding_at_one_width_is_not_decided_and_one_that_is_not_finite_fails():
    def checked_with(*values):
        series = series_of("change", lambda d: 1.0, noise=0.02)
        return checked(series.model_copy(update={"values": values, "slope": math.nan, "exponent": None, "interval": None}))

    assert (checked_with(1.0, 0.0, 1.0, 1.0).outcome, checked_with(1.0, 1.0, math.inf, 1.0).outcome) == ("undecided", "failed")
    assert not checked_with(1.0, 0.0, 1.0, 1.0).passed
    assert "take a larger learning rate" in str(checked_with(1.0, 0.0, 1.0, 1.0))


def test_frobenius_norms_are_of_matrices_and_of_a_gaussian_exact():
    table = table_of(
        rule("wide", (400, 25), [(WIDTH, "out")], [(25, "in")]),
        rule("stack", (3, 400, 400), [(3, "copy")], [(WIDTH, "out")], [(WIDTH, "in")]),
        rule("gain", (400,), [(WIDTH, "copy")]),
        size=400,
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (400, 25), "stack": (3, 400, 400), "gain": (400,)}
    model = nn.ParameterDict({name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()})
    weights = maps.WeightMaps(model, table)
    assert dict(weights.frobenius(weights.values())) == pytest.approx({"wide": 20, "stack": 20}, rel=0.02)
    assert dict(weights.frobenius(weights.values(), rank=1)) == pytest.approx({"wide": 100, "stack": 400}, rel=0.02)
    assert dict(weights.norms(weights.values()))["wide"] == pytest.approx(25, rel=0.05), "1 + √(25/400) as large"


# assumptions


def test_gradients_are_low_rank_and_their_signs_are_as_large_as_adams_row_says(data):
    found = assumptions(table3(torch.optim.Adam, 0.01), data, WIDTHS, seeds=(0, 1))
    weights = {"0.weight", "2.weight", "4.weight"}
    for quantity in ("rank", "sign", "gradient"):
        slopes = {(name, step): series.slope for name, by_step in found.select(quantity).items() for step, series in by_step.items()}
        assert {name for name, _ in slopes} == weights
        assert all(abs(slope) < 0.12 for slope in slopes.values()), (quantity, slopes)
    assert all(0.3 < value < 1 for by_step in found.select("sign").values() for series in by_step.values() for value in series.values)
    assert all(abs(series.slope) < 0.1 for series in found.select("progress")["loss"].values())


def test_the_default_parametrization_has_gradients_of_other_sizes(data):
    found = assumptions(standard(torch.optim.SGD, 0.1), data, WIDTHS, steps=(0,), seeds=(0, 1))
    assert found.select("gradient")["2.weight"][0].slope == pytest.approx(0.5, abs=0.1), "THEORY 6.1: 0.51"


def test_ratios_of_known_gradients():
    G = torch.zeros(1, 6, 4)
    G[0, 0, 0], G[0, 1, 1] = 2.0, 1.0
    assert maps.nuclear_ratio(G) == pytest.approx(1.5)
    assert maps.sign_ratio(torch.outer(torch.randn(6), torch.randn(4))[None]) == pytest.approx(1), "THEORY 6.3: the sign of rank one"
    assert maps.relative_norm(G) == pytest.approx(2 / math.sqrt(4 / 6))
    assert maps.nuclear_ratio(torch.zeros(1, 6, 4)) == 0
    assert math.isnan(maps.nuclear_ratio(G / 0))
    n = 256
    assert maps.sign_ratio(torch.randn(1, n, n)) == pytest.approx(2 / math.sqrt(n), rel=0.05), "THEORY 6.3: 0.123 at 256"


# learning-rate sweep


class Valley(nn.Module):
    """A loss that one step of SGD from 0 brings to its minimum at the learning rate `best`."""

    def __init__(self, best):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(()))
        self.best = best


def valley(model, _batch):
    return 0.5 / model.best * (model.x - 1) ** 2


def build_valley(width, lr):
    model = Valley(best=1 / width)
    return model, torch.optim.SGD(model.parameters(), lr=lr)


def test_the_sweep_finds_a_known_optimum():
    rates = [2.0**-k for k in range(8)]
    sweep = learning_rate_sweep(build_valley, [None], (4, 8, 16), rates, steps=2, loss=valley, last=1, progress=None)
    assert sweep.optima == {4: 1 / 4, 8: 1 / 8, 16: 1 / 16}
    assert sweep.drift == 2
    assert sweep.at_edge == ()
    assert "moves by 2 steps" in str(sweep)


def test_the_fitted_optimum_is_the_vertex_of_a_parabola_in_log_lr():
    best = 2.0**-3.3

    def run(lr):
        return measure.Run(width=1, learning_rate=lr, seed=0, loss=(math.log2(lr / best)) ** 2, seconds=0)

    sweep = LearningRateSweep(steps=1, runs=tuple(run(2.0**-k) for k in range(8)), environment=environment())
    assert sweep.optima == {1: 2.0**-3}
    assert sweep.fitted_optima == {1: pytest.approx(best)}


def environment():
    return measure.Environment.of(nn.Linear(1, 1))


def test_a_run_that_diverges_has_an_infinite_loss_and_survives_json():
    sweep = learning_rate_sweep(build_valley, [None], (4,), [1e30, 0.25], steps=20, loss=valley, progress=None)
    assert sweep.losses(4)[1e30] == math.inf
    assert sweep.optima == {4: 0.25}
    again = LearningRateSweep.from_json(sweep.to_json())
    assert again == sweep
    assert json.loads(sweep.to_json())["runs"][0]["loss"] == "Infinity"


def test_a_width_at_which_every_run_diverges_is_said():
    sweep = learning_rate_sweep(build_valley, [None], (4,), [1e30], steps=20, loss=valley, progress=None)
    assert sweep.optima == {}
    assert "every run diverged at width 4" in str(sweep)


def test_the_schedule_multiplies_every_groups_learning_rate():
    seen = []

    def build(width, lr):
        model, optimizer = build_valley(width, lr)
        optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
        return model, optimizer

    learning_rate_sweep(build, [None], (4,), [0.5], steps=4, loss=valley, schedule=lambda step: 1 - step / 4, progress=None)
    assert seen == [0.5, 0.375, 0.25, 0.125]


def test_progress_is_told_of_every_run(capsys):
    told = []
    learning_rate_sweep(build_valley, [None], (4, 8), [0.5], steps=1, loss=valley, progress=lambda *call: told.append(call[1:]))
    assert told == [(1, 2), (2, 2)]
    learning_rate_sweep(build_valley, [None], (4,), [0.5], steps=1, loss=valley)
    assert "[  1/1] width     4  lr    2^-1" in capsys.readouterr().err


def test_runs_are_the_same_for_the_same_seed(data):
    def build(width, lr):
        model = mlp(width)
        return model, torch.optim.Adam(model.parameters(), lr=lr)

    first, second = (learning_rate_sweep(build, data, (8,), [0.01], steps=3, seeds=(0, 1), progress=None) for _ in range(2))
    assert [run.loss for run in first.runs] == [run.loss for run in second.runs]
    assert first.runs[0].loss != first.runs[1].loss
    assert first.losses(8) == {0.01: pytest.approx(sum(run.loss for run in first.runs) / 2)}


# records, figures, errors


def test_json_brings_back_what_was_measured(mup_adam, data):
    assert CoordinateCheck.from_json(mup_adam.to_json()) == mup_adam
    found = assumptions(standard(torch.optim.SGD, 0.1), data, (8, 16), steps=(0,), seeds=(0,))
    assert Assumptions.from_json(found.to_json()) == found
    stated = json.loads(mup_adam.to_json())
    assert stated["environment"]["torch"] == torch.__version__
    assert stated["seeds"] == [0, 1]
    assert stated["widths"] == list(WIDTHS)


def test_the_table_shows_slopes_beside_predictions_and_the_verdict(default_adam, mup_adam):
    lines = str(default_adam).splitlines()
    assert lines[1].split() == ["predicted", "0", "or", "-1/2", "0", "0"]
    row = next(line for line in lines if line.startswith("4 "))
    assert row.split() == ["4", *(f"{default_adam.slopes['4'][step]:+.2f}" for step in (0, 1, 5)), "✗"]
    assert "failed" in str(default_adam)
    assert "passed" in str(mup_adam)
    assert "✗" not in str(mup_adam)


def test_assumptions_print_a_row_per_weight(data):
    text = str(assumptions(standard(torch.optim.SGD, 0.1), data, (8, 16), steps=(0,), seeds=(0,)))
    assert sum(line.strip().startswith("2.weight") for line in text.splitlines()) == 3
    assert "‖G‖_*/‖G‖₂" in text


def test_figures_are_written(tmp_path, default_adam, mup_adam):
    from matplotlib.image import imread

    sweep = learning_rate_sweep(build_valley, [None], (4, 8), [1.0, 0.5, 0.25, 1e30], steps=20, loss=valley, progress=None)
    default_adam.plot(tmp_path / "check.png")
    sweep.plot(tmp_path / "new" / "sweep.png")
    plots.coordinates({"default": default_adam, "table 3": mup_adam}, tmp_path / "both.png")
    plots.learning_rates({"a": sweep, "b": sweep, "c": sweep}, tmp_path / "three.png")
    for name in ("check.png", "new/sweep.png", "both.png", "three.png"):
        assert imread(tmp_path / name).std() > 0.05, name


def test_without_matplotlib_plotting_says_what_to_install(monkeypatch, tmp_path, mup_adam):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"plotting needs matplotlib, .*\n.*pip install 'spectral-mup\[plot\]'"):
        mup_adam.plot(tmp_path / "check.png")


def test_what_cannot_be_measured_is_said(data):
    build = standard(torch.optim.SGD, 0.1)
    with pytest.raises(CannotMeasure, match=r"widths=\[8\] has no two widths"):
        coordinate_check(build, data, (8,))
    with pytest.raises(CannotMeasure, match="batches is empty"):
        coordinate_check(build, [], (8, 16))
    with pytest.raises(CannotMeasure, match="steps asks for no update"):
        coordinate_check(build, data, (8, 16), steps=(0,))
    with pytest.raises(CannotMeasure, match="seeds is empty"):
        assumptions(build, data, (8, 16), seeds=())
    with pytest.raises(CannotMeasure, match=r"build\(8\) returned a Sequential, not a pair"):
        coordinate_check(mlp, data, (8, 16))
    with pytest.raises(CannotMeasure, match="not a pair of tensors"):
        coordinate_check(build, [data[0][0]], (8, 16))
    with pytest.raises(CannotMeasure, match=r"not \(64, 10\) and torch.float32 \(64, 10\)"):
        coordinate_check(build, [(data[0][0], torch.randn(64, 10))], (8, 16))
    with pytest.raises(CannotMeasure, match="not all positive"):
        learning_rate_sweep(build_valley, [None], (4,), [0.0], steps=1)
    with pytest.raises(CannotMeasure, match="learning_rates is empty"):
        learning_rate_sweep(build_valley, [None], (4,), [], steps=1)


def test_a_model_on_another_device_is_measured_there(device, data):
    def build(width):
        model = mlp(width).to(device)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    check = coordinate_check(build, [tuple(part.to(device) for part in data[0])], (8, 16), seeds=(0,))
    assert check.environment.device == (torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")


def test_any_object_that_steps_is_an_optimizer(data):
    def build(width):
        model = mlp(width)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, SimpleNamespace(param_groups=inner.param_groups, zero_grad=inner.zero_grad, step=inner.step)

    assert coordinate_check(build, data, (8, 16), steps=(1,), seeds=(0,)).series
