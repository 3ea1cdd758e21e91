"""What a forward may do and a weight may be, each in one small model, with the roles that reading it gives."""

import pytest
import torch
from sympy import Rational
from torch import nn

from scaling import derive, flow, register
from scaling.errors import CaptureFailed, ConflictingUses, TooManyGrowingAxes, UnsupportedOperator
from scaling.limits import WIDTH
from scaling.operators import OPERATORS

d = WIDTH
WIDTHS = (32, 48, 64)
X = (torch.zeros(3, 7),)


class Middle(nn.Module):
    """`run(model, x)` between a first and a last linear, with further modules by name."""

    def __init__(self, width, run, **more):
        super().__init__()
        self.inp, self.mid, self.out, self.run = nn.Linear(7, width), nn.Linear(width, width), nn.Linear(width, 5), run
        for name, module in more.items():
            setattr(self, name, module(width))

    def forward(self, *args):
        return self.run(self, *args)


def table_of(run, args=X, options=None, **more):
    return derive(lambda width: Middle(width, run, **more), args, widths=WIDTHS, **(options or {}))


# loops and branches on floats


def _until_small(m, x):
    h = m.inp(x)
    while h.norm() > 1e-3:
        h = m.mid(h)
    return m.out(h)


def _until_large(m, x):
    h = m.inp(x)
    while h.norm().item() < 1e6:
        h = m.mid(h)
    return m.out(h)


def _while_not(m, x):
    h = m.inp(x)
    while not bool((h > 5).any()):
        h = m.mid(h)
    return m.out(h)


def _nested(m, x):
    h = m.inp(x)
    while h.mean() > 0:
        while h.max() < 2:
            h = m.mid(h)
        h = h - 1
    return m.out(h)


@pytest.mark.parametrize("run", [_until_small, _until_large, _while_not, _nested])
def test_a_loop_that_a_float_ends_does_end(run):
    table = table_of(run)
    assert table["mid.weight"].role == "hidden"
    assert not table.coverage.unreached
    assert table.coverage.made_up > 0


@pytest.mark.parametrize("test", [lambda h: h.sum() > 0, lambda h: h.mean().item() < 0.5, lambda h: not torch.isfinite(h).all()])
def test_both_sides_of_a_branch_on_a_float_are_reached(test):
    table = table_of(lambda m, x: m.out(m.a(m.inp(x))) if test(m.mid(m.inp(x))) else m.out(m.b(m.inp(x))),
                     a=lambda n: nn.Linear(n, n), b=lambda n: nn.Linear(n, n))  # fmt: skip
    assert (table["a.weight"].role, table["b.weight"].role) == ("hidden", "hidden")


def test_a_layer_that_is_moved_within_a_forward_is_recorded():
    """Mixtures of experts send each expert to the device of its tokens."""
    table = table_of(lambda m, x: m.out(m.mid.to(x.device).float()(m.inp(x))))
    assert table["mid.weight"].role == "hidden"


# what leaves torch


def test_numpy_on_activations_is_refused_with_the_line_and_a_cure():
    with pytest.raises(CaptureFailed, match=r"test_forms\.py:\d+: .*numpy(.|\n)*outside of torch(.|\n)*custom_op"):
        table_of(lambda m, x: m.out(m.mid(torch.from_numpy(m.inp(x).detach().numpy()))))


# what a forward returns


class Box:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def _object(value):
    box = type("Bag", (), {})()
    box.inner = {"a": [value]}
    return box


@pytest.mark.parametrize("wrap", [_object, lambda y: {"a": ({"b": y},)}, lambda y: iter([y]), Box])
def test_whatever_a_forward_returns_its_weights_are_reached(wrap):
    table = table_of(lambda m, x: wrap(m.out(m.mid(m.inp(x)))))
    assert table.coverage.unreached == ()
    assert table["mid.weight"].role == "hidden"


# custom operators


