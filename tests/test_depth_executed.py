"""Depth carried out: verdicts, printed tables, compiled models and optimizers, measured slopes in L (THEORY 4.3, 4.4, pitfalls P36-P40)."""

import copy
import math
import runpy

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

import compiler
from compiler.errors import BadOption, NotExpressible
from scaling import ScalingTable, derive, parametrization, verify
from scaling.depth import NoResidualBranches, UnstableDepth
from scaling.limits import DEPTH
from scaling.records import Parametrization
from tests.test_depth import Branch, Residual, X, powers

L = DEPTH


# --- proofs -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [True, "1/2"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon", "lamb"])
@pytest.mark.parametrize("gauge", ["table3", "table8", {"blocks.*.down.weight": "1/L"}])
def test_a_table_with_depth_is_proven_in_every_gauge(depth, optimizer, gauge):
    table = derive(Residual(), (X,), depth=depth).gauge(gauge)
    verdict = verify(table, optimizer=optimizer)
    assert verdict, str(verdict)
    assert {"stream", "changes", "deep decay"} <= {one.name for one in verdict.obligations}
    assert verify(table, against="table8", optimizer=optimizer)


def naive(table, family, **shifts):
    """The laws of a table with powers of L on top: `{pattern: {quantity: power}}`."""
    laws = parametrization(table, "spectral", family).laws
    for part, change in shifts.items():
        for name in laws:
            if part == "all" or (part == "blocks") == name.startswith("blocks."):
                law = laws[name][0]
                laws[name] = (law.model_copy(update={key: getattr(law, key) * L**power for key, power in change.items()}),)
    return Parametrization(name="naive", family=family, laws=laws)


def test_a_parametrization_without_depth_fails_for_its_stream_and_its_changes():
    deep, plain = derive(Residual(), (X,), depth="1/2"), derive(Residual(), (X,))
    laws = parametrization(plain, "spectral", "adam").laws
    verdict = verify(Parametrization(name="plain", family="adam", laws=laws), table=deep)
    failed = {(one.name, one.excess) for one in verdict.failed}
    assert failed == {("stream", sympy.Rational(1, 2)), ("changes", sympy.Integer(1))}
    assert "the stream grows as √L at init" in verdict.cures[0]
    assert "adam lr is L too large" in verdict.cures[1]
    assert not verify(deep, against=Parametrization(name="plain", family="adam", laws=laws))
    assert r"\sqrt{L}" in verdict.to_latex()
    assert type(verdict).from_json(verdict.to_json()) == verdict


def test_p38_a_depth_factor_on_the_learning_rate_of_all_weights_is_rejected():
    table = derive(Residual(), (X,), depth=True)
    right = parametrization(table, "spectral", "sgd")
    assert verify(right, table=table)
    wrong = verify(naive(table, "sgd", outside={"lr": 1, "weight_decay": -1}), table=table)
    assert {name for one in wrong.failed for name in one.names} == {r.name for r in table if not r.name.startswith("blocks.")}
    assert {one.excess for one in wrong.failed} == {sympy.Integer(1)}


def test_a_constant_epsilon_is_rejected_in_depth():
    table = derive(Residual(), (X,), depth=True)
    verdict = verify(naive(table, "adam", blocks={"eps": 1}), table=table)
    assert {one.name for one in verdict.failed} == {"deep eps"}


def test_a_hundred_blocks_are_proven_once():
    table = derive(Residual(blocks=100), (X,), depth=True)
    verdict = verify(table)
    assert verdict
    assert len(verdict.obligations) == len(verify(derive(Residual(blocks=3), (X,), depth=True)).obligations)


# --- the init alone -----------------------------------------------------------------------------------------------------------------


def gpt2_init(model, scale=1.0):
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.02 * (scale if name.endswith("down.weight") else 1))
    return model


def test_p37_the_init_of_gpt2_is_recognised_as_no_branch_multiplier():
    small = derive(gpt2_init(Residual(blocks=9), 1 / 3), (X,), depth=True)
    plain = derive(gpt2_init(Residual(blocks=9)), (X,), depth=True)
    default = derive(Residual(blocks=9), (X,), depth=True)
    (note,) = [note for note in small.notes if "init alone" in note]
    assert "1/√9" in note
    assert note in " ".join(str(small).split())
    assert not any("init alone" in note for note in (*plain.notes, *default.notes))
    assert small.rules == plain.rules


