"""What users and the tools around them do to an optimizer: what is mistaken is refused with a reason, the rest goes on as it should."""

import copy
import io
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
import sympy
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import lr_scheduler, swa_utils

from compiler import SpectralOptimizer, clip_grad_norm_, msign, spectral_norm, spectral_normalize, svc
from compiler.errors import BadGradient, BadOption, BadState, NotAMatrix
from compiler.maps import MAPS
from compiler.options import NEW_OPTIONS
from compiler.updates import UPDATES
from scaling.errors import UnknownName


def weight(*shape, dtype=torch.float32, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def train(optimizer, weights, steps=range(3), schedule=None):
    for step in steps:
        for i, W in enumerate(weights):
            W.grad = torch.randn(W.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(W)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def same(optimizer, weights, other, others):
    """Whether weights and state are the same to the bit."""
    for W, V in zip(weights, others, strict=True):
        a, b = optimizer.state[W], other.state[V]
        if not torch.equal(W, V) or a.keys() != b.keys():
            return False
        if not all(torch.equal(torch.as_tensor(value), torch.as_tensor(b[name])) for name, value in a.items()):
            return False
    return True


# --- options ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["foreach", "fused", "nesterov", "amsgrad", "dampening", "ns_steps", "weight_decy", "beta", "maximise", "process_group"],
)
def test_an_option_of_torchs_or_a_misspelt_one_is_refused(key):
    """In torch's optimizers it is kept in the group and does nothing."""
    with pytest.raises(UnknownName, match=f"unknown option of a group '{key}'; known: lr, update"):
        SpectralOptimizer([{"params": [weight(4, 6)], key: True}], 0.1)


def test_a_group_may_hold_what_its_owner_and_schedulers_like():
    W = weight(4, 6)
    off = {"foreach": None, "fused": False, "differentiable": False, "nesterov": False, "dampening": 0}
    optimizer = SpectralOptimizer([{"params": [W], "name": "body", "layer": 3, "lr_mult": 2.0, **off}], 0.1)
    lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=5)
    again = SpectralOptimizer(optimizer.param_groups, 0.1)
    train(again, [W])
    assert again.param_groups[0]["layer"] == 3
    with pytest.raises(TypeError, match="unexpected keyword argument 'foreach'"):
        SpectralOptimizer([W], 0.1, foreach=True)


@pytest.mark.parametrize("key", ["maximize", "capturable", "master", "workspace", "nonfinite", "lr_mult", "blocks"])
def test_an_option_that_no_block_has_for_itself_is_refused(key):
    axes = [[[4, "out", 0, 4]], [[6, "in", 0, 6]]]
    with pytest.raises(UnknownName, match=f"unknown option of a block '{key}'; known: axes, lr"):
        SpectralOptimizer([{"params": [weight(4, 6)], "blocks": [{"axes": axes, key: True}]}], 0.1)


@pytest.mark.parametrize("option", ["strict", "maximize", "capturable", "master"])
@pytest.mark.parametrize("value", ["no", "False", None, 2, 0.5])
def test_a_switch_is_true_or_false(option, value):
    with pytest.raises(BadOption, match=f"{option}=.*True or False"):
        SpectralOptimizer([weight(4, 6)], 0.1, **{option: value})


@pytest.mark.parametrize("option", ["lr", "weight_decay", "momentum", "eps", "clip", "workspace", "betas"])
@pytest.mark.parametrize("value", [None, "0.1", 1j, [0.1], object()])
def test_what_is_no_number_is_refused_by_name(option, value):
    with pytest.raises(BadOption, match=f"^{option}="):
        SpectralOptimizer([weight(4, 6)], **{"lr": 0.1, option: value})


@pytest.mark.parametrize("option", ["momentum", "eps", "clip"])
def test_only_what_schedules_write_may_be_a_tensor(option):
    """It would be read by the host in every step."""
    with pytest.raises(BadOption, match=f"{option}=tensor"):
        SpectralOptimizer([weight(4, 6)], 0.1, **{option: torch.tensor(0.5)})


