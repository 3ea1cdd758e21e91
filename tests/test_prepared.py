"""What a step keeps for the next (`compiler.prepared`): made anew when anything changes, and no tensor among it."""

import copy
import weakref

import pytest
import torch
from test_capturable import QKV, model, optimizer_of, set_gradients

from compiler import fused
from compiler import optimizer as module
from compiler.bits import LOW, join
from compiler.fused import fits


@pytest.fixture(autouse=True)
def batches_on_a_cpu(monkeypatch):
    """The batches of the kernels, which on a CPU are computed by torch."""
    monkeypatch.setattr(fused, "runs_triton", lambda *_: True)


def exact(optimizer, w):
    return join(w, optimizer.state[w][LOW]) if LOW in optimizer.state[w] else w


def in_place(*optimizers):
    for X in optimizers:
        if X.param_groups[1]["blocks"] is QKV:
            X.param_groups[1]["blocks"] = copy.deepcopy(QKV)
        X.param_groups[1]["blocks"][sum("accuracy" in block for block in X.param_groups[1]["blocks"])]["accuracy"] = "high"


CHANGES = {
    "blocks in place": in_place,
    "nothing": lambda a, b: None,
    "the gradients' strides": lambda a, b: [
        setattr(w, "grad", w.grad.T.contiguous().T) for X in (a, b) for w in X.param_groups[0]["params"]
    ],
    "a gradient that is gone": lambda a, b: [setattr(X.param_groups[0]["params"][0], "grad", None) for X in (a, b)],
    "options": lambda a, b: [X.param_groups[0].update(accuracy="high", momentum=0.5, lr=0.3, weight_decay=0.0) for X in (a, b)],
    "the map": lambda a, b: [X.param_groups[0].update(map="sn") for X in (a, b)],
    "betas": lambda a, b: [X.param_groups[2].update(betas=(0.5, 0.9), eps=1e-3, lr_scale=3.0) for X in (a, b)],
    "blocks": lambda a, b: [X.param_groups[1].update(blocks=[*QKV[:2], {**QKV[2], "lr_scale": 5.0}]) for X in (a, b)],
    "state from elsewhere": lambda a, b: [X.load_state_dict(copy.deepcopy(X.state_dict())) for X in (a, b)],
    "a new group": lambda a, b: [X.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, 4))]}) for X in (a, b)],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("map", "dtype"), [("msign", torch.float32), ("sn", torch.float32), ("msign", torch.bfloat16)], ids=str)
def test_what_is_kept_of_a_step_is_made_anew_when_anything_changes(change, map, dtype, monkeypatch):
    """bf16 weights are kept to fp32. Roundings differ: by the ε of fp32 times the gain of "high" at 0 and lr, 2e-5 a step at most."""
    W, V = model(dtype=dtype), model(dtype=dtype)
    a, b = (optimizer_of(X, 0.1, map=map, master=True) for X in (W, V))
    for step in range(8):
        set_gradients(W, step), set_gradients(V, step)
        if step in (4, 6):
            CHANGES[change](a, b)
        monkeypatch.setattr(module, "fits", fits)
        a.step()
        monkeypatch.setattr(module, "fits", lambda piece: False)
        b.step()
        for w, v in zip(W, V, strict=True):
            torch.testing.assert_close(*(exact(X, x) for X, x in ((a, w), (b, v))), rtol=1e-4, atol=1e-4)


def test_a_step_like_the_last_one_asks_nothing_of_the_pieces(monkeypatch):
    W = model()
    optimizer = optimizer_of(W, map="sn")
    asked = []
    monkeypatch.setattr(module, "fits", lambda piece: asked.append(piece) or fits(piece))
    counts = []
    for step in range(6):
        set_gradients(W, step)
        asked.clear()
        optimizer.step()
        counts.append(len(asked))
    assert counts == [6, 0, 6, 0, 0, 0]  # SN starts from its own vectors in the third


def test_no_gradient_and_no_state_is_held_between_steps():
    W = model()
    optimizer = optimizer_of(W)
    for step in range(3):
        set_gradients(W, step)
        optimizer.step()
    gradients, buffers = [weakref.ref(w.grad) for w in W], [weakref.ref(optimizer.state[w]["momentum_buffer"]) for w in W[:3]]
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    assert all(ref() is None for ref in (*gradients, *buffers))
