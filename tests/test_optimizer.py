"""SpectralOptimizer: torch's contract, torch's own optimizers bit for bit, and the maps per block."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from compiler import SpectralOptimizer, clip_grad_norm_, msign, spectral_norm, svc
from compiler.blocks import block_view, plain
from compiler.errors import BadGradient, BadOption, NotAMatrix, NotShardable
from compiler.maps import MAPS
from compiler.options import NEW_OPTIONS
from compiler.updates import UPDATES
from scaling.errors import UnknownName

BIAS = {"map": None, "update": "adam"}


def parameters(*shapes, dtype=torch.float32, device="cpu"):
    return [nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]


def train(optimizer, weights, steps=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for W in weights:
            W.grad = torch.randn(W.shape, generator=generator).to(W)
        optimizer.step()
    return [W.detach().clone() for W in weights]


def twins(*shapes, dtype=torch.float32):
    ours = parameters(*shapes, dtype=dtype)
    return ours, [nn.Parameter(W.detach().clone()) for W in ours]


# --- torch's own optimizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_bit_identical_to_torch(dtype, weight_decay, maximize, momentum):
    ours, theirs = twins((33, 17), (7,), (3, 4, 5, 2), dtype=dtype)
    options = {"lr": 0.1, "weight_decay": weight_decay, "maximize": maximize, "momentum": momentum}
    a = train(SpectralOptimizer(ours, update="sgd", map=None, **options), ours)
    b = train(torch.optim.SGD(theirs, dampening=0, foreach=False, **options), theirs)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_adam_is_bit_identical_to_torch(dtype, weight_decay, maximize):
    ours, theirs = twins((33, 17), (7,), (3, 4, 5, 2), dtype=dtype)
    options = {"lr": 0.1, "weight_decay": weight_decay, "maximize": maximize, "betas": (0.8, 0.97), "eps": 1e-6}
    a = train(SpectralOptimizer(ours, update="adam", map=None, **options), ours)
    b = train(torch.optim.AdamW(theirs, foreach=False, **options), theirs)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_momentum_is_torch_muons(nesterov):
    """Same buffers as torch.optim.Muon; its update differs from the polar factor by its iteration only."""
    ours, theirs = twins((20, 30))
    a = SpectralOptimizer(ours, lr=0.1, update="nesterov" if nesterov else "momentum", momentum=0.9)
    b = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0)
    train(a, ours), train(b, theirs)
    assert torch.equal(a.state[ours[0]]["momentum_buffer"], b.state[theirs[0]]["momentum_buffer"])


def test_sign_with_and_without_momentum():
    W = parameters((3, 4))
    first = W[0].detach().clone()
    after = train(SpectralOptimizer(W, lr=0.5, update="sign", map=None, momentum=0.0), W, steps=1)[0]
    assert torch.equal((first - after).abs(), torch.full((3, 4), 0.5)) or torch.allclose((first - after).abs(), torch.full((3, 4), 0.5))
    assert torch.equal((first - after).sign(), W[0].grad.sign())


# --- the maps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_msign_moves_by_lr_times_the_polar_factor_of_the_base_update(update, shape, device):
    (mapped,), (plain_weight,) = (parameters(shape, dtype=torch.float64, device=device) for _ in range(2))
    with torch.no_grad():
        plain_weight.copy_(mapped)
    before, G = mapped.detach().clone(), torch.randn(shape).to(mapped)
    mapped.grad, plain_weight.grad = G.clone(), G.clone()
    SpectralOptimizer([mapped], 0.1, update, "msign", accuracy="exact").step()
    SpectralOptimizer([plain_weight], 1.0, update, None).step()
    torch.testing.assert_close((before - mapped) / 0.1, msign(before - plain_weight, accuracy="exact"), atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_every_map_on_a_plain_gradient(shape, device):
    X = torch.randn(shape, device=device)
    expected = {"msign": msign(X, accuracy="high"), "sn": X / spectral_norm(X), "svc": svc(X, 0.05 * 4)}
    for name in MAPS:
        W = nn.Parameter(torch.zeros(shape, device=device))
        W.grad = X.clone()
        group = {"params": [W], "lr_scale": 2.0, "clip_scale": 4.0}
        SpectralOptimizer([group], 0.1, "sgd", name, momentum=0.0, clip=0.05, accuracy="high").step()
        torch.testing.assert_close(W.detach(), -0.2 * expected[name], atol=1e-5, rtol=0)
        assert torch.equal(W.grad, X)


def test_sn_stays_near_one_along_a_training_run():
    W = nn.Parameter(torch.zeros(40, 60))
    optimizer = SpectralOptimizer([W], 1.0, "momentum", "sn")
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        before = W.detach().clone()
        W.grad = torch.randn(40, 4, generator=generator) @ torch.randn(4, 60, generator=generator)
        optimizer.step()
        assert torch.linalg.matrix_norm(W.detach() - before, 2).item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("capturable", [False, True])
def test_sn_after_a_first_gradient_of_zeros_is_as_good_as_at_the_first(capturable):
    """Zero-initialised projections give it to the weights before them; its vectors are of no use as a start."""
    W = nn.Parameter(torch.zeros(300, 400))
    optimizer = SpectralOptimizer([W], 1.0, "sgd", "sn", momentum=0.0, capturable=capturable)
    W.grad = torch.zeros(300, 400)
    optimizer.step()
    W.grad = torch.randn(300, 400)
    optimizer.step()
    assert torch.linalg.matrix_norm(W.detach(), 2).item() == pytest.approx(1, abs=1e-3)


def test_strict_sn_never_exceeds_one():
    W = nn.Parameter(torch.zeros(40, 60))
    W.grad = torch.randn(40, 60)
    SpectralOptimizer([W], 1.0, "sgd", "sn", strict=True, momentum=0.0).step()
    assert 0.7 < torch.linalg.matrix_norm(W.detach(), 2) <= 1


def test_batching_over_weights_changes_nothing():
    """Equal (min, max) shapes, tall and wide, in one batch: the same as one optimizer per weight."""
    shapes = [(6, 10), (10, 6), (6, 10), (6, 6)]
    for name in MAPS:
        together, apart = twins(*shapes, dtype=torch.float64)
        a = train(SpectralOptimizer(together, 0.1, "momentum", name), together)
        optimizers = [SpectralOptimizer([W], 0.1, "momentum", name) for W in apart]
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            for W, optimizer in zip(apart, optimizers, strict=True):
                W.grad = torch.randn(W.shape, generator=generator).to(W)
                optimizer.step()
        for x, y in zip(a, apart, strict=True):
            torch.testing.assert_close(x, y.detach(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("map", [*MAPS, None])
def test_a_small_workspace_changes_nothing(map):
    large, small = twins((6, 10), (10, 6), (6, 10))
    a = train(SpectralOptimizer(large, 0.1, map=map), large)
    b = train(SpectralOptimizer(small, 0.1, map=map, workspace=1), small)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


# --- blocks -------------------------------------------------------------------------------------------------------------------

D = 6
ROWS = {"q": (0, D), "k": (D, D + 2), "v": (D + 2, D + 4)}
QKV = [{"axes": [[[D + 4, "out", *rows]], [[D, "in", 0, D]]]} for rows in ROWS.values()]
INTERLEAVED = [{"axes": [[[4, "out", 0, 4], [2, "out", part, part + 1]], [[5, "in", 0, 5]]], "lr_scale": 1.0 + part} for part in range(2)]
EXPERTS = [{"axes": [[[3, "copy", 0, 3]], [[7, "in", 0, 7]], [[5, "out", 0, 5]]]}]
CONV = [{"axes": [[[8, "out", 0, 8]], [[4, "in", 0, 4]], [[3, "in", 0, 3]], [[3, "in", 0, 3]]]}]
GROUPED = [{"axes": [[[2, "copy", 0, 2], [4, "out", 0, 4]], [[3, "in", 0, 3]], [[3, "in", 0, 3]], []]}]


def test_each_block_of_a_fused_weight_is_mapped_for_itself():
    X = torch.randn(D + 4, D)
    W = nn.Parameter(torch.zeros_like(X))
    W.grad = X.clone()
    SpectralOptimizer([{"params": [W], "blocks": QKV}], 1.0, "sgd", momentum=0.0, accuracy="exact").step()
    for start, stop in ROWS.values():
        torch.testing.assert_close(-W.detach()[start:stop], msign(X[start:stop], accuracy="exact"))
        assert torch.linalg.matrix_norm(W.detach()[start:stop], 2).item() == pytest.approx(1, abs=1e-3)


def test_interleaved_blocks_with_factors_of_their_own():
    X = torch.randn(8, 5)
    W = nn.Parameter(torch.zeros_like(X))
    W.grad = X.clone()
    SpectralOptimizer([{"params": [W], "blocks": INTERLEAVED}], 1.0, "sgd", momentum=0.0, accuracy="exact").step()
    torch.testing.assert_close(-W.detach()[0::2], msign(X[0::2], accuracy="exact"))
    torch.testing.assert_close(-W.detach()[1::2], 2 * msign(X[1::2], accuracy="exact"))


def test_each_expert_in_in_out_layout_is_mapped_for_itself():
    X = torch.randn(3, 7, 5)
    W = nn.Parameter(torch.zeros_like(X))
    W.grad = X.clone()
    SpectralOptimizer([{"params": [W], "blocks": EXPERTS}], 1.0, "sgd", momentum=0.0, accuracy="exact").step()
    torch.testing.assert_close(-W.detach(), msign(X, accuracy="exact"))


def test_a_conv_kernel_is_one_matrix_of_out_times_in_taps():
    memory_format = torch.channels_last
    X = torch.randn(8, 4, 3, 3)
    W = nn.Parameter(torch.zeros_like(X).to(memory_format=memory_format))
    W.grad = X.clone().to(memory_format=memory_format)
    SpectralOptimizer([{"params": [W], "blocks": CONV}], 1.0, "sgd", momentum=0.0, accuracy="exact").step()
    torch.testing.assert_close(-W.detach().reshape(8, 36), msign(X.reshape(8, 36), accuracy="exact"))


def test_each_group_of_a_grouped_conv_is_mapped_for_itself():
    X = torch.randn(8, 3, 3, 1)
    W = nn.Parameter(torch.zeros_like(X))
    W.grad = X.clone()
    SpectralOptimizer([{"params": [W], "blocks": GROUPED}], 1.0, "sgd", momentum=0.0, accuracy="exact").step()
    torch.testing.assert_close(-W.detach().reshape(2, 4, 9), msign(X.reshape(2, 4, 9), accuracy="exact"))


def test_a_block_may_take_another_update_than_its_neighbour():
    """Hidden rows through msign of a momentum, finite rows through Adam, as two separate weights would."""
    X = torch.randn(9, 5)
    W = nn.Parameter(X.clone())
    blocks = [
        {"axes": [[[9, "out", 0, 6]], [[5, "in", 0, 5]]], "map": "msign", "update": "momentum"},
        {"axes": [[[9, "out", 6, 9]], [[5, "in", 0, 5]]], "map": None, "update": "adam", "lr_scale": 0.5, "wd_scale": 2.0},
    ]
    top, bottom = nn.Parameter(X[:6].clone()), nn.Parameter(X[6:].clone())
    fused = SpectralOptimizer([{"params": [W], "blocks": blocks}], 0.1, weight_decay=0.1)
    a, b = SpectralOptimizer([top], 0.1, weight_decay=0.1), torch.optim.AdamW([bottom], 0.05, weight_decay=0.2)
    for _ in range(3):
        W.grad = torch.randn(9, 5)
        top.grad, bottom.grad = W.grad[:6].clone(), W.grad[6:].clone()
        fused.step(), a.step(), b.step()
    torch.testing.assert_close(W.detach(), torch.cat([top, bottom]).detach())


def test_block_views_are_views_and_partition_the_weight():
    for blocks, shape in ((QKV, (D + 4, D)), (INTERLEAVED, (8, 5)), (EXPERTS, (3, 7, 5)), (GROUPED, (8, 3, 3, 1))):
        W = torch.zeros(shape)
        for number, block in enumerate(blocks):
            view, sizes = block_view(W, block["axes"])
            assert view.numel() == sizes[0] * sizes[1] * sizes[2]
            view += number + 1
        assert set(W.unique().tolist()) == set(range(1, len(blocks) + 1))


@pytest.mark.parametrize(
    "axes",
    [
        [[[5, "out", 0, 5]], [[4, "in", 0, 4]]],
        [[[6, "out", 0, 7]], [[4, "in", 0, 4]]],
        [[[6, "up", 0, 6]], [[4, "in", 0, 4]]],
        [[[6, "out", 0, 5]], [[4, "in", 0, 4]]],
        [[[6, "out", 0, 6]]],
    ],
)
def test_blocks_that_do_not_partition_the_weight_are_refused(axes):
    with pytest.raises(BadOption, match="blocks="):
        SpectralOptimizer([{"params": parameters((6, 4)), "blocks": [{"axes": axes}]}], 0.1)


# --- scales and schedulers ----------------------------------------------------------------------------------------------------


def test_the_scales_multiply_lr_decay_and_eps():
    ours, theirs = twins((6, 4))
    group = {"params": ours, "lr_scale": 0.25, "wd_scale": 4.0, "eps_scale": 100.0}
    a = train(SpectralOptimizer([group], 0.1, "adam", None, weight_decay=0.1, eps=1e-4), ours)[0]
    b = train(torch.optim.AdamW(theirs, lr=0.025, weight_decay=0.4, eps=1e-2), theirs)[0]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("map", [*MAPS, None])
def test_the_decay_per_step_is_lr_times_weight_decay_whatever_the_scale(map):
    W = nn.Parameter(torch.ones(4, 4))
    W.grad = torch.zeros(4, 4)
    SpectralOptimizer([{"params": [W], "lr_scale": 1 / 3, "wd_scale": 3.0}], 0.5, "momentum", map, weight_decay=0.1).step()
    torch.testing.assert_close(W.detach(), torch.full((4, 4), 0.95))


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.5**t),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=10, cycle_momentum=False),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5, eta_min=0.01),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5, min_lr=0.01),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_keep_the_ratio_of_effective_learning_rates(scheduler, tensor):
    W, V = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    lr = torch.tensor(0.1) if tensor else 0.1
    optimizer = SpectralOptimizer([{"params": [W], "lr_scale": 8.0}, {"params": [V], "lr_scale": 0.5}], lr, "sgd", None, momentum=0.0)
    schedule = SCHEDULERS[scheduler](optimizer)
    seen = set()
    for _ in range(6):
        W.grad, V.grad = torch.ones(4, 4), torch.ones(4, 4)
        before = W.detach().clone(), V.detach().clone()
        optimizer.step()
        schedule.step(*([1.0] if scheduler == "plateau" else []))
        moved = [(x - y.detach())[0, 0].item() for x, y in zip(before, (W, V), strict=True)]
        assert moved[0] / moved[1] == pytest.approx(16, rel=1e-4)
        seen.add(round(moved[0], 5))
    assert len(seen) > 2


# --- torch's contract ---------------------------------------------------------------------------------------------------------


def mixed(lr=0.1, **options):
    """Two matrices and a vector, named."""
    weights = parameters((6, 10), (10, 6), (7,))
    groups = [{"params": [("w.0", weights[0]), ("w.1", weights[1])]}, {"params": [("b", weights[2])], **BIAS}]
    return weights, SpectralOptimizer(groups, lr, **options)


def test_a_loop_that_applies_lr_scale_itself_is_told_so():
    """timm, MAE and many more: `group["lr"] = lr * group["lr_scale"]` where there is such a key."""
    groups = [{"params": [W], "lr_scale": factor} for W, factor in zip(parameters((4, 4), (4, 4), (4, 4)), (8.0, 0.5, 0.5), strict=True)]
    optimizer = SpectralOptimizer(groups, 0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.3 * group["lr_scale"]
    with pytest.warns(UserWarning, match="multiplied by its lr_scale already") as told:
        optimizer.step()
    assert told[0].filename == __file__
    for rates in ((0.1, 0.1, 0.1), (0.0, 0.0, 0.0), (0.8, 0.05, 0.04), (0.1, 0.2, 0.3)):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        optimizer.step()


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_continues_bit_for_bit(map, dtype):
    W, optimizer = mixed(map=map)
    for w in W:
        w.data = w.data.to(dtype)
    train(optimizer, W)
    buffer = io.BytesIO()
    torch.save({"weights": [w.detach() for w in W], "optimizer": optimizer.state_dict()}, buffer)
    expected = train(optimizer, W, seed=5)
    buffer.seek(0)
    saved = torch.load(buffer)
    V, resumed = mixed(map=map)
    for v, w in zip(V, saved["weights"], strict=True):
        v.data = w.clone()
    resumed.load_state_dict(saved["optimizer"])
    assert all(torch.equal(x, y) for x, y in zip(train(resumed, V, seed=5), expected, strict=True))


def test_group_options_are_plain_values_and_names_are_kept():
    _, optimizer = mixed()
    groups = optimizer.state_dict()["param_groups"]
    assert json.loads(json.dumps(groups)) == [{k: list(v) if isinstance(v, tuple) else v for k, v in g.items()} for g in groups]
    assert [g["param_names"] for g in groups] == [["w.0", "w.1"], ["b"]]
    assert {g["lr"] for g in groups} == {0.1}


def test_options_newer_than_a_checkpoint_get_their_default():
    _, optimizer = mixed()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for name in NEW_OPTIONS:
            if name not in ("update", "map"):
                del group[name]
    W, fresh = mixed()
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["accuracy"] == "default"
    train(fresh, W)


def test_deepcopy_and_pickle_go_on_as_the_original():
    W, optimizer = mixed()
    train(optimizer, W)
    copied = copy.deepcopy((W, optimizer))
    pickled = pickle.loads(pickle.dumps((W, optimizer)))
    expected = train(optimizer, W, seed=7)
    for other, its in (copied, pickled):
        assert all(torch.equal(x, y) for x, y in zip(train(its, other, seed=7), expected, strict=True))
        assert its.skipped == {}


def test_the_closure_runs_with_gradients_and_its_loss_is_returned():
    W = nn.Parameter(torch.ones(3, 3))
    optimizer = SpectralOptimizer([W], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = (W**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9
    assert optimizer.step() is None
    assert (W.detach() != 1).any()


@pytest.mark.parametrize("map", [*MAPS, None])
def test_grad_scaler_scales_back_and_skips_what_overflowed(map):
    """Scaled by a power of two the steps are the same to the bit."""
    W, optimizer = mixed(map=map)
    V, scaled = copy.deepcopy((W, optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    generator = torch.Generator().manual_seed(2)
    for step in range(4):
        factors = [torch.randn(w.shape, generator=generator) for w in W]
        if step == 2:
            factors[1][0, 0] = 1e38  # Inf once it is scaled: the scaler leaves the step out, all of it
            scaler.scale(sum((v * f).sum() for v, f in zip(V, factors, strict=True))).backward()
            before = [v.detach().clone() for v in V]
            scaler.step(scaled), scaler.update(), scaled.zero_grad()
            assert all(torch.equal(v, b) for v, b in zip(V, before, strict=True))
            continue
        sum((w * f).sum() for w, f in zip(W, factors, strict=True)).backward()
        scaler.scale(sum((v * f).sum() for v, f in zip(V, factors, strict=True))).backward()
        optimizer.step(), scaler.step(scaled), scaler.update()
        optimizer.zero_grad(), scaled.zero_grad()
        assert all(torch.equal(w, v) for w, v in zip(W, V, strict=True))
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(set_to_none):
    W, optimizer = mixed()
    train(optimizer, W, steps=1)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(w.grad is None if set_to_none else not w.grad.any() for w in W)


COMPILED = [pytest.param(map, marks=pytest.mark.slow if map == "sn" else ()) for map in (*MAPS, None)]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, of its own
@pytest.mark.parametrize("map", COMPILED)
def test_step_compiles_to_one_graph(map):
    """But for SN, whose sums over ranks dynamo cannot follow: more than one there. New numbers and a spoilt gradient do not recompile."""
    torch._dynamo.reset()
    W, optimizer = mixed(torch.tensor(0.1), map=map)
    V, compiled = copy.deepcopy((W, optimizer))
    step = torch.compile(compiled.step, fullgraph=map != "sn", backend="eager")
    generator = torch.Generator().manual_seed(4)
    for number in range(6):
        for w, v in zip(W, V, strict=True):
            w.grad = torch.randn(w.shape, generator=generator)
            v.grad = w.grad.clone()
        if number == 4:
            W[0].grad[0, 0] = V[0].grad[0, 0] = torch.nan
        for group in (*optimizer.param_groups, *compiled.param_groups):
            group["lr"].fill_(0.1 / (number + 1))
        optimizer.step()
        with torch._dynamo.config.patch(error_on_recompile=number > 3):
            step()
        for w, v in zip(W, V, strict=True):
            torch.testing.assert_close(w, v, atol=1e-5, rtol=1e-5)
    assert optimizer.skipped == compiled.skipped == {"w.0": 1}


def test_weights_without_gradient_are_left_alone():
    W, optimizer = mixed()
    W[0].grad = torch.randn(6, 10)
    before = [w.detach().clone() for w in W]
    optimizer.step()
    assert [torch.equal(w, b) for w, b in zip(W, before, strict=True)] == [False, True, True]
    assert list(optimizer.state) == [W[0]]
    optimizer.zero_grad()
    assert W[0].grad is None
    optimizer.step()


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_step_of_lr_0_and_gradient_0_changes_no_weight(map, update, lr):
    """torch.distributed.checkpoint takes one to make the state."""
    W = nn.Parameter(torch.randn(4, 6))
    before = W.detach().clone()
    W.grad = torch.zeros(4, 6)
    SpectralOptimizer([W], lr, update, map, weight_decay=0.1).step()
    assert torch.equal(W, before)


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_of_lr_0_and_gradient_0_leaves_a_running_state_as_it_is(map, update, lr, capturable):
    """Not the count of steps either, where torch's AdamW counts; a step of lr 0 alone, as warm-ups begin with, is a step."""
    W = parameters((4, 6))
    optimizer = SpectralOptimizer(W, 0.1, update, map, weight_decay=0.1, capturable=capturable)
    train(optimizer, W)
    before = copy.deepcopy(optimizer.state[W[0]])
    optimizer.param_groups[0]["lr"] = lr
    W[0].grad = torch.zeros(4, 6)
    optimizer.step()
    assert all(torch.equal(torch.as_tensor(now), torch.as_tensor(before[name])) for name, now in optimizer.state[W[0]].items())
    W[0].grad = torch.ones(4, 6)
    optimizer.step()
    assert not torch.equal(optimizer.state[W[0]]["exp_avg" if update == "adam" else "momentum_buffer"], next(iter(before.values())))