@pytest.mark.parametrize("of", [np.float32, np.float64, Fraction, sympy.Rational], ids=str)
def test_numbers_of_other_packages_become_floats(of):
    """torch.load refuses numpy's in a checkpoint."""
    half, axes = of(1) / of(2), [[[4, "out", 0, 4]], [[6, "in", 0, 6]]]
    W = weight(4, 6)
    groups = [{"params": [W], "lr_scale": half, "blocks": [{"axes": axes, "wd_scale": half}]}]
    optimizer = SpectralOptimizer(groups, half, weight_decay=half, momentum=half)
    train(optimizer, [W])
    group = optimizer.state_dict()["param_groups"][0]
    json.dumps(group)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file)["param_groups"][0]["lr"] == 0.5
    assert all(type(group[name]) is float for name in ("lr", "weight_decay", "momentum", "lr_scale"))
    assert type(group["blocks"][0]["wd_scale"]) is float
    optimizer.param_groups[0]["lr"] = half  # as a schedule of one's own may write it
    train(optimizer, [W])


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("lr", -1e-3, BadOption),  # a linear decay that has gone past its end climbs the loss
        ("lr", float("nan"), BadOption),
        ("lr", None, BadOption),
        ("weight_decay", -0.1, BadOption),
        ("momentum", 1.5, BadOption),
        ("betas", (0.9,), BadOption),
        ("map", "mzign", UnknownName),
        ("update", "adm", UnknownName),
        ("accuracy", "hi", UnknownName),
    ],
)
def test_an_option_that_is_written_and_makes_no_sense_is_refused_and_the_step_not_taken(name, value, error, capturable):
    V, W = weight(4, 6), weight(4, 6)
    optimizer = SpectralOptimizer([{"params": [V]}, {"params": [W]}], 0.1, "adam", capturable=capturable)
    train(optimizer, [V, W])
    before = copy.deepcopy((optimizer, [V, W]))
    optimizer.param_groups[1][name] = value
    with pytest.raises(error, match=name):
        train(optimizer, [V, W], [3])
    assert same(optimizer, [V, W], *before)
    optimizer.param_groups[1][name] = before[0].param_groups[1][name]
    train(optimizer, [V, W], [3]), train(*before, [3])
    assert same(optimizer, [V, W], *before)


def test_an_lr_that_requires_a_gradient_can_be_copied():
    W = weight(4, 6)
    optimizer = SpectralOptimizer([W], torch.tensor(0.1, requires_grad=True))
    train(*copy.deepcopy((optimizer, [W])))


# --- weights ------------------------------------------------------------------------------------------------------------------


def test_a_weight_twice_is_refused():
    W = weight(4, 6)
    with pytest.raises(ValueError, match="more than one parameter group"):
        SpectralOptimizer([{"params": [W]}, {"params": [W]}], 0.1)
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(BadOption, match=r"a.*twice"):
        SpectralOptimizer([("a", W), ("b", W)], 0.1)


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8])
def test_weights_that_are_no_real_numbers_of_16_bits_are_refused(map, dtype):
    W = nn.Parameter(torch.zeros(3, 3).to(dtype), requires_grad=dtype.is_floating_point)
    with pytest.raises(NotAMatrix, match="only real floating point weights of 16 bits"):
        SpectralOptimizer([W], 0.1, map=map)


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", UPDATES)
def test_weights_on_meta_take_a_step_that_makes_their_state(map, update):
    """As memory is estimated before a model is made."""
    W = nn.Parameter(torch.empty(40, 60, device="meta"))
    optimizer = SpectralOptimizer([W], 0.1, update, map)
    for _ in range(3):
        W.grad = torch.empty_like(W)
        optimizer.step()
    assert all(value.device.type == "meta" for value in optimizer.state[W].values() if isinstance(value, torch.Tensor))


def test_weights_that_were_left_behind_on_meta_are_told():
    """to_empty makes new ones, which the optimizer never hears of: it would have trained nothing, and said nothing."""
    with torch.device("meta"):
        model = nn.Linear(6, 4, bias=False)
    optimizer = SpectralOptimizer(model.named_parameters(), 0.1)
    model.to_empty(device="cpu")
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(BadGradient, match=r"no gradient of weight\n.*make the optimizer after model.to_empty"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
@pytest.mark.parametrize("capturable", [False, True])
def test_weights_without_entries_are_passed_over(shape, capturable):
    E, W = nn.Parameter(torch.zeros(shape)), weight(4, 6)
    optimizer = SpectralOptimizer([{"params": [E], "map": None}, {"params": [W]}], 0.1, capturable=capturable)
    before = W.detach().clone()
    train(optimizer, [E, W])
    assert not torch.equal(W, before)
    assert clip_grad_norm_(optimizer, 1.0) > 0
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, [E, W])


