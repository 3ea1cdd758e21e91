"""A few entries of the stream that a gate reads (x[..., :12]) do not cut the stream; parts that an axis is made of do."""

import math
from statistics import fmean, linear_regression

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

import compiler
from scaling import derive, flow
from scaling.limits import WIDTH

d = WIDTH
WIDTHS = (64, 96, 128)
IDS = torch.arange(16).reshape(2, 8)
FEW = 12


class Block(nn.Module):
    """Attention and MLP on the stream; `gate(block, y, a, v)` is what the layer adds, `more` the gate's modules."""

    def __init__(self, width, gate, more):
        super().__init__()
        self.heads, self.gate = width // 16, gate
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        for name, module in more(width).items():
            setattr(self, name, module)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (m(y).unflatten(-1, (self.heads, 16)).transpose(1, 2) for m in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / 16).transpose(1, 2)
        x = x + self.gate(self, y, self.o(a.flatten(2)))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Stream(nn.Module):
    def __init__(self, width, gate=lambda block, y, a: a, more=lambda width: {}):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(16, width), nn.Sequential(*(Block(width, gate, more) for _ in range(2)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 16, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embed(ids))))


def of_the_branch(block, y, a):
    return a * torch.sigmoid(block.fc(y[..., :FEW]))


def of_the_heads(block, y, a):
    return (a.unflatten(-1, (block.heads, 16)) * torch.sigmoid(block.fc(y[..., :FEW])).unsqueeze(-1)).flatten(2)


def of_the_token_before(block, y, a):
    return a + F.pad(y[:, :-1] * torch.sigmoid(block.fc(y[:, 1:, :FEW])), (0, 0, 1, 0))


def from_the_end(block, y, a):
    return a * torch.sigmoid(block.fc(y.narrow(-1, y.shape[-1] - FEW, FEW)))