@pytest.mark.parametrize("map", MAPS)
def test_a_zero_gradient_moves_nothing_at_any_lr(map):
    W = nn.Parameter(torch.randn(4, 6))
    before = W.detach().clone()
    optimizer = SpectralOptimizer([W], 0.1, "adam", map)
    for _ in range(2):
        W.grad = torch.zeros(4, 6)
        optimizer.step()
    assert torch.equal(W, before)


def test_a_tensor_lr_is_the_same_as_a_float_and_not_shared_between_groups():
    a, b = twins((6, 4))
    lr = torch.tensor(0.25, dtype=torch.float64)
    expected = train(SpectralOptimizer(a, 0.25), a)[0]
    optimizer = SpectralOptimizer([{"params": b}, {"params": parameters((2, 2))}], lr)
    assert torch.equal(train(optimizer, b)[0], expected)
    optimizer.param_groups[0]["lr"].fill_(1.0)
    assert optimizer.param_groups[1]["lr"] == lr == 0.25


def test_add_param_group_joins_a_running_optimizer_and_a_bad_one_leaves_it_as_it_was():
    W = parameters((6, 4))
    optimizer = SpectralOptimizer(W, 0.1, map="sn")
    train(optimizer, W)
    V = parameters((6, 4), (4,))
    with pytest.raises(NotAMatrix, match=r"compiler\.compile"):
        optimizer.add_param_group({"params": V})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": V[:1]})
    before = V[0].detach().clone()
    train(optimizer, [*W, V[0]])
    assert not torch.equal(before, V[0])


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_never_modified_and_no_state_shares_their_memory(map, update, maximize):
    W = parameters((5, 8), dtype=torch.bfloat16)
    W[0].grad = torch.randn(5, 8).bfloat16()
    before = W[0].grad.clone()
    optimizer = SpectralOptimizer(W, 0.1, update, map, weight_decay=0.1, maximize=maximize)
    optimizer.step(), optimizer.step()
    assert torch.equal(W[0].grad, before)
    tensors = [value for value in optimizer.state[W[0]].values() if isinstance(value, torch.Tensor)]
    assert all(value.data_ptr() not in (W[0].data_ptr(), W[0].grad.data_ptr()) for value in tensors)