def test_p37_the_init_of_gpt2_is_replaced_and_not_kept_next_to_the_multiplier():
    table = derive(gpt2_init(Residual(blocks=9), 1 / 3), (X,), depth=True)
    model = compiler.init_(gpt2_init(Residual(blocks=9), 1 / 3), table)
    std = model.blocks[4].down.weight.std()
    assert std.item() == pytest.approx(float(table["blocks.4.down.weight"].init_std.subs({L: 9, table.width: 32})), rel=0.1)


def test_p37_the_init_of_gpt2_alone_is_not_equivalent_to_a_branch_multiplier():
    table = derive(Residual(), (X,), depth="1/2")
    laws = parametrization(derive(Residual(), (X,)), "spectral", "adam").laws
    for name in [name for name in laws if name.endswith("down.weight")]:
        laws[name] = (laws[name][0].model_copy(update={"init_std": laws[name][0].init_std / sympy.sqrt(L)}),)
    verdict = verify(Parametrization(name="0.02/√(2L)", family="adam", laws=laws), table=table)
    assert {one.name for one in verdict.failed} >= {"changes"}
    assert not any(one.name == "stream" for one in verdict.failed)


# --- pitfalls of the forward --------------------------------------------------------------------------------------------------------


def test_p36_a_multiplier_on_the_stream_is_no_branch_multiplier():
    right = derive(Residual(blocks=4, add=lambda x, f: x + 0.25 * f(x)), (X,), depth=True)
    wrong = derive(Residual(blocks=4, add=lambda x, f: 0.25 * (x + f(x))), (X,), depth=True)
    assert all(branch.present == 1 / L and branch.folded == () for branch in right.residual.branches)
    assert right["blocks.0.down.weight"].exponent("init_std", of=L) == 0
    assert all(branch.present == 1 and branch.folded for branch in wrong.residual.branches)
    assert any("no branch multiplier" in note for note in wrong.notes)
    assert not any("no branch multiplier" in note for note in right.notes)


def test_p36_a_multiplier_on_some_branches_only_is_none_that_the_forward_has():
    model = Residual(blocks=4)
    model.add = lambda x, f: x + (0.25 if f is model.blocks[0] else 1) * f(x)
    table = derive(model, (X,), depth=True)
    assert all(branch.present == 1 and branch.folded for branch in table.residual.branches)


def test_p39_blocks_that_share_their_weights_refuse_alpha_one_half():
    with pytest.raises(UnstableDepth, match=r"every branch uses the same blocks.0.up.weight, blocks.0.down.weight[\s\S]*α = 1"):
        derive(Residual(shared=True), (X,), depth="1/2")
    table = derive(Residual(shared=True), (X,), depth=True)
    assert table.depth_size == 4
    assert set(table.residual.shared) == {rule.name for rule in table if rule.name.startswith("blocks.")}
    assert verify(table, optimizer="sgd")


def test_p39_the_unshared_sgd_rule_is_rejected_for_shared_blocks():
    table = derive(Residual(shared=True), (X,), depth=True)
    verdict = verify(naive(table, "sgd", blocks={"lr": 1, "weight_decay": -1}), table=table)
    assert {one.excess for one in verdict.failed if one.name == "changes"} == {sympy.Integer(1)}


def test_weights_repeated_a_fixed_number_of_times_are_not_shared_over_depth():
    class Twice(Branch):
        def forward(self, x):
            x = x + super().forward(x)
            return x + super().forward(x)

    table = derive(Residual(blocks=4, block=Twice, add=lambda x, f: f(x)), (X,), depth="1/2")
    assert (table.depth_size, table.residual.shared) == (8, ())


def test_one_table_that_all_branches_read_is_shared_over_depth():
    class Reads(Branch):
        def forward(self, pair):
            x, bias = pair
            return super().forward(x) * torch.sigmoid(bias)

    class Model(Residual):
        def __init__(self):
            super().__init__(block=Reads)
            self.bias = nn.Linear(16, 32)

        def forward(self, x):
            bias, x = self.bias(x), self.embed(x)
            for block in self.blocks:
                x = x + block((x, bias))
            return self.head(x)

    table = derive(Model(), (X,), depth="1/2")
    assert table.residual.shared == ("bias.weight", "bias.bias")
    found = powers(table["bias.weight"])
    assert (found["adam"], found["sgd"], found["eps"]) == (-sympy.Rational(1, 2), -1, sympy.Rational(1, 2))


def test_p40_concatenated_skips_are_no_residual_branches():
    class Dense(nn.Module):
        def __init__(self, d=16, layers=6):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(d * (i + 1), d) for i in range(layers))
            self.first = nn.Linear(16, d)

        def forward(self, x):
            parts = [self.first(x)]
            for layer in self.layers:
                parts.append(F.relu(layer(torch.cat(parts, 1))))
            return torch.cat(parts, 1)

    with pytest.raises(NoResidualBranches, match="no value is added"):
        derive(Dense(), (X,), depth=True)


