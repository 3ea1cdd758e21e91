"""Run by test_capturable.py with TRITON_INTERPRET=1: a step through the kernels is the step through torch."""

import pytest
import torch
from interpreted import BROKEN
from test_capturable import model, optimizer_of, set_gradients

from compiler import SpectralOptimizer
from compiler import optimizer as module
from compiler.bits import LOW, join
from compiler.fused import Mapped, Plain, fits

pytestmark = BROKEN


@pytest.fixture
def through(monkeypatch):
    """How many pieces each launch of the kernels took."""
    found = []
    for batch, pieces in ((Mapped, lambda self: sum(map(len, self.parts))), (Plain, lambda self: len(self.pieces))):
        update_ = batch.update_
        monkeypatch.setattr(batch, "update_", lambda self, bounds, u=update_, n=pieces: (found.append(n(self)), u(self, bounds)))
    return found


CASES = [
    ("momentum", "msign", float, torch.float32, False),
    ("nesterov", "sn", torch.tensor, torch.float32, False),
    ("nesterov", "msign", torch.tensor, torch.bfloat16, False),
    ("momentum", "sn", float, torch.bfloat16, True),
]


@pytest.mark.parametrize(("update", "map", "number", "dtype", "master"), CASES)
def test_a_step_through_the_kernels_is_the_step_through_torch(update, map, number, dtype, master, through, monkeypatch):
    """Gradients grow by fifteen orders a step; one is spoilt; tall, wide and fused weights."""
    W, V = model(dtype=dtype), model(dtype=dtype)
    a, b = (optimizer_of(X, number(0.1), update=update, map=map, master=master) for X in (W, V))
    for step in range(3):
        for X in (W, V):
            set_gradients(X, step)
            for w in X:
                w.grad.mul_(10.0 ** (15 * step - 15))
        if step == 1:
            W[1].grad[0, 0] = V[1].grad[0, 0] = torch.nan
        monkeypatch.setattr(module, "fits", fits)
        a.step()
        monkeypatch.setattr(module, "fits", lambda piece: False)
        b.step()
    assert sum(through) == 3 * 6
    near = 1e-6 if dtype == torch.float32 or master else 2**-5  # torch rounds a bf16 weight twice a step, the kernel once
    turned = 1e-4 if map == "msign" else 0  # lr·1e-3: sums in another order turn directions of matrices as small as these
    for w, v in zip(W, V, strict=True):
        ours, torchs = (join(w, a.state[w][LOW]), join(v, b.state[v][LOW])) if master else (w, v)
        torch.testing.assert_close(ours, torchs, rtol=near, atol=max(near, turned))
    for w, v in zip(W[:3], V[:3], strict=True):
        torch.testing.assert_close(a.state[w]["momentum_buffer"], b.state[v]["momentum_buffer"], rtol=near, atol=0)
    for name in ("step", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(a.state[W[3]][name], b.state[V[3]][name], rtol=near, atol=0)
    assert a.skipped == b.skipped == {"0.1": 1}


def test_a_checkpoint_continues_bit_for_bit():
    """The exponents of Φ come from the momentum, whoever has measured it."""
    W = model()
    optimizer = optimizer_of(W)
    set_gradients(W, 0)
    optimizer.step()
    V = [torch.nn.Parameter(w.detach().clone()) for w in W]
    resumed = optimizer_of(V)
    saved = optimizer.state_dict()
    saved["state"] = {i: {name: value.clone() for name, value in state.items()} for i, state in saved["state"].items()}
    resumed.load_state_dict(saved)
    for step in range(1, 3):
        set_gradients(W, step), set_gradients(V, step)
        optimizer.step(), resumed.step()
    assert all(torch.equal(w, v) for w, v in zip(W, V, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sn_follows_its_vectors_through_the_kernels(dtype):
    """Tall and wide in one batch: every update has spectral norm 1 to within what SN states, and the vectors of a spoilt weight stay."""
    W = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((20, 33), (33, 20), (20, 33))]
    optimizer = SpectralOptimizer(W, 1.0, map="sn", capturable=True)
    for step in range(6):
        before = [w.detach().clone() for w in W]
        set_gradients(W, step)
        if step == 4:
            W[2].grad[0, 0] = torch.nan
            kept = optimizer.state[W[2]]["basis0"].clone()
        optimizer.step()
        for w, b in zip(W[:2], before[:2], strict=True):
            norm = torch.linalg.matrix_norm((w - b).double(), 2).item()
            assert 1 - 2e-2 < norm < 1.01 + (2e-2 if dtype == torch.bfloat16 else 0)
        if step == 4:
            assert torch.equal(W[2], before[2])
            assert torch.equal(optimizer.state[W[2]]["basis0"], kept)