@torch.library.custom_op("scaling_tests::mix", mutates_args=())
def mix(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x·Wᵀ; nothing tells torch the shape of its result."""
    return x @ w.T


def test_a_custom_operator_on_a_weight_is_refused_until_its_signature_is_registered_in_one_line():
    def run(m, x):
        return m.out(torch.ops.scaling_tests.mix(m.inp(x), m.mid.weight) + m.mid.bias)

    with pytest.raises(UnsupportedOperator, match=r"no rule for scaling_tests\.mix(.|\n)*scaling\.operators\.register"):
        table_of(run)
    register("scaling_tests.mix", "... i, o i -> ... o")
    try:
        rule = table_of(run)["mid.weight"]
    finally:
        del OPERATORS["scaling_tests.mix"]
    assert (rule.fan_in, rule.fan_out, rule.role) == (d, d, "hidden")


# more than two growing axes


def test_three_growing_axes_are_refused_unless_opted_in():
    """Row 35, P19: F_in = i₁·i₂, Adam −2, σ −1."""

    def run(m, x):
        return m.out(m.pair(m.inp(x), m.mid(m.inp(x))))

    with pytest.raises(TooManyGrowingAxes, match="many_growing_axes=True"):
        table_of(run, pair=lambda n: nn.Bilinear(n, n, n))
    rule = table_of(run, options={"many_growing_axes": True}, pair=lambda n: nn.Bilinear(n, n, n))["pair.weight"]
    assert (rule.fan_in, rule.fan_out) == (d**2, d)
    assert (rule.exponent("adam"), rule.exponent("init_std")) == (-2, Rational(-3, 2))  # -1 forwards, min(1, F_out/F_in) for what goes back
    last = table_of(lambda m, x: m.pair(m.inp(x), m.mid(m.inp(x))), pair=lambda n: nn.Bilinear(n, n, 4))
    assert last["pair.weight"].exponent("fan_in") == 2


# ties


def test_a_matrix_that_is_also_added_is_refused_with_both_lines():
    """P18."""

    def run(m, x):
        h = m.mid(m.inp(x))
        return m.out((h.unsqueeze(1) + m.mid.weight).mean(1))

    with pytest.raises(ConflictingUses, match=r"mid\.weight") as refusal:
        table_of(run)
    assert len({place.split(": ")[0] for place in refusal.value.where}) == 2
    assert all("test_forms.py" in place for place in refusal.value.where)


def test_a_gate_that_is_also_part_of_what_is_added_is_one_vector():
    """A gain is d maps of 1 to 1, a bias one of 1 to d: msign sees other matrices, and of either the entries move as a sign."""
    table = table_of(
        lambda m, x: m.out(m.gate.weight.sigmoid() * m.mid(m.inp(x)) + (1 - m.gate.weight.sigmoid()) * m.start.weight),
        gate=nn.RMSNorm, start=nn.RMSNorm,
    )  # fmt: skip
    assert table["gate.weight"].role == table["start.weight"].role == "vector"


# products of two activations, and weights that are looked up


@pytest.mark.parametrize("values_first", [False, True])
def test_of_two_factors_the_one_that_nothing_else_looks_at_carries_the_scale(values_first):
    """Tokens compared with slots are also what is mixed: were they 1/d in size, all after them would be."""

    def run(m, x):
        h, slots = m.inp(x), m.mid(m.inp(x))
        scores = (h @ slots.mT if values_first else slots @ h.mT).softmax(-1)
        return m.out(scores @ h)

    table = table_of(run)
    assert table["inp.weight"].exponent("init_std") == 0
    assert table["mid.weight"].exponent("init_std") == Rational(-3, 2)


class Bank(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.maps, self.mix = nn.Parameter(torch.zeros(3, width, width)), nn.Parameter(torch.zeros(4, 3))

    def made(self):
        return (self.mix @ self.maps.flatten(1)).view(4, *self.maps.shape[1:])


@pytest.mark.parametrize(
    "run",
    [
        lambda m, h, which: torch.bmm(h[:, None], m.maps[which])[:, 0],
        lambda m, h, which: torch.bmm(m.maps[which].mT, h[:, :, None]).squeeze(2),
        lambda m, h, which: (h[:, None] @ m.maps.index_select(0, which)).squeeze(1),
        lambda m, h, which: torch.einsum("ni,nkoi->nko", h, m.maps[which[:, None].expand(-1, 2)]).sum(1),
        lambda m, h, which: torch.bmm(h[:, None], m.made()[which])[:, 0],
    ],
    ids=["bmm", "transposed", "index_select", "einsum", "made of a basis"],
)
def test_a_matrix_that_is_looked_up_is_a_map_and_no_embedding(run):
    """Experts taken by a router's choice, a matrix for every relation of a graph."""
    table = table_of(lambda m, x, which: m.out(run(m.bank, m.inp(x), which)), (torch.zeros(3, 7), torch.tensor([0, 1, 2])), bank=Bank)
    rule = table["bank.maps"]
    assert rule.role == "hidden"
    assert [rule.exponent(name) for name in ("init_std", "sgd", "adam", "muon")] == [Rational(-1, 2), 0, -1, 0]
    assert rule.fan_in == rule.fan_out == d  # of one matrix, not of all three


# convolutions that torch has not


def test_a_deformable_convolution_is_a_convolution_and_its_offsets_an_output():
    ops = pytest.importorskip("torchvision").ops

    class Deformed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.stem, self.offsets = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * 9, 3, padding=1)
            self.conv, self.head = ops.DeformConv2d(width, 2 * width, 3, padding=1), nn.Conv2d(2 * width, 5, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.conv(x, self.offsets(x)))

    table = derive(Deformed, torch.zeros(2, 3, 8, 8), widths=WIDTHS)
    assert (table["conv.weight"].fan_in, table["conv.weight"].fan_out, table["conv.weight"].role) == (9 * d, 2 * d, "hidden")
    assert (table["offsets.weight"].role, table["conv.bias"].role) == ("output", "vector")


