"""200 steps of the example GPT: the loss falls, torch.compile does not matter, an interruption cannot be told from none."""

import io
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import compiler
import scaling

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from gpt import GPT, batches

STEPS = 200
LRS = {"muon": 0.05, "adam-msign": 0.05, "sn": 0.2, "svc": 0.05}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table():
    return scaling.derive(GPT(64), (torch.zeros(1, 8, dtype=torch.long),))


def start(table, name, init="gaussian", lr=None):
    torch.manual_seed(0)
    return compiler.compile(GPT(64), table, name, lr=LRS[name] if lr is None else lr, weight_decay=0.01, base=64, init=init)


def train(model, step, zero_grad, data):
    losses = []
    for tokens, labels in data:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        step()
        zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def whole(table):
    """The uninterrupted runs."""
    runs = {}
    for name in LRS:
        model, optimizer = start(table, name)
        losses = train(model, optimizer.step, optimizer.zero_grad, batches(STEPS))
        assert not optimizer.skipped
        runs[name] = losses, [W.detach().clone() for W in model.parameters()]
    return runs


@pytest.mark.parametrize("name", LRS)
def test_the_loss_falls(name, whole):
    losses, _ = whole[name]
    first, last = losses[0], sum(losses[-20:]) / 20
    print(f"{name}: {first:.3f} -> {last:.3f}")
    assert last < first - 1.5


@pytest.mark.parametrize("name", LRS)
def test_an_interrupted_run_resumes_bit_for_bit(name, table, whole):
    losses, weights = whole[name]
    model, optimizer = start(table, name)
    data = batches(STEPS)
    begun = train(model, optimizer.step, optimizer.zero_grad, data[:77])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    model, optimizer = start(table, name, init=None)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert begun + train(model, optimizer.step, optimizer.zero_grad, data[77:]) == losses
    assert all(torch.equal(W, V) for W, V in zip(model.parameters(), weights, strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own, of its own
@pytest.mark.parametrize(("name", "what"), [*((name, "both") for name in LRS), ("muon", "model"), ("muon", "step")])
def test_compiled_runs_are_the_same(name, what, table, whole):
    """To rounding, which training magnifies: the first losses to 1e-3, the last 20 to 2 % on average."""
    torch._dynamo.reset()
    losses, _ = whole[name]
    model, optimizer = start(table, name, lr=LRS[name] if what == "model" else torch.tensor(LRS[name]))
    forward = torch.compile(model) if what != "step" else model
    step = torch.compile(optimizer.step) if what != "model" else optimizer.step
    got = train(forward, step, optimizer.zero_grad, batches(STEPS))
    print(f"{name} {what}: {max(abs(a - b) for a, b in zip(got[:20], losses[:20], strict=True)):.1e}", got[-1], losses[-1])
    assert got[:20] == pytest.approx(losses[:20], abs=1e-3)
    assert sum(got[-20:]) == pytest.approx(sum(losses[-20:]), rel=0.02)