def test_p40_the_concatenated_skips_of_a_unet_have_no_multiplier():
    class UNet(nn.Module):
        def __init__(self, d=16):
            super().__init__()
            self.embed, self.down, self.merge, self.head = nn.Linear(16, d), nn.Linear(d, d), nn.Linear(2 * d, d), nn.Linear(d, 10)
            self.inner, self.outer = (nn.ModuleList(Branch(d) for _ in range(2)) for _ in range(2))

        def forward(self, x):
            x = self.embed(x)
            for block in self.outer:
                x = x + block(x)
            y = self.down(x)
            for block in self.inner:
                y = y + block(y)
            return self.head(self.merge(torch.cat((x, y), 1)))

    table = derive(UNet(), (X,), depth=True)
    assert table.depth_size == 4
    for name in ("down.weight", "merge.weight", "head.weight"):
        assert powers(table[name])["sgd"] == powers(table[name])["init_std"] == 0
    assert powers(table["inner.0.up.weight"])["sgd"] == 1


# --- where no weight can carry the multiplier ---------------------------------------------------------------------------------------


class Unscaled(Branch):
    """Ends in a norm without a gain."""

    def __init__(self, d):
        super().__init__(d, norm=False)
        self.last = nn.LayerNorm(d, elementwise_affine=False)

    def forward(self, x):
        return self.last(self.down(F.relu(self.up(x))))


def test_a_branch_without_a_weight_at_its_end_is_multiplied_in_the_forward():
    torch.manual_seed(0)
    table = derive(Residual(block=Unscaled), (X,), depth=True)
    branch = table.residual.branches[1]
    assert (branch.folded, branch.forward, branch.at) == ((), 1 / L, "blocks.1.last")
    assert "multiply by 1/L in the forward, on the output of blocks.[0-3].last" in " ".join(str(table).split())
    model, _ = compiler.compile(Residual(block=Unscaled), table, "adam", lr=1e-3)
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    model(torch.randn(4, 16))
    assert seen[0].square().mean().sqrt().item() == pytest.approx(1 / 4, rel=1e-3)
    assert verify(table)


def test_a_multiplier_that_no_module_can_have_is_to_be_written_by_hand():
    table = derive(Residual(block=lambda d: Branch(d), add=lambda x, f: x + F.normalize(f(x), dim=-1)), (X,), depth=True)
    assert all(branch.forward == 1 / L and branch.at == "" for branch in table.residual.branches)
    assert "by hand, before the addition" in " ".join(str(table).split())
    with pytest.raises(NotExpressible, match=r"no module alone ends it[\s\S]*test_depth_executed.py:\d+"):
        compiler.compile(Residual(), table, "adam", lr=1e-3)
    with pytest.raises(NotExpressible, match="no module"):
        compiler.emit(table, "/dev/null")


def test_a_last_map_with_another_use_is_not_scaled_behind_the_users_back():
    class Tied(Residual):
        def forward(self, x):
            return super().forward(x) + self.blocks[0].down(F.relu(self.embed(x)).repeat(1, 2)) @ self.head.weight.T

    table = derive(Tied(), (X,), depth=True)
    first, second = table.residual.branches[:2]
    assert (first.folded, first.forward, first.at) == ((), 1 / L, "blocks.0.down")
    assert second.folded == ("blocks.1.down.weight", "blocks.1.down.bias")


# --- compiled -----------------------------------------------------------------------------------------------------------------------


def trained(model, table, optimizer, steps=4, **options):
    model, opt = compiler.compile(model.double(), table, optimizer, lr=2**-4, init=None, **options)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        loss = F.cross_entropy(model(x), torch.arange(8) % 10)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "sign", "muon"])
def test_the_multiplier_in_the_forward_or_in_the_last_map_trains_the_same(optimizer):
    table = derive(Residual(), (X,), depth=True)
    folded, forward = Residual(), Residual()
    torch.manual_seed(3)
    compiler.init_(folded, table)
    moved = table.gauge({"blocks.*.down.weight": "1/L"})
    forward.load_state_dict(folded.state_dict())
    with torch.no_grad():
        for block in forward.blocks:
            block.down.weight.mul_(4)  # L = 4: exact in binary
    eps = {"eps": 2**-20} if optimizer == "adam" else {}
    one = trained(folded, table, optimizer, **eps)
    other = trained(forward, moved, optimizer, **eps)
    assert one == pytest.approx(other, rel=1e-9)
    assert one[-1] != one[0]


