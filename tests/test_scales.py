"""What the forward itself multiplies, normalizes and sums: the rules make up for it (THEORY 1.6, 1.7, P02, P58)."""

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

from scaling import derive
from scaling.limits import WIDTH as D
from tests import models

ROOT = sympy.sqrt(D)


class Net(nn.Module):
    """Embedding, hidden map, readout, and a forward of its own."""

    def __init__(self, d, forward, tied=False):
        super().__init__()
        self.embed, self.gain, self.hidden, self.head = nn.Embedding(11, d), nn.Parameter(torch.ones(d)), nn.Linear(d, d), nn.Linear(d, 11)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("root", torch.tensor(d**0.5))
        self.d, self.run = d, forward

    def forward(self, ids):
        return self.run(self, ids)


IDS = torch.tensor([[1, 2, 3]])


def table(forward, **options):
    return derive(lambda d: Net(d, forward, **options), IDS, widths=(32, 64, 128))


def sizes(rule):
    return tuple(float(rule.exponent(name)) for name in ("init_std", "adam", "sgd"))


FORWARDS = {  # name: forward, weight, exponents of σ, Adam, SGD
    "√d after the embedding": (lambda m, x: m.head(torch.tanh(m.hidden(m.embed(x) * m.d**0.5))), "embed.weight", (-0.5, -0.5, 0)),
    "√d kept in a buffer": (lambda m, x: m.head(torch.tanh(m.hidden(m.embed(x) * m.root))), "embed.weight", (-0.5, -0.5, 0)),
    "1/d on the logits": (lambda m, x: m.head(m.hidden(m.embed(x))) / m.d, "head.weight", (0, 0, 1)),
    "1/d on the readout's input": (lambda m, x: m.head(torch.tanh(m.hidden(m.embed(x))) / m.d), "head.weight", (0, 0, 1)),
    "1/√d on the weight": (lambda m, x: F.linear(m.hidden(m.embed(x)), m.head.weight / m.d**0.5), "head.weight", (-0.5, -0.5, 0)),
    "F.normalize before a map": (lambda m, x: m.head(m.hidden(F.normalize(m.embed(x), dim=-1))), "hidden.weight", (0, -0.5, 1)),
    "its √d put back": (lambda m, x: m.head(m.hidden(F.normalize(m.embed(x), dim=-1) * m.d**0.5)), "hidden.weight", (-0.5, -1, 0)),
    "and a gain between": (
        lambda m, x: m.head(m.hidden(F.normalize(m.embed(x), dim=-1) * m.gain * m.d**0.5)),
        "hidden.weight",
        (-0.5, -1, 0),
    ),
    "rms norm by hand": (
        lambda m, x: m.head(m.hidden(m.embed(x) * m.embed(x).pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * m.gain)),
        "hidden.weight",
        (-0.5, -1, 0),
    ),
    "a constant is no width": (lambda m, x: m.head(m.hidden(m.embed(x) * 12.0)) / 16, "embed.weight", (0, 0, 1)),
    "the stream is used twice": (lambda m, x: (lambda h: m.head(m.hidden(h * m.d**0.5) + h))(m.embed(x)), "hidden.weight", (-1, -1.5, -1)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_the_rule_makes_up_for_what_the_forward_multiplies(name):
    forward, weight, expected = FORWARDS[name]
    assert sizes(table(forward)[weight]) == expected


def test_a_gain_keeps_its_rule_whatever_it_scales():
    assert sizes(table(FORWARDS["and a gain between"][0])["gain"]) == (0, 0, 1)


def test_the_factor_is_exact_and_its_line_is_noted():
    rule = table(FORWARDS["√d after the embedding"][0])["embed.weight"]
    assert (rule.init_std, rule.lr["adam"], rule.lr["sgd"]) == (1 / ROOT, 1 / ROOT, 1)
    assert "√d" in rule.notes[0] or "sqrt(d)" in rule.notes[0]
    assert "test_scales.py" in rule.notes[0]


def test_a_tied_readout_gets_what_its_forward_lacks_of_1_over_d():
    """T5 multiplies by 1/√d before a tied head: the other 1/√d is the table's. P02: with √d after the embedding too, 1/√d again."""
    t5 = table(lambda m, x: m.head(torch.tanh(m.hidden(m.embed(x))) * m.d**-0.5), tied=True)["embed.weight"]
    assert (sizes(t5), t5.multiplier) == ((0, 0, 1), 1 / ROOT)
    gemma = table(lambda m, x: m.head(m.hidden(m.embed(x) * m.d**0.5)), tied=True)["embed.weight"]
    assert (sizes(gemma), gemma.multiplier) == ((-0.5, -0.5, 0), 1 / ROOT)
    plain = table(lambda m, x: m.head(m.hidden(m.embed(x))), tied=True)["embed.weight"]
    assert (sizes(plain), plain.multiplier) == ((0, 0, 1), 1 / D)


def test_one_model_alone_tells_a_factor_by_its_value():
    assert sizes(derive(Net(48, FORWARDS["√d after the embedding"][0]), IDS)["embed.weight"]) == (-0.5, -0.5, 0)


class Towers(nn.Module):
    def __init__(self, d, normalized):
        super().__init__()
        self.map, self.mix, self.normalized = nn.Linear(7, d), nn.Linear(d, d), normalized

    def forward(self, x, y):
        u, v = (self.mix(torch.relu(self.map(z))) for z in (x, y))
        if self.normalized:
            u, v = F.normalize(u, dim=-1), F.normalize(v, dim=-1)
        return (u * v).sum(-1) if not self.normalized else u @ v.T


def test_a_product_of_normalized_towers_needs_nothing_more():
    found = derive(lambda d: Towers(d, True), (torch.zeros(3, 7),) * 2, widths=(32, 64))
    assert [contraction.present for contraction in found.contractions] == [1 / D]
    assert sizes(found["mix.weight"]) == (-0.5, -1, 0)


def test_without_multipliers_no_rule_has_sizes_of_its_own():
    for rule in derive(models.GPT, models.ids(), widths=(32, 64)):
        assert all((block.input_scale, block.target) == (1, 1) for block in rule.blocks)


def test_a_gain_that_starts_at_a_power_of_the_width_is_said():
    """ScaleNorm (Nguyen and Salazar 2019) starts at √d."""

    class Scaled(nn.Module):
        def __init__(self, d, start):
            super().__init__()
            self.stem, self.g, self.out = nn.Linear(16, d), nn.Parameter(torch.tensor(float(start))), nn.Linear(d, 4)

        def forward(self, x):
            return self.out(self.g * F.normalize(self.stem(x), dim=-1))

    notes = [derive(lambda d, p=p: Scaled(d, d**p), torch.zeros(2, 16), widths=(64, 128)).notes for p in (0.5, 0)]
    assert ["g starts at √d" in note for note in notes[0]] == [True]
    assert notes[1] == ()