def test_a_weight_that_is_frozen_and_thawed_goes_on_from_its_state():
    """Alone its gradients are missing; the same as two optimizers would do."""
    V, W = weight(4, 6), weight(6, 4)
    a, b = copy.deepcopy((V, W))
    optimizer, of_a, of_b = SpectralOptimizer([V, W], 0.1), SpectralOptimizer([a], 0.1), SpectralOptimizer([b], 0.1)
    for step in range(6):
        W.requires_grad_(step not in (2, 3))
        optimizer.zero_grad(), of_a.zero_grad(), of_b.zero_grad()
        ((V @ W).pow(2).sum()).backward()
        a.grad, b.grad = V.grad, W.grad
        optimizer.step(), of_a.step(), of_b.step()
    assert torch.equal(V, a)
    assert torch.equal(W, b)


@pytest.mark.parametrize("update", ["momentum", "adam"])
@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_a_model_whose_dtype_changes_between_steps_goes_on(update, map, capturable, dtypes):
    """The bits that bf16 lacks are let go with it: taken for bits of fp32 they would have raised, and once back in bf16 been stale."""
    model = nn.Linear(6, 4, bias=False).to(dtypes[0])
    optimizer = SpectralOptimizer(model.parameters(), 0.01, update, map, master=True, capturable=capturable)
    for number, dtype in enumerate((*dtypes, *dtypes)):
        train(optimizer, list(model.to(dtype).parameters()), range(number, number + 2))
        assert ("low_bits" in optimizer.state[model.weight]) == (dtype == torch.bfloat16)
        assert model.weight.isfinite().all()
        assert model.weight.dtype == dtype


def test_a_sparse_gradient_is_refused_by_clipping_too():
    embedding, W = nn.Embedding(5, 3, sparse=True), weight(4, 6)
    optimizer = SpectralOptimizer([("w", W), ("table", embedding.weight)], 0.1, map=None)
    W.grad = torch.full((4, 6), 9.0)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(BadGradient, match="sparse gradient of table"):
        clip_grad_norm_(optimizer, 1.0)
    assert (W.grad == 9).all()


def test_clipping_is_for_groups_that_know_their_factors():
    W = weight(4, 6)
    W.grad = torch.ones(4, 6)
    for other in (torch.optim.AdamW([W]), [W], None):
        with pytest.raises(BadOption, match="a SpectralOptimizer; torch's clip_grad_norm_ serves others"):
            clip_grad_norm_(other, 1.0)
    for value in (None, "1", float("nan"), -1):
        with pytest.raises(BadOption, match="max_norm"):
            clip_grad_norm_(SpectralOptimizer([W], 0.1), value)


# --- checkpoints --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon])
def test_the_state_of_another_class_is_refused_and_nothing_is_loaded(of):
    """Buffers of the same name mean other things there, and its options would silently become the default ones."""
    W, V = weight(4, 6), weight(4, 6)
    theirs, ours = of([W], lr=0.5), SpectralOptimizer([V], 0.1)
    train(theirs, [W]), train(ours, [V])
    before = copy.deepcopy((ours, [V]))
    with pytest.raises(
        BadState, match=r"not the state of a SpectralOptimizer.*without update and map, but has .*\n.*nothing has been loaded"
    ):
        ours.load_state_dict(theirs.state_dict())
    assert same(ours, [V], *before)
    assert ours.param_groups[0]["lr"] == 0.1