@pytest.mark.parametrize("family", ["sgd", "adam", "muon"])
def test_param_groups_hold_the_factors_at_the_models_depth(family):
    table, model = derive(Residual(blocks=8), (X,), depth="1/2"), Residual(blocks=8)
    groups = compiler.param_groups(model, table, family, lr=1.0, weight_decay=0.1, eps=1e-8)
    found = {name: group for group in groups for name in group["param_names"]}
    for rule in table:
        at = {L: 8, table.width: 32}
        assert found[rule.name]["lr"] == pytest.approx(float(rule.lr[family].subs(at)))
        assert found[rule.name]["weight_decay"] * found[rule.name]["lr"] == pytest.approx(0.1)
        if family == "adam":
            assert found[rule.name]["eps"] == pytest.approx(1e-8 * float(rule.eps.subs(at)))


def test_at_the_depth_and_width_of_the_base_everything_is_the_users_own():
    table, model = derive(Residual(), (X,), depth=True), Residual()
    before = copy.deepcopy(model.state_dict())
    model, opt = compiler.compile(model, table, "adam", lr=1e-3, base=32, base_depth=4)
    assert all(group["lr_scale"] == group["wd_scale"] == group["eps_scale"] == 1 for group in opt.param_groups)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_base_model_with_fewer_blocks_gives_the_ratios_of_its_depth():
    table = derive(Residual(blocks=8), (X,), depth="1/2")
    model, opt = compiler.compile(gpt2_init(Residual(blocks=8), 0.5), table, "adam", lr=1e-3, base=gpt2_init(Residual(blocks=2), 0.5))
    scales = {name: group["lr_scale"] for group in opt.param_groups for name in group["param_names"]}
    assert scales["blocks.7.up.weight"] == pytest.approx(4**-0.5)
    assert scales["blocks.7.down.weight"] == pytest.approx(1 / 4)
    assert scales["embed.weight"] == scales["norm.weight"] == scales["head.weight"] == 1
    assert model.blocks[7].down.weight.std().item() == pytest.approx(0.01 / 2, rel=0.1)
    assert model.blocks[7].up.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_table_with_depth_asks_for_the_depth_of_the_base():
    table = derive(Residual(), (X,), depth=True)
    with pytest.raises(BadOption, match="base_depth=None: the L of the base, as L = 4 is the model's"):
        compiler.param_groups(Residual(), table, "adam", lr=1e-3, base=64)
    with pytest.raises(BadOption, match="give base= as well"):
        compiler.param_groups(Residual(), table, "adam", lr=1e-3, base_depth=2)
    with pytest.raises(BadOption, match="derive the table with depth"):
        compiler.param_groups(Residual(), derive(Residual(), (X,)), "adam", lr=1e-3, base=64, base_depth=2)
    with pytest.raises(BadOption, match="base_depth"):
        compiler.param_groups(
            Residual(shared=True), derive(Residual(shared=True), (X,), depth=True), "adam", lr=1, base=Residual(shared=True)
        )


def test_the_emitted_file_takes_width_and_depth(tmp_path):
    table = derive(Residual(blocks=8, block=Unscaled), (X,), depth="1/2")
    emitted = runpy.run_path(str(compiler.emit(table, tmp_path / "deep.py")))
    model = Residual(blocks=8, block=Unscaled)
    ours = compiler.param_groups(model, table, "adam", lr=1e-3, base=16, base_depth=2)
    wanted = {name: group["lr"] for group in ours for name in group["param_names"]}
    groups = emitted["param_groups"](model, 32, 8, lr=1e-3, base=(16, 2))
    assert {name: group["lr"] for group in groups for name in group["param_names"]} == pytest.approx(wanted)
    emitted["init_"](model, 32, 8)
    emitted["multiply_"](model, 32, 8)
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    model(torch.randn(4, 16))
    assert seen[0].square().mean().sqrt().item() == pytest.approx(8**-0.5, rel=1e-3)


# --- written out --------------------------------------------------------------------------------------------------------------------


def test_every_format_shows_the_depth():
    table = derive(Residual(), (X,), depth=True)
    text = " ".join(str(table).split())
    assert "L = 4 residual branches" in text
    assert "×4: the branch is multiplied by 1/L, in the init and learning rate of blocks.[0-3].down.weight" in text
    assert "**Depth**" in table.to_markdown()
    assert r"\frac{1}{L}" in table.to_latex()
    assert "residual branches" in table.to_html()
    assert "Depth" not in str(derive(Residual(), (X,)))