@pytest.mark.parametrize("map", [*MAPS, None])
def test_maximize_is_the_opposite_step(map):
    a, b = parameters((5, 8)), parameters((5, 8))
    b[0].data = a[0].data.clone()
    start = a[0].detach().clone()
    down = train(SpectralOptimizer(a, 0.1, map=map), a)[0]
    up = train(SpectralOptimizer(b, 0.1, map=map, maximize=True), b)[0]
    torch.testing.assert_close(down - start, start - up)


@pytest.mark.parametrize("map", [*MAPS, None])
def test_weights_and_gradients_need_not_be_contiguous(map):
    W = nn.Parameter(torch.randn(10, 6).mT)
    V = nn.Parameter(W.detach().clone(memory_format=torch.contiguous_format))
    a, b = SpectralOptimizer([W], 0.1, map=map), SpectralOptimizer([V], 0.1, map=map)
    for _ in range(3):
        V.grad = torch.randn(6, 10)
        W.grad = V.grad.mT.clone().mT
        a.step(), b.step()
    torch.testing.assert_close(W, V)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_skips_its_weight_and_its_state(bad):
    W, optimizer = mixed()
    train(optimizer, W)
    before = [w.detach().clone() for w in W]
    buffer = optimizer.state[W[1]]["momentum_buffer"].clone()
    for w in W:
        w.grad = torch.randn_like(w)
    W[1].grad[2, 3] = bad
    optimizer.step()
    assert [torch.equal(w, b) for w, b in zip(W, before, strict=True)] == [False, True, False]
    assert torch.equal(optimizer.state[W[1]]["momentum_buffer"], buffer)
    assert optimizer.skipped == {"w.1": 1}