def broken(state, how):
    state = copy.deepcopy(state)
    group = state["param_groups"][0]
    match how:
        case "shape":
            state["state"][0]["momentum_buffer"] = torch.zeros(6, 4)
        case "order":
            group["param_names"] = group["param_names"][::-1]
        case "name":
            group["map"] = "mzign"
        case "range":
            group["lr"] = -1.0
        case "matrix":
            state["param_groups"][1]["map"] = "sn"
    return state


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("shape", BadState, r"momentum_buffer of weight number 0 has shape \(6, 4\), the weight \(4, 6\)"),
        ("order", BadState, "in another order"),
        ("name", UnknownName, "mzign"),
        ("range", BadOption, "lr=-1"),
        ("matrix", NotAMatrix, "weight v of shape"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(how, error, says):
    def new():
        W = [weight(4, 6), weight(6, 4), weight(5)]
        groups = [{"params": [("a", W[0]), ("b", W[1])]}, {"params": [("v", W[2])], "map": None}]
        return SpectralOptimizer(groups, 0.1), W

    optimizer, W = new()
    train(optimizer, W)
    other, V = new()
    train(other, V, range(1))
    before = copy.deepcopy((other, V))
    with pytest.raises(error, match=says):
        other.load_state_dict(broken(optimizer.state_dict(), how))
    assert same(other, V, *before)
    assert other.param_groups[0]["map"] == "msign"
    other.load_state_dict(optimizer.state_dict())


def test_what_is_loaded_shares_no_memory_with_what_was_given():
    """torch's own optimizers go on in the buffers of the one whose state it was."""
    W, V = weight(4, 6), weight(4, 6)
    for update, map in (("momentum", "sn"), ("adam", "msign")):
        a, b = SpectralOptimizer([W], 0.1, update, map), SpectralOptimizer([V], 0.1, update, map)
        train(a, [W])
        before = copy.deepcopy((a, [W]))
        b.load_state_dict(a.state_dict())
        train(b, [V], range(3, 6))
        assert same(a, [W], *before)


@pytest.mark.parametrize("saved", [0.3, torch.tensor(0.3), torch.tensor([0.3], dtype=torch.float64)])
@pytest.mark.parametrize("here", [0.1, torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)])
def test_a_learning_rate_stays_a_number_or_a_tensor_as_it_is_here(saved, here):
    """A step compiled for a tensor is compiled anew for every float; a tensor of a checkpoint on the CPU would not be on the device."""
    W, V = weight(4, 6), weight(4, 6)
    a, b = SpectralOptimizer([W], saved, weight_decay=saved), SpectralOptimizer([V], here, weight_decay=here)
    b.load_state_dict(a.state_dict())
    for name in ("lr", "weight_decay"):
        now = b.param_groups[0][name]
        assert type(now) is type(here)
        assert float(now) == pytest.approx(0.3)
        if isinstance(here, torch.Tensor):
            assert (now.dtype, now.shape, now.device) == (here.dtype, here.shape, here.device)