def test_a_table_with_depth_is_read_back_equal():
    table = derive(Residual(block=Unscaled), (X,), depth="1/2")
    back = ScalingTable.from_json(table.to_json())
    assert back == table
    assert (back.depth_size, back.residual) == (4, table.residual)


def test_explain_derives_the_factors_of_depth():
    table = derive(Residual(shared=True), (X,), depth=True)
    inside, outside = (" ".join(table.explain(name).split()) for name in ("blocks.0.down.weight", "head.weight"))
    assert "β = 1/L is in its own size; its gradient has g = 1; its change has c = 1" in inside
    assert "every repeat uses this one weight: L gradients add up" in inside
    assert "outside of the residual branches: no factor of L" in outside
    assert "The depth" not in derive(Residual(), (X,)).explain("head.weight")


# --- measured (THEORY 4.3, 6.7) -----------------------------------------------------------------------------------------------------


class Measured(nn.Module):
    """A pre-norm residual stream of width 64 in which only the block weights are trained."""

    def __init__(self, blocks, d=64, shared=False):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(1 if shared else blocks))
        self.down = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(1 if shared else blocks))
        self.head, self.loops = nn.Linear(d, 10, bias=False).requires_grad_(requires_grad=False), blocks

    def stream(self, x):
        for i in range(self.loops):
            k = i % len(self.up)
            x = x + self.down[k](F.relu(self.up[k](F.layer_norm(x, x.shape[-1:]))))
        return x

    def forward(self, x):
        return self.head(self.stream(x))


RATES = {"adam": 2e-4, "sgd": 0.3, "muon": 0.01}


def measured(optimizer, blocks, depth, seed, steps, shared=False):
    """log2 of the stream's RMS at init and of its change after some steps."""
    torch.manual_seed(seed)
    model, x = Measured(blocks, shared=shared).double(), torch.randn(64, 64, dtype=torch.float64)
    table = derive(Measured(blocks, shared=shared), (torch.zeros(2, 64),), fixed={"head.weight": 0}, depth=depth)
    nn.init.normal_(model.head.weight, std=1 / 64)
    model, opt = compiler.compile(model, table, optimizer, lr=RATES[optimizer] * (64 if optimizer == "adam" else 1), eps=1e-12)
    labels = torch.randint(10, (64,))
    start = model.stream(x).detach()
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        opt.step()
    rms = [float(value.square().mean().sqrt()) for value in (start, model.stream(x).detach() - start)]
    return [math.log2(value) for value in rms]


def slopes(optimizer, depth, lengths, seeds=(0, 1), steps=3, shared=False):
    rows = torch.tensor([[measured(optimizer, n, depth, seed, steps, shared) for seed in seeds] for n in lengths]).mean(1)
    t = torch.tensor([math.log2(n) for n in lengths])
    t = t - t.mean()
    return [float((t * rows[:, i]).sum() / t.square().sum()) for i in range(2)]


CASES = [
    ("adam", "1/2", 0.15),
    ("adam", True, 0.25),
    ("sgd", "1/2", 0.15),
    ("sgd", True, 0.25),
    ("muon", "1/2", 0.15),
    ("muon", True, 0.25),
]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "depth", "tolerance"), CASES)
def test_stream_and_its_change_do_not_depend_on_depth(optimizer, depth, tolerance):
    found = slopes(optimizer, depth, (4, 8, 16, 32, 64))
    assert all(abs(slope) <= tolerance for slope in found), found


@pytest.mark.parametrize(("optimizer", "depth", "tolerance"), CASES)
def test_stream_and_its_change_are_flat_from_4_to_16_branches(optimizer, depth, tolerance):
    found = slopes(optimizer, depth, (4, 16), seeds=(0,), steps=1)
    assert all(abs(slope) <= tolerance for slope in found), found


def test_without_the_rules_of_depth_the_change_grows_from_4_to_16_branches():
    assert slopes("adam", False, (4, 16), seeds=(0,), steps=1)[1] >= 0.4


@pytest.mark.slow
def test_without_the_rules_of_depth_stream_and_change_grow():
    found = slopes("adam", False, (4, 8, 16, 32, 64))
    assert all(slope >= 0.4 for slope in found), found


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_p39_shared_blocks_are_flat_in_depth_at_alpha_one(optimizer):
    found = slopes(optimizer, True, (4, 8, 16, 32, 64), shared=True)
    assert all(abs(slope) <= 0.25 for slope in found), found
