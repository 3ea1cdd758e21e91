"""Modules composed at random are derived, or refused for a reason that the generator knows; the exponents are those that reading gives."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, note, settings
from sympy import Rational
from torch import nn

from scaling import derive
from scaling.errors import TooManyGrowingAxes
from scaling.limits import WIDTH
from tests.random_modules import SAMPLE, entries, expected, programs, too_many

D = 64


def inside(block, index):
    """Whether an entry of the weight at width D is in the block."""
    for factors, position in zip(block.axes, index, strict=True):
        for factor in reversed(factors):
            size, start, stop = (int(value.subs(WIDTH, D)) for value in (factor.size, factor.start, factor.stop))
            position, digit = divmod(position, size)
            if not start <= digit < stop:
                return False
    return True


def check(program):
    model = program.build(D)
    model(*program.args())  # it runs by itself
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    if any(too_many(weight) for weight in program.weights.values()):
        with pytest.raises(TooManyGrowingAxes) as refusal:
            derive(program.build, program.args(), widths=SAMPLE)
        assert too_many(program.weights[refusal.value.weight])
        return
    table = derive(program.build, program.args(), widths=SAMPLE)
    assert table.coverage.unreached == table.coverage.operators_without_rule == ()
    assert {rule.name for rule in table} == set(program.weights) == set(shapes)
    for name, weight in program.weights.items():
        rule = table[name]
        for index, pairs in entries(weight, shapes[name], D):
            blocks = [block for block in rule.blocks if inside(block, index)]
            assert len(blocks) == 1, (name, index, blocks)
            (block,) = blocks
            got = {key: block.exponent(key) for key in ("fan_in", "init_std", "sgd", "adam", "muon", "eps")}
            got["fan_out·copies"] = block.exponent("fan_out") + block.exponent("copies")
            want = expected(pairs)
            assert got == want, (
                name,
                index,
                [(part, str(segment.size)) for part, segment in pairs],
                {k: (got[k], want[k]) for k in want if got[k] != want[k]},
            )


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}  # to shrink one takes minutes


@given(programs())
@settings(max_examples=50, derandomize=True, **SETTINGS)
def test_a_random_module_gets_the_exponents_that_reading_it_gives(program):
    note(repr(program))
    check(program)


@pytest.mark.slow
@given(programs(most=12))
@settings(max_examples=3000, **SETTINGS)
def test_thousands_of_random_modules_get_the_exponents_that_reading_them_gives(program):
    note(repr(program))
    check(program)


# what it found


class Rotary(nn.Module):
    """q and k turned by halves, as rotary embeddings do."""

    def __init__(self, d, heads=4):
        super().__init__()
        self.inp, self.q, self.k, self.out = nn.Linear(7, d), nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 5)
        self.heads = heads

    def forward(self, x):
        h = self.inp(x)
        q, k = (m(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k))
        q, k = (y * 0.6 + 0.8 * torch.cat([-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]], -1) for y in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, q).transpose(1, 2).flatten(2))


def test_a_rotary_key_carries_the_rest_of_1_over_d_once_where_the_query_is_the_value_too():
    table = derive(Rotary, torch.zeros(2, 6, 7), widths=SAMPLE)
    assert [(table[name].exponent("init_std"), table[name].exponent("adam")) for name in ("q.weight", "k.weight")] == [
        (Rational(-1, 2), -1),
        (-1, Rational(-3, 2)),
    ]


def test_rows_are_blocks_where_a_half_of_them_is_cut_again():
    class Halves(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.inp, self.glu, self.out, self.gate = nn.Linear(7, d), nn.Linear(d, 2 * (d + 2)), nn.Linear(d, 5), nn.Linear(2, 5)
            self.d = d

        def forward(self, x):
            h, gate = F.glu(self.glu(self.inp(x)), -1).split([self.d, 2], -1)
            return self.out(h) * self.gate(gate)

    rule = derive(Halves, torch.zeros(2, 7), widths=SAMPLE)["glu.weight"]
    assert [(block.fan_out, block.role) for block in rule.blocks] == [(WIDTH, "hidden"), (2, "output")] * 2
    assert [block.slices[0].start for block in rule.blocks] == [0, WIDTH, WIDTH + 2, 2 * WIDTH + 2]


def test_rows_are_blocks_where_a_factor_of_them_is_indexed_and_another_cut():
    class Pairs(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.inp, self.pair, self.out, self.gate = nn.Linear(7, d), nn.Linear(d, 2 * (d + 2)), nn.Linear(d, 5), nn.Linear(2, 5)
            self.d = d

        def forward(self, x):
            a, b = self.pair(self.inp(x)).unflatten(-1, (2, -1)).unbind(-2)
            h, gate = (a * b).split([self.d, 2], -1)
            return self.out(h) * self.gate(gate)

    rule = derive(Pairs, torch.zeros(2, 7), widths=SAMPLE)["pair.weight"]
    assert [(block.fan_out, block.role) for block in rule.blocks] == [(WIDTH, "hidden"), (2, "output")] * 2


def test_one_axis_in_two_numbers_of_heads_has_no_growing_factors_in_common():
    class TwoHeads(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.inp, self.few, self.many, self.d = nn.Linear(7, d), nn.Linear(d // 4, 3), nn.Linear(8, 3), d

        def forward(self, x):
            h = self.inp(x)
            return self.few(h.view(len(h), 4, -1)), self.many(h.view(len(h), -1, 8))

    table = derive(TwoHeads, torch.zeros(2, 7), widths=SAMPLE)
    assert (table["inp.weight"].fan_out, table["few.weight"].fan_in, table["many.weight"].fan_in) == (WIDTH, WIDTH / 4, 8)


def test_a_fan_that_is_a_square_has_its_power():
    class Square(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.inp, self.pair = nn.Linear(7, d), nn.Bilinear(d - 2, d - 2, 5)

        def forward(self, x):
            h = self.inp(x)[..., 2:]
            return self.pair(h, h)

    rule = derive(Square, torch.zeros(2, 7), widths=SAMPLE)["pair.weight"]
    assert (rule.exponent("fan_in"), rule.exponent("init_std")) == (2, -2)