def test_hooks_see_and_change_what_is_loaded():
    W, V = weight(4, 6, dtype=torch.bfloat16), weight(4, 6, dtype=torch.bfloat16)
    a, b = (SpectralOptimizer([w], 0.1, "adam", master=True) for w in (W, V))
    train(a, [W])
    seen = []

    def halved(_, state):
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.05
        state["state"][0]["exp_avg"] *= 0.5
        return state

    b.register_load_state_dict_pre_hook(halved)
    b.register_load_state_dict_post_hook(lambda o: seen.append(o.state[V]["exp_avg"].dtype))
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["lr"] == 0.05
    assert torch.equal(b.state[V]["exp_avg"], a.state[W]["exp_avg"] * 0.5)
    assert seen == [torch.float32]
    assert len(b._optimizer_load_state_dict_pre_hooks) == len(b._optimizer_load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", ["nesterov", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_bf16_weights_kept_to_fp32_loads_into_a_model_of_another_dtype_and_back(map, update, dtype):
    W = weight(4, 6, dtype=torch.bfloat16)
    a = SpectralOptimizer([W], 0.01, update, map, master=True)
    train(a, [W])
    V = nn.Parameter(W.detach().to(dtype))
    b = SpectralOptimizer([V], 0.01, update, map, master=True)
    b.load_state_dict(a.state_dict())
    b, [V] = pickle.loads(pickle.dumps(copy.deepcopy((b, [V]))))
    train(b, [V], range(3, 5)), train(a, [W], range(3, 5))
    torch.testing.assert_close(V.float(), W.float(), atol=0.02, rtol=0)
    if dtype == torch.bfloat16:
        assert same(a, [W], b, [V])
    X = nn.Parameter(V.detach().bfloat16())
    c = SpectralOptimizer([X], 0.01, update, map, master=True)
    c.load_state_dict(b.state_dict())
    train(c, [X], range(5, 7))
    assert c.state[X]["low_bits"].dtype == torch.int16


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("update", ["momentum", "adam"])
def test_one_cycle_a_group_added_and_a_checkpoint_together(capturable, tensor, update):
    """With momenta cycled too, capturable or not, lr a tensor or not: an interruption cannot be told from none."""

    def new(added):
        W = [weight(4, 6, seed=1), weight(6, 4, seed=2), weight(5, seed=3)]
        lr = torch.tensor(0.1) if tensor else 0.1
        optimizer = SpectralOptimizer([{"params": [("a", W[0])]}], lr, update, weight_decay=0.1, capturable=capturable)
        if added:
            add(optimizer, W)
        return optimizer, W

    def add(optimizer, W):
        optimizer.add_param_group({"params": [("b", W[1])], "lr_scale": 2.0, "map": "sn"})
        optimizer.add_param_group({"params": [("c", W[2])], "map": None, "update": "adam"})

    def cycle(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, [0.3] * 3, total_steps=12)

    a, W = new(added=False)
    train(a, W[:1])
    add(a, W)
    schedule = cycle(a)
    train(a, W, range(3, 6), schedule)
    file = io.BytesIO()
    torch.save([a.state_dict(), schedule.state_dict(), [w.detach() for w in W]], file)
    file.seek(0)
    saved = torch.load(file)
    b, V = new(added=True)
    for v, w in zip(V, saved[2], strict=True):
        v.data = w
    resumed = cycle(b)
    b.load_state_dict(saved[0]), resumed.load_state_dict(saved[1])
    train(a, W, range(6, 12), schedule), train(b, V, range(6, 12), resumed)
    assert same(a, W, b, V)
    moments = ("momentum", "betas", "lr", "max_lr", "initial_lr")
    assert [[g[name] for name in moments] for g in a.param_groups] == [[g[name] for name in moments] for g in b.param_groups]


def test_a_zero_redundancy_optimizer_holds_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        W, V = [weight(4, 6), weight(6, 4)], [weight(4, 6), weight(6, 4)]
        whole, parted = SpectralOptimizer(W, 0.1), ZeroRedundancyOptimizer(V, optimizer_class=SpectralOptimizer, lr=0.1)
        train(whole, W), train(parted, V)
        parted.consolidate_state_dict()
        parted.load_state_dict(parted.state_dict())
        for optimizer, weights in ((whole, W), (parted, V)):
            weights.append(weight(3, 3))
            optimizer.add_param_group({"params": weights[2:]})
            train(optimizer, weights, range(3, 5))
        assert all(torch.equal(w, v) for w, v in zip(W, V, strict=True))
    finally:
        dist.destroy_process_group()


def test_a_group_can_be_added_to_a_copy_and_to_a_loaded_one():
    """torch gives the defaults of such an optimizer one more name, differentiable."""
    W, V, X = weight(4, 6), weight(4, 6), weight(4, 6)
    optimizer = SpectralOptimizer([W], 0.1)
    copied, _ = copy.deepcopy((optimizer, W))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [V]}), copied.add_param_group({"params": [X]})
    train(optimizer, [W, V]), train(copied, [X])
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_copy_knows_all_options_and_is_independent():
    W = weight(4, 6)
    optimizer = SpectralOptimizer([{"params": [W], "blocks": [{"axes": [[[4, "out", 0, 4]], [[6, "in", 0, 6]]]}]}], 0.1, capturable=True)
    train(optimizer, [W])
    other, [V] = copy.deepcopy((optimizer, [W]))
    assert {name: other.param_groups[0][name] for name in NEW_OPTIONS} == {name: optimizer.param_groups[0][name] for name in NEW_OPTIONS}
    before = copy.deepcopy((optimizer, [W]))
    other.param_groups[0]["blocks"][0]["lr_scale"] = 9.0
    train(other, [V], range(3, 5))
    assert same(optimizer, [W], *before)
    assert "lr_scale" not in optimizer.param_groups[0]["blocks"][0]


# --- what is around an optimizer ----------------------------------------------------------------------------------------------


def test_hooks_of_a_step_run_around_it_in_copies_of_it_too():
    W, log = weight(4, 6), []
    optimizer = SpectralOptimizer([W], 0.1)
    optimizer.register_step_pre_hook(lambda o, *_: log.append(len(o.state)))
    optimizer.register_step_post_hook(lambda o, *_: log.append(len(o.state)))
    train(optimizer, [W], range(1))
    assert log == [0, 1]