def two(block, y, a):
    return a * torch.sigmoid(block.fc(y[..., :FEW])) + y * torch.sigmoid(
        block.other(y[..., FEW : 2 * FEW] + y[..., FEW // 2 : FEW // 2 + FEW])
    )


def one_number(width):
    return {"fc": nn.Linear(FEW, 1, bias=False)}


def per_head(width):
    return {"fc": nn.Linear(FEW, width // 16, bias=False)}


def two_numbers(width):
    return {"fc": nn.Linear(FEW, 1, bias=False), "other": nn.Linear(FEW, 1, bias=False)}


GATES = {
    "branch": (of_the_branch, one_number),
    "heads": (of_the_heads, per_head),
    "token before": (of_the_token_before, one_number),
    "from the end": (from_the_end, one_number),
    "two": (two, two_numbers),
}
DERIVED = {
    "alone": lambda make: derive(make(96), (IDS,)),
    "widths": lambda make: derive(make, (IDS,), widths=WIDTHS),
    "also": lambda make: derive(make(96), (IDS,), also=make(128)),
}


def rules(table):
    return {rule.name: (rule.dims, rule.fan_in, rule.fan_out, rule.copies, rule.init_std, rule.lr, len(rule.blocks)) for rule in table}


@pytest.mark.parametrize("how", DERIVED)
@pytest.mark.parametrize("gate", GATES)
def test_a_gate_of_a_few_features_leaves_the_rules_of_the_stream_as_they_are(gate, how):
    table = DERIVED[how](lambda width: Stream(width, *GATES[gate]))
    own = {name for name in rules(table) if name.endswith(("fc.weight", "other.weight"))}
    assert {name: rule for name, rule in rules(table).items() if name not in own} == rules(DERIVED[how](Stream))
    for name in own:
        rule = table[name]
        assert (rule.fan_in, rule.lr["adam"], len(rule.blocks)) == (FEW, sympy.Rational(1, FEW), 1)
        assert (rule.fan_out, rule.role) == ((d / 16, "input") if gate == "heads" else (1, "scalar"))
    assert sum("12 of d features are taken at" in note for note in table.notes) == (2 if gate == "two" else 1)  # lines


@pytest.mark.parametrize("gate", ["branch", "heads"])
def test_with_such_a_gate_all_that_is_measured_stays_of_one_size(gate):
    """And as flow says; under SGD, which sees how large the few features' gradient is, flow says that they grow."""

    def make(width):
        return Stream(width, *GATES[gate])

    table = derive(make, (IDS,), widths=WIDTHS)
    for optimizer, grows in (("adam", False), ("muon", False), ("sgd", True)):
        assert any(value.change > 0 for value in flow(table, optimizer).values) == grows
    direction = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    found = {}
    for width in (128, 256, 512):
        for seed in range(2):
            torch.manual_seed(seed)
            model, optimizer = compiler.compile(make(width), table, optimizer="adam", lr=0.02)
            seen = {}
            model.blocks[1].fc.register_forward_hook(lambda _, args, out, seen=seen: seen.update(few=args[0].detach()))
            model.norm.register_forward_hook(lambda _, args, out, seen=seen: seen.update(stream=args[0].detach()))
            model.head.register_forward_hook(lambda _, args, out, seen=seen: seen.update(logits=out.detach()))
            logits, start = model(IDS), dict(seen)
            for _ in range(4):
                optimizer.zero_grad()
                (logits * direction).sum().div(16).backward()
                optimizer.step()
                logits = model(IDS)
            for name, value in seen.items():
                found.setdefault(name, {}).setdefault(width, []).append(float((value - start[name]).square().mean().log2() / 2))
    for name, by_width in found.items():
        slope = linear_regression([math.log2(width) for width in by_width], [fmean(values) for values in by_width.values()]).slope
        assert abs(slope) < 0.15, name  # THEORY 6.1


class Parts(nn.Module):
    """Two linears, and what is done between them and after."""

    def __init__(self, width, out, run, read=None):
        super().__init__()
        self.first, self.mid, self.run = nn.Linear(7, width), nn.Linear(width, out(width)), run
        self.last = nn.Linear(read(width), 5) if read else nn.Identity()

    def forward(self, x):
        return self.run(self, self.first(x))


def taken_and_the_rest(m, x):
    y = m.mid(x)
    return m.last(y[..., 3:] * y[..., :3].mean(-1, keepdim=True))


def three(m, x):
    y, n = m.mid(x), x.shape[-1]
    return m.last(y[..., :n] * (y[..., n : n + 3] * y[..., n + 3 :]).mean(-1, keepdim=True))


def beside_the_rest_before_it_is_bent(m, x):
    y = m.mid(x)
    return m.last(torch.relu(y)[..., 3:] * y[..., :3].mean(-1, keepdim=True))


def concatenated(m, x):
    y = torch.cat([m.mid(x), x.new_ones(*x.shape[:-1], 3)], -1)
    return m.last(y) * y[..., -3:].mean(-1, keepdim=True)


def half(m, x):
    y = m.mid(x)
    return m.last(y) * y[..., : x.shape[-1] // 2].mean(-1, keepdim=True)


def nothing_else(m, x):
    return m.mid(x)[..., :5]


SPLIT = {
    "taken and the rest": (lambda n: n + 3, taken_and_the_rest, lambda n: n, "mid.weight", [3, d]),
    "three": (lambda n: n + 6, three, lambda n: n, "mid.weight", [d, 3, 3]),
    "before it is bent": (lambda n: n + 3, beside_the_rest_before_it_is_bent, lambda n: n, "mid.weight", [3, d]),
    "concatenated": (lambda n: n, concatenated, lambda n: n + 3, "last.weight", [d, 3]),
    "half": (lambda n: n, half, lambda n: n, "mid.weight", [d / 2, d / 2]),
    "nothing else": (lambda n: n, nothing_else, None, "mid.weight", [5, d - 5]),
}


@pytest.mark.parametrize("case", SPLIT)
def test_parts_that_fill_an_axis_or_grow_or_are_all_that_is_read_are_blocks(case):
    out, run, read, name, lengths = SPLIT[case]
    table = derive(lambda width: Parts(width, out, run, read), (torch.zeros(2, 7),), widths=(64, 96, 128))
    blocks = table[name].blocks
    assert [block.fan_in if name == "last.weight" else block.fan_out for block in blocks] == lengths
    assert not any("features are taken" in note for note in table.notes)
