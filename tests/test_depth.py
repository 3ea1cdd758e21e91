"""Depth: residual branches found in the graph, their multiplier, and what it asks of the weights (THEORY 4)."""

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

from scaling import derive, parametrization
from scaling.depth import NoResidualBranches, UnstableDepth
from scaling.limits import DEPTH, exponent
from scaling.parametrizations import shampoo

L, ONE = DEPTH, sympy.Integer(1)
X = torch.zeros(4, 16)


class Branch(nn.Module):
    """norm -> up -> relu -> down."""

    def __init__(self, d, norm=True):
        super().__init__()
        self.norm = nn.LayerNorm(d) if norm else nn.Identity()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return self.down(F.relu(self.up(self.norm(x))))


class Residual(nn.Module):
    """A residual MLP; `add` says how a block joins the stream."""

    def __init__(self, d=32, blocks=4, block=Branch, add=lambda x, f: x + f(x), shared=False):
        super().__init__()
        self.embed, self.head, self.add, self.loops = nn.Linear(16, d), nn.Linear(d, 10), add, blocks
        self.blocks = nn.ModuleList(block(d) for _ in range(1 if shared else blocks))
        self.norm = nn.LayerNorm(d)

    def forward(self, x):
        x = self.embed(x)
        for i in range(self.loops):
            x = self.add(x, self.blocks[i % len(self.blocks)])
        return self.head(self.norm(x))


def powers(rule, of=L):
    names = ("init_std", "multiplier", "sgd", "adam", "muon", "eps", "weight_decay")
    return dict(zip(names, (rule.exponent(name, of=of) for name in names), strict=True))


def branches(model, args=(X,), **options):
    """The depth, and the weights that carry the multipliers."""
    table = derive(model, args, depth=True, **options)
    assert table.residual is not None
    return table.depth_size, {name for branch in table.residual.branches for name in branch.folded}


# --- the rules: oracle depth_rows of THEORY 4.1 -------------------------------------------------------------------------------------

ROWS = {
    "alpha_rule": {"adam": "alpha-1", "muon": "alpha-1", "sgd": "2*alpha-1", "eps": "-alpha", "weight_decay": "1-alpha", "init_std": "0"},
    "outside_blocks": dict.fromkeys(("adam", "muon", "sgd", "eps", "weight_decay", "init_std", "multiplier"), "0"),
    "shared_over_blocks": {"adam": "alpha-1", "sgd": "2*alpha-2", "eps": "1-alpha"},
}
ALPHAS = [sympy.Rational(1, 2), sympy.Rational(3, 4), ONE]


def row(name, alpha):
    return {key: sympy.sympify(text).subs(sympy.Symbol("alpha"), alpha) for key, text in ROWS[name].items()}