def test_a_gradient_that_is_not_finite_can_raise_and_then_nothing_has_changed():
    W, optimizer = mixed(nonfinite="raise")
    before = [w.detach().clone() for w in W]
    for w in W:
        w.grad = torch.randn_like(w)
    W[2].grad[0] = float("nan")
    with pytest.raises(BadGradient, match="gradient of b"):
        optimizer.step()
    assert all(torch.equal(w, b) for w, b in zip(W, before, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("blocks", [None, [{"axes": [[[4, "out", 0, 4]], [[6, "in", 0, 6]]]}]])
def test_a_matrix_that_fsdp1_has_flattened_is_refused_by_name(blocks):
    W = nn.Parameter(torch.randn(4, 6))
    optimizer = SpectralOptimizer([{"params": [("mid", W)], "blocks": blocks}], 0.1)
    W.data = W.data.flatten()[:13]
    W.grad = torch.randn(13)
    with pytest.raises(NotShardable, match=r"'mid' has the shape \(13,\) now, and 2 axes.*\n.*fully_shard"):
        optimizer.step()


def test_sparse_gradients_are_refused_by_name():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = SpectralOptimizer(embedding.named_parameters(), 0.1, **BIAS)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(BadGradient, match=r"gradient of weight\n.*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": float("nan")}, "lr=nan: a finite number"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": torch.tensor([0.1, 0.2])}, "one element"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": float("nan")}, "eps=nan"),
        ({"clip": -1.0}, "clip=-1.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(BadOption, match=message):
        SpectralOptimizer(parameters((2, 2)), **{"lr": 0.1, **options})
    assert issubclass(BadOption, ValueError)


@pytest.mark.parametrize("option", ["update", "map", "accuracy", "nonfinite"])
def test_unknown_names_are_refused_with_the_known_ones(option):
    with pytest.raises(UnknownName, match=f"unknown {option} 'x'; known: "):
        SpectralOptimizer(parameters((2, 2)), 0.1, **{option: "x"})


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4)])
def test_what_is_not_a_matrix_is_refused_under_a_map(shape):
    with pytest.raises(NotAMatrix, match="map='msign' on weight b of shape"):
        SpectralOptimizer([("b", nn.Parameter(torch.zeros(shape)))], 0.1)
    with pytest.raises(NotAMatrix, match="complex64"):
        SpectralOptimizer([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], 0.1)


