"""Weights that the model divides by their own norm: rows of length 1, in readouts, hidden maps and embeddings.

With W/‖W‖ any init is as good as another, and the rate goes with it: W has to change by N = ‖row‖ times what W/N should change by
(THEORY 2.2, row 34, with g = 1). The table says the init at which N is 1.
"""

import math
from statistics import fmean, linear_regression

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from scaling import derive, flow
from scaling.limits import WIDTH, exponent
from scaling.lint import lint
from scaling.records import ScalingTable

d = WIDTH
WIDTHS = (64, 96, 128)
ROWS = {
    "normalize": lambda W: F.normalize(W, dim=-1),
    "norm": lambda W: W / W.norm(dim=-1, keepdim=True),
    "mean square": lambda W: W * torch.rsqrt(W.square().sum(-1, keepdim=True) + 1e-12),
    "rms_norm": lambda W: F.rms_norm(W, W.shape[-1:]) / math.sqrt(W.shape[-1]),
}


class Readout(nn.Module):
    """Features of size 1, and `read(h, W)`."""

    def __init__(self, width, read, shape=lambda width: (10, width)):
        super().__init__()
        self.inp, self.mid, self.read = nn.Linear(7, width, bias=False), nn.Linear(width, width, bias=False), read
        self.W = nn.Parameter(torch.randn(shape(width)))

    def forward(self, x):
        return self.read(torch.tanh(self.mid(torch.tanh(self.inp(x)))), self.W)


def table_of(read, **options):
    return derive(lambda width: Readout(width, read, **options), (torch.zeros(2, 7),), widths=WIDTHS)


def powers(rule):
    return tuple(rule.exponent(name) for name in ("init_std", "sgd", "adam", "muon"))


HALF = exponent(d) / 2


@pytest.mark.parametrize("how", ROWS)
def test_a_readout_with_rows_of_length_one_starts_with_such_rows_and_moves_by_what_that_allows(how):
    table = table_of(lambda h, W: F.linear(h, ROWS[how](W)))
    assert (table["W"].init_std, table["W"].lr["adam"]) == (1 / d**HALF, 1 / d)
    assert powers(table["W"]) == (-HALF, -1, -1, -HALF)
    (note,) = table.notes
    assert note.startswith("W is divided by its own norm at ")
    assert "√d times as much" in note
    assert max(value.change for value in flow(table, "adam").values) == HALF


def test_with_what_the_note_asks_for_nothing_grows():
    for read in (
        lambda h, W: F.linear(h, F.normalize(W, dim=1)) / h.shape[-1] ** 0.5,
        lambda h, W: F.linear(h / h.shape[-1] ** 0.5, F.normalize(W, dim=1)),
        lambda h, W: F.linear(F.normalize(h, dim=1), F.normalize(W, dim=1)),
    ):
        table = table_of(read)
        assert powers(table["W"]) == (-HALF, 0, -HALF, 0)
        assert not table.notes
        assert [value.change for value in flow(table, "adam").values][-1] == 0


@pytest.mark.parametrize(
    ("shape", "axis", "init"),
    [((1, 1), 1, 1 / d**HALF), ((1, 1), 0, 1 / d**HALF), ((4, 1), 1, 1 / d**HALF), ((1, 4), 1, 1 / (4 * d) ** HALF)],
)
def test_a_hidden_matrix_has_the_rates_that_it_has_without(shape, axis, init):
    """Rows of length 1 are what it should have."""

    class Hidden(nn.Module):
        def __init__(self, width, axis):
            super().__init__()
            self.inp, self.out, self.axis = nn.Linear(7, shape[1] * width), nn.Linear(shape[0] * width, 5), axis
            self.W = nn.Parameter(torch.randn(shape[0] * width, shape[1] * width))

        def forward(self, x):
            W = self.W if self.axis is None else F.normalize(self.W, dim=self.axis)
            return self.out(torch.tanh(F.linear(torch.tanh(self.inp(x)), W)))

    ours, plain = (derive(lambda width, a=a: Hidden(width, a), (torch.zeros(2, 7),), widths=WIDTHS) for a in (axis, None))
    assert (ours["W"].init_std, ours["W"].lr) == (init, plain["W"].lr)
    assert (ours["out.weight"], ours.notes) == (plain["out.weight"], ())