def forward_multiplier(table, alpha):
    """The gauge with L^-α in the forward, in which THEORY's table is written."""
    return table.gauge({"blocks.*.down.weight": L**-alpha, "blocks.*.down.bias": L**-alpha})


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("part", ["norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias"])
def test_weights_in_a_branch_follow_the_depth_row_of_their_optimizer(alpha, part):
    rule = forward_multiplier(derive(Residual(), (X,), depth=alpha), alpha)[f"blocks.2.{part}"]
    assert {key: powers(rule)[key] for key in ROWS["alpha_rule"]} == row("alpha_rule", alpha)
    assert powers(rule)["multiplier"] == (-alpha if part.startswith("down") else 0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", ["embed.weight", "embed.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"])
def test_weights_outside_of_the_branches_have_no_factor_of_depth(alpha, name):
    rule = derive(Residual(), (X,), depth=alpha)[name]
    assert powers(rule) == row("outside_blocks", alpha)


@pytest.mark.parametrize("part", ["norm.weight", "up.weight", "up.bias"])
def test_a_weight_shared_by_all_blocks_follows_the_shared_row(part):
    rule = derive(Residual(shared=True), (X,), depth=True)[f"blocks.0.{part}"]
    assert {key: powers(rule)[key] for key in ROWS["shared_over_blocks"]} == row("shared_over_blocks", ONE)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_relative_and_homogeneous_optimizers_follow_their_degree(alpha):
    table = forward_multiplier(derive(Residual(), (X,), depth=alpha), alpha)
    block = table["blocks.1.up.weight"].blocks[0]
    assert exponent(parametrization(table, "spectral", "lamb").laws["blocks.1.up.weight"][0].lr, L) == alpha - 1
    for inverse in (sympy.Rational(1, 4), sympy.Rational(1, 2)):
        found = shampoo(inverse)
        assert exponent(found.rate(block, block.init_std), L) == (1 + found.degree) * alpha - 1


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_last_map_carries_the_multiplier_by_the_gauge(alpha):
    for part in ("down.weight", "down.bias"):
        rule = derive(Residual(), (X,), depth=alpha)[f"blocks.0.{part}"]
        assert powers(rule) == {
            "init_std": -alpha, "multiplier": 0, "sgd": -1, "adam": -1, "muon": -1, "eps": 0, "weight_decay": 1,
        }  # fmt: skip


def test_depth_leaves_every_exponent_of_width_alone():
    plain, deep = derive(Residual(), (X,)), derive(Residual(), (X,), depth="1/2")
    for rule in plain:
        assert powers(rule, plain.width) == powers(deep[rule.name], deep.width)
        assert rule.exponent("sgd") == deep[rule.name].exponent("sgd")


@pytest.mark.parametrize("name", ["table3", "table8", "table9", "u-mup", "spectral"])
@pytest.mark.parametrize("family", ["sgd", "adam", "muon"])
def test_published_gauges_keep_the_factors_of_depth(name, family):
    table = derive(Residual(), (X,), depth="1/2")
    for weight, laws in parametrization(table, name, family).laws.items():
        block = table[weight].blocks[0]
        assert exponent(laws[0].lr, L) == block.exponent(family, L)
        assert exponent(laws[0].init_std, L) == block.exponent("init_std", L)
        assert exponent(laws[0].eps, L) == block.exponent("eps", L)


# --- branches are found in the graph ------------------------------------------------------------------------------------------------


def test_l_is_the_number_of_additions_of_the_model():
    table = derive(Residual(blocks=6), (X,), depth=True)
    assert (table.depth, table.depth_size) == (L, 6)
    assert derive(Residual(blocks=6), (X,)).depth_size is None


def test_the_multiplier_is_found_by_what_the_graph_adds_and_not_by_names():
    class Odd(Branch):
        def __init__(self, d):
            super().__init__(d)
            self.residual = nn.Linear(d, d)

        def forward(self, x):
            return self.residual(torch.tanh(self.down(F.relu(self.up(x)))))

    assert branches(Residual(block=Odd))[1] == {f"blocks.{i}.residual.{p}" for i in range(4) for p in ("weight", "bias")}


ADDS = {
    "in place": lambda x, f: x.clone().add_(f(x)),
    "the branch first": lambda x, f: f(x) + x,
    "torch.add": lambda x, f: torch.add(x, f(x)),
    "minus": lambda x, f: x - f(x),
    "dropout between": lambda x, f: x + F.dropout(f(x), 0.1),
    "drop path between": lambda x, f: x + f(x) * 1.0,
    "a reshape between": lambda x, f: (x.unflatten(1, (2, -1)) + f(x).unflatten(1, (2, -1))).flatten(1),
    "a number on the branch": lambda x, f: x + 0.3 * f(x),
}


@pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)
def test_an_addition_is_found_however_it_is_written(add):
    assert branches(Residual(add=add)) == (4, {f"blocks.{i}.down.{part}" for i in range(4) for part in ("weight", "bias")})


def test_a_norm_after_the_branch_carries_the_multiplier():
    class Normed(Branch):
        def __init__(self, d):
            super().__init__(d)
            self.after = nn.RMSNorm(d)

        def forward(self, x):
            return self.after(self.down(F.relu(self.up(x))))

    assert branches(Residual(block=Normed)) == (4, {f"blocks.{i}.after.weight" for i in range(4)})


def test_layer_scale_and_rezero_carry_the_multiplier():
    class Scaled(Branch):
        def __init__(self, d, size=1):
            super().__init__(d)
            self.gamma = nn.Parameter(torch.zeros(size))

        def forward(self, x):
            return self.gamma * self.down(F.relu(self.up(self.norm(x))))

    rule = derive(Residual(block=Scaled), (X,), depth=True)["blocks.0.gamma"]
    assert rule.exponent("adam", of=L) == -1  # ReZero, THEORY 4.1
    assert branches(Residual(block=lambda d: Scaled(d, d))) == (4, {f"blocks.{i}.gamma" for i in range(4)})