# codebooks


def test_a_codebook_is_looked_up_whatever_finds_the_nearest_code():
    """Row 38: row 1 (lookup); the distance only makes ids, and ids do not depend on its size."""

    def run(m, x):
        z = m.mid(m.inp(x))
        distance = z.square().sum(-1, keepdim=True) - 2 * z @ m.codes.weight.T + m.codes.weight.square().sum(-1)
        q = m.codes(distance.argmin(-1))
        return m.out(z + (q - z).detach()), (q - z.detach()).square().mean()

    rule = table_of(run, codes=lambda n: nn.Embedding(11, n))["codes.weight"]
    assert (rule.role, rule.fan_in, rule.exponent("adam"), rule.exponent("init_std")) == ("embedding", 1, 0, 0)


@pytest.mark.parametrize("heads", ["grow", "fixed"])
def test_of_heads_and_head_dim_on_axes_of_their_own_one_grows(heads):
    """XLNet's weights are (d, heads, head_dim); only queries and keys are summed over head_dim."""

    class Attention(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.inp, self.out = nn.Linear(7, d), nn.Linear(d, 5)
            self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(d, d // 16, 16)) for _ in range(4))

        def forward(self, x):
            h = self.inp(x)
            q, k, v = (torch.einsum("btd,dnh->btnh", h, w) for w in (self.q, self.k, self.v))
            weights = torch.einsum("bsnh,btnh->bnst", q, k).softmax(-1)
            return self.out(torch.einsum("bsnh,dnh->bsd", torch.einsum("bnst,btnh->bsnh", weights, v), self.o))

    table = derive(Attention(128), torch.zeros(2, 6, 7), heads=heads)
    for name in "qkvo":
        assert [dim.has(table.width) for dim in table[name].dims] == [True, heads == "grow", heads == "fixed"]


ASSIGNED = {
    "zeros": lambda x, a, b: torch.zeros(len(x), 2 * a.shape[1]),
    "new_zeros": lambda x, a, b: x.new_zeros(len(x), 2 * a.shape[1]),
    "zeros_like": lambda x, a, b: torch.zeros_like(torch.cat([a, b], 1)),
}


@pytest.mark.parametrize("made", ASSIGNED.values(), ids=ASSIGNED)
def test_what_is_assigned_into_parts_of_zeros_is_concatenated(made):
    class Assigned(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.a, self.b, self.mid, self.out = nn.Linear(7, d), nn.Linear(7, d), nn.Linear(d, d), nn.Linear(2 * d, 5)

        def forward(self, x):
            a, b = self.mid(self.a(x)), self.b(x)
            both = made(x, a, b)
            both[:, : a.shape[1]] = a
            both[:, a.shape[1] :] = b
            return self.out(both)

    table = derive(Assigned(32), *X)
    joined = [{name for name, _ in one.where} for one in table.classes if ("out.weight", 1) in one.where]
    assert sorted(map(sorted, joined)) == [["b.bias", "b.weight", "out.weight"], ["mid.bias", "mid.weight", "out.weight"]]
    assert not flow(table).unknown


def test_a_product_is_fixed_where_one_of_its_factors_is_said_to_grow():
    """4 heads × 16 are regrouped to 8 groups × 8: the heads are a factor of the groups, whose number stays."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.gain, self.groups = nn.Linear(7, 64), nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.ones(8, 1))
            self.out = nn.Linear(64, 64)

        def forward(self, x):
            heads = self.q(x).view(-1, 4, 16) * self.gain
            return self.out((heads.flatten(1).view(-1, 8, 8) * self.groups).flatten(1)).mean(1)

    table = derive(Grouped(), *X, grows={"gain": 0}, fixed={"groups": 0})
    assert [table[name].dims[0].has(d) for name in ("gain", "groups", "q.weight")] == [True, False, True]
    assert table["groups"].dims[0] == 8
    assert [one.known for one in table.classes if one.where == (("groups", 0),)] == [True]


class Sines(nn.Module):
    """Features made of the coordinates: 4 sines and cosines of each of 3."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(12, 32)

    def forward(self, x):
        return self.inp(torch.cat([f(2**i * x) for i in range(2) for f in (torch.sin, torch.cos)], -1))


class Neighbours(nn.Module):
    """Rows picked by an index that must be integers."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(7, 32)

    def forward(self, x, edges):
        source, target = edges
        h = self.inp(x)
        return torch.zeros_like(h).index_add(0, target, h[source])


class Folded(nn.Module):
    """A stem that takes an image apart first, as TResNet's: its first convolution does not have the image's channels."""

    def __init__(self, **attributes):
        super().__init__()
        self.inp = nn.Conv2d(48, 32, 3)
        vars(self).update(attributes)

    def forward(self, x):
        b, _, h, w = x.shape
        return self.inp(x.view(b, 3, h // 4, 4, w // 4, 4).permute(0, 1, 3, 5, 2, 4).reshape(b, 3 * 16, h // 4, w // 4))


class Patches(nn.Module):
    """A video whose number of axes is asked for before any operator sees it."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Conv3d(3, 32, (2, 4, 4), (2, 4, 4))

    def forward(self, x):
        _, _, _, _, _ = x.shape
        return self.inp(x)


@pytest.mark.parametrize(
    "model",
    [
        Sines(),
        Neighbours(),
        Folded(default_cfg={"input_size": (3, 32, 32)}),
        Folded(example_input_array=torch.zeros(2, 3, 32, 32)),
        Patches(),
    ],
    ids=["sines", "edges", "timm", "lightning", "video"],
)
def test_inputs_are_made_up_from_what_the_model_says_of_them(model):
    assert not derive(model).coverage.unreached


def test_sines_as_many_as_the_stream_is_wide_grow_with_it_and_codes_far_more_do_not():
    class Positions(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.inp, self.mid, self.place = nn.Linear(7, d), nn.Linear(d, d), nn.Linear(d, d)
            self.codes, self.out = nn.Linear(d, 16 * d), nn.Linear(16 * d, 5)

        def forward(self, x):
            h = self.mid(self.inp(x))
            angles = torch.arange(x.shape[1])[:, None] / 100 ** (torch.arange(h.shape[-1] // 2) / h.shape[-1])
            h = h + self.place(torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
            return self.out(self.codes(h).softmax(-1))

    table = derive(Positions(32), torch.zeros(2, 6, 7))
    assert table["place.weight"].role == "hidden"
    assert table["codes.weight"].role == "output"