def test_between_vectors_of_length_one_it_makes_such_a_vector_and_moves_by_its_share():
    """nGPT: entries of 1/√d in, entries of 1/√d out, whatever the weight's size: as the maps before it, Adam 1/d."""

    def read(h, W):
        return F.linear(F.normalize(F.linear(F.normalize(h, dim=1), F.normalize(W, dim=1)), dim=1), torch.ones(5, h.shape[-1]))

    table = table_of(read, shape=lambda width: (width, width))
    assert powers(table["W"]) == (-HALF, 0, -1, 0)
    assert all(value.change <= 0 for value in flow(table, "adam").values if value.operator == "aten.div")


def test_a_table_of_vectors_of_length_one_moves_by_its_share_and_the_next_map_makes_up_for_their_entries():
    class Embedded(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.W, self.mid, self.out = nn.Parameter(torch.randn(20, width)), nn.Linear(width, width), nn.Linear(width, 5)

        def forward(self, ids):
            return self.out(torch.tanh(self.mid(F.embedding(ids, F.normalize(self.W, dim=1)))))

    table = derive(Embedded, (torch.arange(6).reshape(2, 3),), widths=WIDTHS)
    assert powers(table["W"])[:3] == (-HALF, 0, -HALF)
    assert (table["mid.weight"].init_std, table["mid.weight"].exponent("adam")) == (1, -HALF)
    assert all(value.change <= 0 for value in flow(table, "adam").values)


class UnitRows(nn.Module):
    def forward(self, W):
        return F.normalize(W, dim=1)


def test_by_a_parametrization_too_but_not_where_another_weight_gives_the_size_or_it_is_bent():
    class Last(nn.Module):
        def __init__(self, width, make):
            super().__init__()
            self.inp, self.out = nn.Linear(7, width), make(nn.Linear(width, 5))

        def forward(self, x):
            return self.out(torch.tanh(self.inp(x)))

    def unit(layer):
        parametrize.register_parametrization(layer, "weight", UnitRows())
        return layer

    def divided(make):
        table = derive(lambda width: Last(width, make), (torch.zeros(2, 7),), widths=WIDTHS)
        return [rule.name for rule in table for block in rule.blocks if block.entries is not None]

    assert divided(unit) == ["out.parametrizations.weight.original"]
    assert divided(weight_norm) == divided(lambda layer: layer) == []
    for bent in (torch.tanh, torch.exp, lambda W: W - W.mean(), lambda W: W / 3, lambda W: W / W.square().sum()):
        assert table_of(lambda h, W, bent=bent: F.linear(h, bent(W)))["W"].blocks[0].entries is None


def test_tied_to_a_readout_the_readout_is_multiplied_as_it_needs():
    class Tied(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.W, self.mid = nn.Parameter(torch.randn(20, width)), nn.Linear(width, width)

        def forward(self, ids):
            W = F.normalize(self.W, dim=1)
            return F.linear(torch.tanh(self.mid(F.embedding(ids, W))), W)

    table = derive(Tied, (torch.arange(6).reshape(2, 3),), widths=WIDTHS)
    assert [use.multiplier for use in table["W"].uses] == [1, 1 / d**HALF]
    assert powers(table["W"])[:3] == (-HALF, 0, -HALF)
    assert not table.notes


@pytest.mark.parametrize("to", ["table8", "table9", {"W": "1/d"}])
def test_no_gauge_moves_it(to):
    table = table_of(lambda h, W: F.linear(h, F.normalize(W, dim=1)))
    assert table.gauge(to)["W"] == table["W"]


def test_the_table_says_so_and_is_read_back():
    table = table_of(lambda h, W: F.linear(h, F.normalize(W, dim=1)))
    assert "norm divided out, entries 1/√d" in " ".join(str(table).split())
    assert "init_std σ = e = 1/√d" in table.explain("W")
    assert ScalingTable.from_json(table.to_json()) == table


@pytest.mark.parametrize(("init", "lr", "kinds"), [(0, 0, []), (-0.5, -0.5, []), (-1, -1, []), (-1, 0, ["lr"]), (0, -0.5, ["lr"])])
def test_lint_asks_for_a_rate_in_proportion_to_whatever_the_init_is(init, lr, kinds):
    def build(width):
        model = Readout(width, lambda h, W: F.linear(F.normalize(h, dim=1), F.normalize(W, dim=1)))
        nn.init.normal_(model.inp.weight, std=0.4)
        nn.init.normal_(model.mid.weight, std=width**-0.5)
        nn.init.normal_(model.W, std=width**init)
        rates = {model.inp.weight: 1e-3, model.mid.weight: 1e-3 / width, model.W: 1e-3 * width**lr}
        return model, torch.optim.Adam([{"params": [weight], "lr": rate} for weight, rate in rates.items()], eps=1e-20)

    found = lint(build, (torch.zeros(2, 7),), widths=(64, 128, 256)).findings
    assert [(finding.kind, finding.weights) for finding in found] == [(kind, ("W",)) for kind in kinds]


# --- measured -----------------------------------------------------------------------------------------------------------------------


def step(family, W, lr):
    """Adam's first steps from one direction are those of its sign."""
    G = W.grad
    if family == "muon":
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        G = U @ Vh
    with torch.no_grad():
        W -= lr * (G.sign() if family == "adam" else G)
    W.grad = None


def slope(read, family, init, rates, learns):
    """How the change of the outputs in three steps goes with the width; `init` is σ of W, `rates` of the weights that learn."""
    generator = torch.Generator().manual_seed(1)
    x, direction = torch.randn(16, 7, generator=generator), torch.randn(16, 10, generator=generator) / 16
    points = []
    for width in (64, 128, 256, 512):
        changes = []
        for seed in range(3):
            torch.manual_seed(seed)
            model = Readout(width, read).double()
            with torch.no_grad():
                model.mid.weight.normal_(0, width**-0.5)
                model.W.normal_(0, float(init.subs(d, width)))
            start = model(x.double()).detach()
            for _ in range(3):
                (model(x.double()) * direction).sum().backward()
                for name in learns:
                    step(family, model.get_parameter(name), 0.02 * float(rates[name].subs(d, width)))
            changes.append(float((model(x.double()).detach() - start).square().mean().sqrt()))
        points.append((math.log2(width), math.log2(fmean(changes))))
    return linear_regression(*zip(*points, strict=True)).slope


@pytest.mark.parametrize("family", ["sgd", "adam", "muon"])
def test_as_measured_the_readouts_own_rule_moves_the_outputs_by_the_same_at_every_width(family):
    """And so does any other σ with its rate, θσ with θ^(1+p)·η; a readout's usual σ with its usual rate does not."""

    def read(h, W):
        return F.linear(h, F.normalize(W, dim=1))

    rule = table_of(read)["W"]
    plain = table_of(F.linear)["W"]
    degree = 2 if family == "sgd" else 1
    for theta in (1, 1 / d**HALF, d**HALF):
        rates = {"W": rule.lr[family] * theta**degree}
        assert abs(slope(read, family, rule.init_std * theta, rates, ["W"])) < 0.15
    assert slope(read, family, plain.init_std, {"W": plain.lr[family]}, ["W"]) > 0.35


@pytest.mark.parametrize(("divided", "grows"), [(False, True), (True, False)])
def test_as_measured_with_all_that_learns_the_outputs_move_as_the_note_says_until_they_are_divided(divided, grows):
    def read(h, W):
        return F.linear(h, F.normalize(W, dim=1)) / (h.shape[-1] ** 0.5 if divided else 1)

    table = table_of(read)
    found = slope(read, "adam", table["W"].init_std, {rule.name: rule.lr["adam"] for rule in table}, [rule.name for rule in table])
    assert abs(found - 0.5 * grows) < 0.15
    assert bool(table.notes) == grows
