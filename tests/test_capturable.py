"""step() as the device sees it: the host reads nothing, a spoilt weight keeps every bit, a CUDA graph replays it."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from compiler import SpectralOptimizer, kernels
from compiler.bits import LOW, join
from compiler.errors import BadGradient, NotReady
from compiler.maps import MAPS
from compiler.updates import UPDATES

READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "item", "masked_select", "unique_dim", "_unique2"}
"""Operators whose result, or its shape, the host waits for."""

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class NothingIsRead(TorchDispatchMode):
    """The CPU is taken for a device: what the host may look at only here, it does not."""

    def __enter__(self):
        self.held, kernels.holds = kernels.holds, lambda flags: False
        return super().__enter__()

    def __exit__(self, *error):
        kernels.holds = self.held
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in READS, f"the host reads {func}"
        return func(*args, **(kwargs or {}))


def model(device="cpu", dtype=torch.float32):
    shapes = (6, 10), (10, 6), (24, 10), (7,)
    return [
        nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device, dtype)) for i, shape in enumerate(shapes)
    ]


QKV = [{"axes": [[[24, "out", a, a + 8]], [[10, "in", 0, 10]]], "lr_scale": scale} for a, scale in ((0, 1.0), (8, 2.0), (16, 0.5))]


def optimizer_of(W, lr=0.1, **options):
    groups = [{"params": W[:2]}, {"params": [W[2]], "blocks": QKV}, {"params": [W[3]], "map": None, "update": "adam"}]
    return SpectralOptimizer(groups, lr, **{"capturable": True, "weight_decay": 0.1, **options})


def set_gradients(W, step):
    for i, w in enumerate(W):
        G = torch.randn(w.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(w)
        w.grad = G if w.grad is None else w.grad.copy_(G)


def state_of(optimizer, w):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in optimizer.state[w].items()}


def test_reading_is_noticed():
    with NothingIsRead(), pytest.raises(AssertionError, match="reads"):
        bool(torch.ones(2).sum() > 0)


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("number", [float, torch.tensor])
def test_the_host_reads_nothing(update, map, number):
    W = model()
    optimizer = optimizer_of(W, number(0.1), update=update, map=map, weight_decay=number(0.1))
    for step in range(3):
        set_gradients(W, step)
        with NothingIsRead():
            optimizer.step()


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("number", [float, torch.tensor])
def test_it_is_the_step_the_host_would_take(update, map, maximize, number):
    W, V = model(dtype=torch.float64), model(dtype=torch.float64)
    options = {"update": update, "map": map, "maximize": maximize}
    a = optimizer_of(W, number(0.1), **options)
    b = optimizer_of(V, 0.1, **options, capturable=False)
    for step in range(4):
        set_gradients(W, step), set_gradients(V, step)
        if step == 2:
            W[1].grad[0, 0] = V[1].grad[0, 0] = torch.nan
        a.step(), b.step()
        for w, v in zip(W, V, strict=True):
            torch.testing.assert_close(w, v, rtol=2e-6, atol=2e-6)  # a tensor lr is fp32
    assert a.skipped == b.skipped == {"0.1": 1}


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_spoilt_gradient_leaves_weight_and_state_as_they_are_to_the_bit(update, map, dtype, bad):
    W = model(dtype=dtype)
    optimizer = optimizer_of(W, update=update, map=map, master=True)
    for step in range(3):
        set_gradients(W, step)
        optimizer.step()
    set_gradients(W, 3)
    W[0].grad[2, 3] = W[2].grad[9, 9] = W[3].grad[0] = bad
    before, states = [w.detach().clone() for w in W], [state_of(optimizer, w) for w in W]
    with NothingIsRead():
        optimizer.step()
    kept = [torch.equal(w, b) for w, b in zip(W, before, strict=True)]
    assert kept == [True, False, True, True]
    for i in (0, 2, 3):
        assert all(torch.equal(torch.as_tensor(optimizer.state[W[i]][name]), torch.as_tensor(old)) for name, old in states[i].items())
    assert optimizer.skipped == {"0.0": 1, "1.0": 1, "2.0": 1}
    optimizer.step()
    assert optimizer.skipped["0.0"] == 2


def test_a_first_gradient_that_is_spoilt_leaves_a_state_of_zeros():
    W = model()
    optimizer = optimizer_of(W)
    set_gradients(W, 0)
    W[3].grad[0] = torch.nan
    optimizer.step()
    assert optimizer.state[W[3]]["step"] == 0
    assert not optimizer.state[W[3]]["exp_avg"].any()
    set_gradients(W, 1)
    optimizer.step()
    assert optimizer.state[W[3]]["step"] == 1


@pytest.mark.parametrize("update", ["sgd", "momentum", "sign"])
@pytest.mark.parametrize("number", [float, torch.tensor])
def test_a_rate_is_not_rounded_to_the_dtype_of_a_gradient(update, number):
    (w,) = W = [nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))]
    optimizer = SpectralOptimizer(W, number(0.001), update, None, momentum=0.0, capturable=True, master=True)
    w.grad = torch.ones_like(w)
    optimizer.step()
    torch.testing.assert_close(join(w.detach(), optimizer.state[w][LOW]), torch.full((4, 6), 0.999), rtol=0, atol=1e-7)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_half_precision_hides_no_overflow(bad, master):
    """The largest number of fp32, rounded to bf16, is Inf."""
    (w,) = W = [nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))]
    optimizer = SpectralOptimizer(W, 0.1, momentum=0.0, capturable=True, master=master)
    w.grad = torch.ones_like(w)
    w.grad[1, 2] = bad
    optimizer.step()
    assert w.eq(1).all()
    assert optimizer.skipped == {"0.0": 1}


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_the_range_of_fp64_is_that_of_fp64(size):
    W = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    optimizer = SpectralOptimizer([W], 0.0, capturable=True, momentum=0.5)
    for lr in (0.0, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        W.grad = torch.eye(4, dtype=torch.float64) * size
        optimizer.step()
    torch.testing.assert_close(W.data, -0.1 * torch.eye(4, dtype=torch.float64), rtol=2e-2, atol=0)
    assert (optimizer.state[W]["momentum_buffer"].diagonal() == 0.75 * size).all()


def test_raising_has_to_read_and_changes_nothing():
    W = model()
    optimizer = optimizer_of(W, nonfinite="raise")
    set_gradients(W, 0)
    W[1].grad[0, 0] = torch.inf
    before = [w.detach().clone() for w in W]
    with pytest.raises(BadGradient, match=r"gradient of 0\.1"):
        optimizer.step()
    assert all(torch.equal(w, b) for w, b in zip(W, before, strict=True))
    assert not optimizer.state


def test_a_schedule_on_the_device_is_followed():
    W, V = model(), model()
    lr, decay = torch.tensor(0.1), torch.tensor(0.1)
    a, b = optimizer_of(W, lr, weight_decay=decay, update="adam"), optimizer_of(V, 0.1, update="adam")
    for step in range(3):
        for group in a.param_groups:
            group["lr"].fill_(0.1 / (step + 1)), group["weight_decay"].fill_(0.1 * step)
        for group in b.param_groups:
            group["lr"], group["weight_decay"] = 0.1 / (step + 1), 0.1 * step
        set_gradients(W, step), set_gradients(V, step)
        a.step(), b.step()
    for w, v in zip(W, V, strict=True):
        torch.testing.assert_close(w, v, rtol=1e-5, atol=1e-5)


def test_a_state_dict_continues_bit_for_bit():
    W = model()
    optimizer = optimizer_of(W, update="adam", map="sn")
    set_gradients(W, 0)
    optimizer.step()
    V = copy.deepcopy(W)
    resumed = optimizer_of(V, update="adam", map="sn")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(1, 4):
        set_gradients(W, step), set_gradients(V, step)
        optimizer.step(), resumed.step()
    assert all(torch.equal(w, v) for w, v in zip(W, V, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton does not come with this torch")
def test_a_step_through_the_kernels_is_the_step_through_torch():
    here = Path(__file__).parent
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{here.parent}"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(here / "interpreted_step.py")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here.parent, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


# --- on CUDA ------------------------------------------------------------------------------------------------------------------


@CUDA
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("map", ["msign", "sn", None])
@pytest.mark.parametrize("update", UPDATES)
def test_on_cuda_no_step_waits_for_the_device(update, map):
    W = model("cuda")
    optimizer = optimizer_of(W, torch.tensor(0.1, device="cuda"), update=update, map=map, capturable=False)
    for step in range(4):
        set_gradients(W, step)
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@CUDA
@pytest.mark.parametrize("map", ["msign", "sn", None])
@pytest.mark.parametrize("update", UPDATES)
def test_a_cuda_graph_replays_the_step_bit_for_bit(update, map):
    W, V = model("cuda"), model("cuda")
    a = optimizer_of(W, torch.tensor(0.1, device="cuda"), update=update, map=map)
    b = optimizer_of(V, torch.tensor(0.1, device="cuda"), update=update, map=map)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for step in range(3):
            set_gradients(W, step), set_gradients(V, step)
            a.step(), b.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for step in range(3, 8):
        set_gradients(W, step), set_gradients(V, step)
        if step == 5:
            W[0].grad[0, 0] = V[0].grad[0, 0] = torch.nan
        for optimizer in (a, b):
            for group in optimizer.param_groups:
                group["lr"].fill_(0.1 / step)
        graph.replay(), b.step()
        assert all(torch.equal(w, v) for w, v in zip(W, V, strict=True))
    assert a.skipped == b.skipped == {"0.0": 1}


@CUDA
def test_a_graph_of_the_first_step_is_refused():
    W = model("cuda")
    optimizer = optimizer_of(W)
    set_gradients(W, 0)
    with pytest.raises(NotReady, match="one step outside"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@CUDA
@pytest.mark.parametrize("map", ["msign", "sn"])
def test_a_step_on_cuda_is_the_image_of_the_momentum(map):
    """Tall and wide, square, of no even size, and so many that it takes large tiles. SN's block sees Gaussian noise at its slowest."""
    shapes = [(96, 200), (200, 96), (130, 130), (33, 70)] + [(640, 640)] * 20
    W = [nn.Parameter(torch.zeros(shape, device="cuda")) for shape in shapes]
    B = [torch.zeros(shape, dtype=torch.float64, device="cuda") for shape in shapes]
    optimizer = SpectralOptimizer(W, 1.0, "nesterov", map)
    for step in range(5):
        before = [w.detach().clone() for w in W]
        set_gradients(W, step)
        optimizer.step()
        for w, old, b in zip(W[:6], before, B, strict=False):
            b.lerp_(w.grad.double(), 0.05)
            Phi, U = w.grad.double().lerp(b, 0.95), (old - w.detach()).double()
            norm = torch.linalg.matrix_norm(U, 2)
            if map == "msign":
                assert 0.98 < norm < 1.02
                assert (U * Phi).sum() > 0.975 * torch.linalg.matrix_norm(Phi, "nuc")
            else:
                assert 0.999 < norm < 1.08
                assert (U * Phi).sum() > 0.999999 * U.norm() * Phi.norm()