def test_a_step_in_the_backward_pass():
    """One optimizer a weight, stepped as soon as its gradient is there, as torch's memory recipes do."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False))
    twin = copy.deepcopy(model)
    whole = SpectralOptimizer(twin.parameters(), 0.1)
    optimizers = {W: SpectralOptimizer([W], 0.1) for W in model.parameters()}

    def step(W):
        optimizers[W].step(), optimizers[W].zero_grad()

    for W in model.parameters():
        W.register_post_accumulate_grad_hook(step)
    for seed in range(3):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        twin(x).square().sum().backward()
        whole.step(), whole.zero_grad()
    for W, V in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(W, V)
        assert W.grad is None


def test_averages_of_weights_and_their_schedule():
    model = nn.Linear(6, 4, bias=False)
    optimizer = SpectralOptimizer(model.parameters(), 0.1)
    averaged, ema = swa_utils.AveragedModel(model), swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    seen = [model.weight.detach().clone()]
    for step in range(4):
        train(optimizer, [model.weight], [step], schedule)
        averaged.update_parameters(model), ema.update_parameters(model)
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(averaged.module.weight.detach(), torch.stack(seen[1:]).mean(0))
    assert not torch.equal(ema.module.weight, model.weight)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: an Optimizer by class, everything by the one it holds, whose state is moved by saving and loading it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.optimizer.load_state_dict({k: copy.deepcopy(v) for k, v in optimizer.state_dict().items()})

    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)
    param_groups = property(lambda self: self.optimizer.param_groups, lambda self, groups: setattr(self.optimizer, "param_groups", groups))

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def state_dict(self):
        return self.optimizer.state_dict()


def test_a_wrapper_that_holds_the_optimizer():
    W, V = weight(4, 6), weight(4, 6)
    a, b = Wrapper(SpectralOptimizer([W], 0.1)), SpectralOptimizer([V], 0.1)
    schedules = [lr_scheduler.CosineAnnealingLR(o, 5) for o in (a, b)]
    train(a, [W], range(3), schedules[0]), train(b, [V], range(3), schedules[1])
    a.param_groups = [dict(group) for group in a.param_groups]  # and one that writes the groups anew
    train(a, [W], range(3, 5)), train(b, [V], range(3, 5))
    assert same(a, [W], b, [V])


def test_a_class_made_of_it_at_runtime():
    """As Lightning wraps: the same attributes under a class made of both, without calling __init__."""
    W = weight(4, 6)
    optimizer = SpectralOptimizer([W], 0.1)

    class Lightning:
        def __init__(self, held):
            self.__dict__ = {k: v for k, v in held.__dict__.items() if k != "step"}
            self.__class__ = type("LightningSpectralOptimizer", (type(self), type(held)), {})
            self.held = held

        def step(self, closure=None):
            return self.held.step(closure)

    wrapped = Lightning(optimizer)
    assert isinstance(wrapped, torch.optim.Optimizer)
    train(wrapped, [W])
    assert wrapped.state_dict()["state"].keys() == {0}


# --- under what a step is taken -----------------------------------------------------------------------------------------------


class Deterministic:
    def __enter__(self):
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "a default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "deterministic algorithms": Deterministic,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("map", "strict"), [("msign", False), ("sn", False), ("sn", True), ("svc", False), (None, False)])
@pytest.mark.parametrize("update", ["nesterov", "adam"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_is_the_same_whatever_is_on_around_it(around, map, strict, update, capturable):
    """Loops have the whole step within autocast, which rounded the products of SN to bf16 and broke msign's."""
    V, W = ([weight(24, 40, seed=1), weight(40, 24, seed=2)] for _ in range(2))
    a, b = (SpectralOptimizer(X, 0.1, update, map, strict=strict, capturable=capturable) for X in (V, W))
    for step in range(4):
        train(a, V, [step])
        for w, v in zip(W, V, strict=True):
            w.grad = v.grad.clone()
        with AROUND[around]():
            b.step()
        clip_grad_norm_(b, 1.0)
    assert same(a, V, b, W)


@pytest.mark.parametrize("of", [msign, spectral_norm, spectral_normalize, lambda X: svc(X, 0.5)])
def test_maps_do_not_take_part_in_autocast(of):
    X = torch.randn(20, 30)
    expected = of(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(of(X), expected)


def test_the_closure_takes_part_in_autocast():
    model, seen = nn.Linear(6, 4, bias=False), []
    optimizer = SpectralOptimizer(model.parameters(), 0.1)

    def closure():
        loss = model(torch.ones(2, 6))
        seen.append(loss.dtype)
        loss.sum().backward()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(closure)
    assert seen == [torch.bfloat16]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, of its own
def test_a_compiled_step_within_autocast_is_the_same():
    torch._dynamo.reset()
    V, W = weight(24, 40), weight(24, 40)
    a, b = (SpectralOptimizer([X], torch.tensor(0.1)) for X in (V, W))
    step = torch.compile(b.step, fullgraph=True, backend="eager")
    for number in range(3):
        train(a, [V], [number])
        W.grad = V.grad.clone()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step()
    torch.testing.assert_close(V, W, atol=1e-5, rtol=1e-5)
