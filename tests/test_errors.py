"""Every error a user can cause in `derive`: what it says, where, and what to type next."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import MLP
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import compiler
from scaling import coordinate_check, derive, lint
from scaling.errors import (
    CannotMakeInputs,
    CannotMeasure,
    CaptureFailed,
    ConflictingUses,
    GraphsDiffer,
    MixedBlocks,
    NoSuchAxis,
    ScalingError,
    TooManyGrowingAxes,
    UnknownName,
    UnsupportedOperator,
    WrongWidth,
)


class OfAnObject(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.lin = nn.Linear(4, 4)

    def forward(self, batch):
        return self.lin(batch.x)


def test_inputs_that_cannot_be_made_up():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, batch):
            return self.lin(batch["x"])

    said = r"no inputs could be made up for Odd.forward\(batch\)(.|\n)*tried: batch=float32(.|\n)*pass them as to torch.export: "
    with pytest.raises(CannotMakeInputs, match=said + r"derive\(model, \(batch,\)\)"):
        derive(Odd())
    with pytest.raises(CannotMakeInputs, match=r"test_errors.py:\d+: return self.lin\(batch.x\)\n *what is asked for there is an object"):
        derive(OfAnObject())
    assert derive(Odd(), ({"x": torch.zeros(2, 4)},)).coverage.unreached == ()


def test_a_forward_that_raises_is_shown_with_its_line():
    with pytest.raises(
        CaptureFailed, match=r"MLP could not be recorded: RuntimeError(.|\n)*models.py:\d+: x = torch.tanh\(self.first\(x\)\)"
    ):
        derive(MLP(64), (torch.zeros(2, 3),))


class Forces(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_a_forward_that_differentiates_is_told_to_derive_what_it_differentiates():
    model = Forces(32)
    with pytest.raises(
        CaptureFailed, match=r"test_errors.py:\d+: return torch.autograd.grad\((.|\n)*derive the module whose output it differentiates"
    ):
        derive(model, torch.zeros(2, 3))
    assert derive(model.energy, torch.zeros(2, 3)).coverage.unreached == ()


@pytest.mark.parametrize("args", [(), (torch.zeros(2, 5),)])
def test_weights_that_have_no_shape_yet_are_named_and_what_gives_them_one(args):
    model = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 3))
    with pytest.raises(
        ScalingError, match=r"'0.weight', '0.bias' of Sequential are not initialised yet(.|\n)*run one forward first: model"
    ):
        derive(model, args or None)
    model(torch.zeros(2, 5))
    assert derive(model, args or None)["0.weight"].role == "input"


@pytest.mark.parametrize(("model", "more"), [("gpt2", {}), (None, {}), (lambda width: "gpt2", {"widths": (32, 64)})])
def test_what_is_no_model_is_told_what_derive_takes(model, more):
    with pytest.raises(
        ScalingError, match=r"(is the str 'gpt2'|is the NoneType None), but derive takes an nn.Module, a function of the width"
    ):
        derive(model, **more)


def test_an_operator_without_a_rule_that_consumes_a_weight():
    class LeastSquares(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.codes = nn.Linear(8, 32), nn.Parameter(torch.randn(32, 20))

        def forward(self, x):
            return torch.linalg.lstsq(self.codes, self.inp(x).T).solution

    with pytest.raises(
        UnsupportedOperator,
        match=r"no rule for aten.linalg_lstsq, which uses weight 'codes'(.|\n)*test_errors.py:\d+(.|\n)*operators.register",
    ):
        derive(LeastSquares(), torch.randn(2, 8))


def test_conflicting_uses_name_both_lines():
    """THEORY P18."""

    class Twice(nn.Module):
        def __init__(self, d=64):
            super().__init__()
            self.inp, self.w, self.out = nn.Linear(8, d), nn.Parameter(torch.randn(d, d)), nn.Linear(d, 5)

        def forward(self, x):
            h = F.linear(self.inp(x), self.w)
            return self.out((h[:, :, None] * self.w).sum(-1))

    with pytest.raises(
        ConflictingUses, match=r"weight 'w' is used more than once(.|\n)*F.linear\(self.inp\(x\), self.w\)(.|\n)*h\[:, :, None\] \* self.w"
    ):
        derive(Twice())


def test_three_growing_axes():
    """THEORY P19."""

    class Bilinear(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.inp, self.mix, self.out = nn.Linear(8, d), nn.Bilinear(d, d, d), nn.Linear(d, 5)

        def forward(self, x):
            h = self.inp(x)
            return self.out(self.mix(h, h))

    with pytest.raises(TooManyGrowingAxes, match=r"weight 'mix.weight' \[d, d, d\] has more than two growing axes"):
        derive(Bilinear, widths=(32, 64))


def test_widths_that_run_different_operators():
    def build(d):
        return nn.Sequential(nn.Linear(8, d), nn.ReLU() if d < 64 else nn.Tanh(), nn.Linear(d, 4))

    with pytest.raises(GraphsDiffer, match=r"d=32 and d=64 do not run the same operators(.|\n)*d=32: aten.relu(.|\n)*d=64: aten.tanh"):
        derive(build, widths=(32, 64))


def test_overrides_that_match_nothing():
    with pytest.raises(NoSuchAxis, match=r"fixed=\{'nope.\*': ...\} matches no weight; there are first.weight"):
        derive(MLP(64), fixed={"nope.*": 0})
    with pytest.raises(NoSuchAxis, match=r"grows=\{'head.bias': ...\} has no axis 1: the weights it matches have 1 axes"):
        derive(MLP(64), grows={"head.bias": 1})


def test_names_that_are_in_no_table():
    table = derive(MLP(64))
    with pytest.raises(UnknownName, match=r"unknown weight 'heads.weight'; known: first.weight"):
        table["heads.weight"]
    with pytest.raises(UnknownName, match=r"unknown quantity 'lr'; known: init_std"):
        table["head.weight"].exponent("lr")
    with pytest.raises(UnknownName, match=r"unknown heads 'shrink'; known: grow, fixed"):
        derive(MLP(64), heads="shrink")


def test_a_factory_without_widths_and_widths_without_a_factory():
    with pytest.raises(ScalingError, match="needs at least two widths"):
        derive(MLP, widths=(64,))
    with pytest.raises(ScalingError, match="widths= needs a function that builds the model"):
        derive(MLP(64), widths=(64, 128))


def test_a_quantity_in_which_blocks_differ_is_asked_of_a_block():
    class Mixed(nn.Module):
        def __init__(self, d=64):
            super().__init__()
            self.inp, self.mix = nn.Linear(8, d), nn.Linear(d + 16, d)

        def forward(self, x, c):
            return self.mix(torch.cat([self.inp(x), c], -1))

    rule = derive(Mixed(), (torch.zeros(2, 8), torch.zeros(2, 16)))["mix.weight"]
    with pytest.raises(MixedBlocks, match=r"the blocks of 'mix.weight' differ in fan_in: d, 16(.|\n)*blocks\[0\].fan_in"):
        _ = rule.fan_in
    with pytest.raises(MixedBlocks, match="differ in adam: -1, 0"):
        rule.exponent("adam")
    assert rule.exponent("copies") == 0


def test_weights_that_nothing_uses_are_named():
    model = MLP(64)
    model.spare = nn.Linear(64, 64)
    table = derive(model)
    assert table.coverage.unreached == ("spare.weight", "spare.bias")
    assert "spare.weight" in str(table)


class Agent(nn.Module):
    """As reinforcement learning writes them: one method per thing that is asked, and no forward."""

    def __init__(self, d=32):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(6, d), nn.Tanh(), nn.Linear(d, 1))
        self.actor = nn.Sequential(nn.Linear(6, d), nn.Tanh(), nn.Linear(d, 3))

    def get_value(self, x):
        return self.critic(x)

    def get_action_and_value(self, x):
        return self.actor(x), self.critic(x)


def test_a_module_without_a_forward_is_told_which_methods_it_has_and_one_of_them_will_do():
    for inputs in ((), (torch.zeros(2, 6),)):
        with pytest.raises(ScalingError, match="Agent has no forward") as caught:
            derive(Agent(), *inputs)
    assert "get_value, get_action_and_value" in str(caught.value)
    assert "model.forward = model.get_action_and_value" in str(caught.value)
    model = Agent()
    model.forward = model.get_action_and_value
    assert derive(model).coverage.unreached == ()


# --- what a newcomer mistakes -------------------------------------------------------------------------------------------------


def test_models_of_one_shape_do_not_tell_what_grows():
    """A table of which every axis is fixed would have been called exact."""
    with pytest.raises(ScalingError, match=r"builds a MLP of the same shapes at widths 64 and 128, and nothing grows\n.*lambda d: "):
        derive(lambda _: MLP(64), widths=(64, 128))
    with pytest.raises(ScalingError, match=r"also= is a MLP of the same width.*\n.*wider"):
        derive(MLP(64), also=MLP(64))


@pytest.mark.parametrize("table", [None, "muon"])
def test_what_is_no_table_is_refused_by_all_that_carry_one_out(table):
    for call in (compiler.init_, lambda *both: compiler.compile(*both, lr=0.1), lambda *both: compiler.param_groups(*both, "adam", 0.1)):
        with pytest.raises(ValueError, match=r"table='(NoneType|str)': what derive\(model\) returns"):
            call(MLP(64), table)
    with pytest.raises(ValueError, match="table='MLP'"):
        compiler.compile(derive(MLP(64)), MLP(64), lr=0.1)


@pytest.mark.parametrize(
    ("wrap", "at"),
    [
        (torch.compile, "_orig_mod"),
        (nn.DataParallel, "module"),
        (lambda model: nn.Sequential(nn.Sequential(model)), "0.0"),
    ],
)
def test_a_model_that_is_wrapped_already_is_told_where_it_is(wrap, at):
    with pytest.raises(WrongWidth, match=f"a wrapper has it as '{re.escape(at)}.first.weight': pass model.{re.escape(at)}, and wrap it"):
        compiler.compile(wrap(MLP(64)), derive(MLP(64)), lr=0.1)


def test_a_model_where_a_function_of_the_width_is_meant():
    with pytest.raises(CannotMeasure, match=r"build is the MLP itself(.|\n)*lint\(lambda d: \(model, optimizer\)"):
        lint(MLP(64))


def test_a_pair_without_an_optimizer_is_called_what_it_is():
    with pytest.raises(CannotMeasure, match=r"build\(16\) returned \(MLP, NoneType\), not a pair"):
        coordinate_check(lambda d: (MLP(d), None), [(torch.zeros(2, 16), torch.zeros(2).long())], (16, 32))


def test_a_sharded_model_is_derived_before_it_is_sharded(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ScalingError, match=r"'0\.weight' of \w+ is sharded over ranks[\s\S]*derive first"):
            derive(model, torch.zeros(2, 8))
    finally:
        dist.destroy_process_group()