def test_a_plain_matrix_is_the_block_of_its_rows_and_columns():
    a, b = twins((6, 4))
    one = train(SpectralOptimizer(a, 0.1), a)[0]
    two = train(SpectralOptimizer([{"params": b, "blocks": [{"axes": plain((6, 4))}]}], 0.1), b)[0]
    assert torch.equal(one, two)


# --- clipping -----------------------------------------------------------------------------------------------------------------


def test_at_scale_one_clipping_is_torchs():
    ours, theirs = twins((5, 3), (4,))
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = clip_grad_norm_(SpectralOptimizer(ours, 0.1, map=None), 0.5)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 0.5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_clipping_weighs_every_block():
    W = nn.Parameter(torch.zeros(D + 4, D))
    W.grad = torch.ones(D + 4, D)
    blocks = [{**block, "norm_scale": float(i + 1)} for i, block in enumerate(QKV)]
    optimizer = SpectralOptimizer([{"params": [W], "blocks": blocks}], 0.1)
    expected = (6 * 6 * 1 + 2 * 6 * 4 + 2 * 6 * 9) ** 0.5
    assert clip_grad_norm_(optimizer, 2 * expected).item() == pytest.approx(expected)
    assert torch.equal(W.grad, torch.ones(D + 4, D))
    clip_grad_norm_(optimizer, expected / 2)
    torch.testing.assert_close(W.grad, torch.full((D + 4, D), 0.5))


def test_a_norm_that_is_not_finite_leaves_the_gradients_alone():
    W, optimizer = mixed()
    for w in W:
        w.grad = torch.ones_like(w)
    W[0].grad[0, 0] = float("inf")
    assert clip_grad_norm_(optimizer, 1.0).isinf()
    assert torch.equal(W[1].grad, torch.ones_like(W[1]))
    with pytest.raises(BadOption, match="max_norm"):
        clip_grad_norm_(optimizer, -1.0)
    optimizer.zero_grad()
    assert clip_grad_norm_(optimizer, 1.0) == 0