def test_norms_on_the_stream_move_by_their_share_of_depth():
    class After(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.branch, self.after = Branch(d, norm=False), nn.LayerNorm(d)

        def forward(self, x):
            return self.after(x + self.branch(x))

    table = derive(Residual(block=After, add=lambda x, f: f(x)), (X,), depth=True)
    assert table.depth_size == 4
    assert powers(table["blocks.1.branch.up.weight"])["sgd"] == 1
    gain = powers(table["blocks.1.after.weight"])
    assert (gain["adam"], gain["sgd"], gain["eps"], gain["init_std"]) == (-1, -1, 0, 0)
    assert powers(table["norm.weight"])["adam"] == 0


class Parallel(nn.Module):
    def __init__(self, d, first):
        super().__init__()
        self.norm, self.one, self.two, self.first = nn.LayerNorm(d), Branch(d, norm=False), Branch(d, norm=False), first

    def forward(self, x):
        y = self.norm(x)
        return (self.one(y) + self.two(y)) + x if self.first else x + self.one(y) + self.two(y)


@pytest.mark.parametrize("first", [True, False])
def test_parallel_branches_are_two_however_the_sum_is_written(first):
    table = derive(Residual(blocks=3, block=lambda d: Parallel(d, first), add=lambda x, f: f(x)), (X,), depth=True)
    assert table.depth_size == 6
    assert powers(table["blocks.0.norm.weight"]) == powers(table["blocks.0.one.up.weight"])
    assert table.residual.shared == ()


def test_residuals_inside_a_branch_belong_to_the_branch():
    class Nested(Branch):
        def forward(self, x):
            y = self.norm(x)
            return self.down(F.relu(self.up(y + torch.tanh(y @ self.up.weight.T @ self.up.weight))))

    size, carriers = branches(Residual(block=Nested))
    assert size == 4
    assert carriers == {f"blocks.{i}.down.{part}" for i in range(4) for part in ("weight", "bias")}


def test_a_skip_around_the_whole_body_is_no_block():
    class Super(Residual):
        def forward(self, x):
            first = x = self.embed(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(first + self.body(x))

        def __init__(self):
            super().__init__(blocks=5)
            self.body = nn.Linear(32, 32)

    size, carriers = branches(Super())
    assert (size, "body.weight" in carriers) == (5, False)


class ConvNet(nn.Module):
    """Two stages; the first block of the second has a strided projection on its shortcut."""

    class Block(nn.Module):
        def __init__(self, before, after, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
            self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after)) if stride > 1 else nn.Identity()

        def forward(self, x):
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))

    def __init__(self, d=16):
        super().__init__()
        sizes = [(d, d, 1), (d, d, 1), (d, 2 * d, 2), (2 * d, 2 * d, 1)]
        self.stem, self.blocks = nn.Conv2d(3, d, 3, 1, 1), nn.Sequential(*(self.Block(*size) for size in sizes))
        self.head = nn.Linear(2 * d, 10)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def test_a_block_with_a_projection_on_its_shortcut_is_a_residual_block():
    table = derive(ConvNet(), (torch.zeros(2, 3, 8, 8),), depth=True)
    assert table.depth_size == 4
    assert {name for branch in table.residual.branches for name in branch.folded} == {
        f"blocks.{i}.bn2.{part}" for i in range(4) for part in ("weight", "bias")
    }
    assert powers(table["blocks.2.conv1.weight"])["sgd"] == 1
    assert powers(table["blocks.2.short.0.weight"])["sgd"] == 0


def test_encoder_and_decoder_are_streams_of_their_own():
    class Both(nn.Module):
        def __init__(self, d=32):
            super().__init__()
            self.embed, self.start, self.head = nn.Linear(16, d), nn.Linear(16, d), nn.Linear(d, 10)
            self.encoder, self.decoder = (nn.ModuleList(Branch(d) for _ in range(n)) for n in (2, 4))
            self.reads = nn.ModuleList(nn.Linear(d, d) for _ in range(4))
            self.norm = nn.LayerNorm(d)

        def forward(self, x):
            memory, y = self.embed(x), self.start(x)
            for block in self.encoder:
                memory = memory + block(memory)
            memory = self.norm(memory)
            for block, read in zip(self.decoder, self.reads, strict=True):
                y = y + block(y * torch.sigmoid(read(memory)))
            return self.head(y)

    table = derive(Both(), (X,), depth=True)
    assert table.depth_size == 4
    assert {branch.scale for branch in table.residual.branches} == {1 / L, 2 / L}
    assert powers(table["reads.1.weight"])["sgd"] == 1
    assert powers(table["norm.weight"])["sgd"] == 0


# --- what is refused ----------------------------------------------------------------------------------------------------------------


def test_a_stack_without_residual_connections_is_refused_with_its_line():
    model = Residual(blocks=6, add=lambda x, f: f(x))
    with pytest.raises(
        NoResidualBranches, match=r"14 layers follow each other.*no value is added[\s\S]*at .*test_depth.py:\d+: x = self.embed"
    ):
        derive(model, (X,), depth=True)
    assert len(derive(model, (X,)).rules) > 0


def test_one_skip_around_a_plain_stack_is_refused():
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())))
            self.stem = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            x = self.stem(x)
            return x - self.body(x)

    with pytest.raises(NoResidualBranches, match="the longest chain of residual branches has 1"):
        derive(Denoiser(), (torch.zeros(1, 3, 8, 8),), depth=True)


@pytest.mark.parametrize(
    ("depth", "why"), [(0, "α < 1/2"), ("1/3", "α < 1/2"), (0.4, "α < 1/2"), ("3/2", "branches vanish"), ("two", "no rational")]
)
def test_an_alpha_outside_of_one_half_to_one_is_refused_with_the_reason(depth, why):
    with pytest.raises(UnstableDepth, match=why):
        derive(Residual(), (X,), depth=depth)


def test_depth_takes_alpha_as_text_number_or_rational():
    wanted = derive(Residual(), (X,), depth=sympy.Rational(1, 2))
    assert derive(Residual(), (X,), depth="1/2") == derive(Residual(), (X,), depth=0.5) == wanted
    assert derive(Residual(), (X,), depth=True) == derive(Residual(), (X,), depth=1)
