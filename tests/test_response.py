"""Optimizers are known by what they do: degree in the gradient, size over widths, decay, ε, on copies of them."""

import copy
import math

import pytest
import sympy
import torch
from torch import nn

import compiler
from scaling import derive
from scaling.errors import CannotMeasure
from scaling.response import memberships, optimizers_in, responses

WIDTHS = (32, 64)
TOKENS = torch.arange(8).reshape(2, 4)


class Model(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.wte, self.hidden, self.head = nn.Embedding(61, d), nn.Linear(d, 2 * d, bias=False), nn.Linear(2 * d, 10, bias=False)

    def forward(self, idx):
        return self.head(torch.tanh(self.hidden(self.wte(idx))))


@pytest.fixture(scope="module")
def table():
    return derive(Model, TOKENS, widths=WIDTHS)


def seen(make, table, width=32, model=None):
    model = model or Model(width)
    return {name: first for name, (first, *_) in responses(model, optimizers_in(make(model.parameters())), table, width).items()}


def power(make, table, name):
    """The power of d of an update, of entries or of the norm of a matrix."""
    small, large = (seen(make, table, width)[name].rate for width in WIDTHS)
    return math.log2(large / small)


# --- optimizers that users write ----------------------------------------------------------------------------------------------------


class Plain(torch.optim.Optimizer):
    """W ← W - (lr if coupled else 1)·λ·W - lr·U(G), with attributes that torch's Optimizer does not copy."""

    def __init__(self, params, update, lr=0.1, weight_decay=0.0, *, coupled=True):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.update, self.coupled = update, coupled

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for W in group["params"]:
                if W.grad is not None:
                    W.mul_(1 - group["weight_decay"] * (group["lr"] if self.coupled else 1))
                    W.sub_(self.update(W, W.grad), alpha=group["lr"])


def lars(W, G):
    return G * W.norm() / G.norm()


def root(W, G):
    return G.sign() * G.abs().sqrt()


def keller(W, G):
    return compiler.msign(G) * max(1, G.shape[0] / G.shape[1]) ** 0.5


def rows(W, G):
    return G / G.norm(dim=-1, keepdim=True)


class Sam(torch.optim.Optimizer):
    """Two evaluations a step, by a closure, around an optimizer that it holds."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1)

    def step(self, closure=None):
        assert closure is not None
        closure()
        self.inner.step()


class Both:
    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


# --- degrees ------------------------------------------------------------------------------------------------------------------------

DEGREES = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01), 1),
    "ASGD": (torch.optim.ASGD, 1),
    "Adam": (torch.optim.Adam, 0),
    "AdamW": (lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True), 0),
    "NAdam": (torch.optim.NAdam, 0),
    "RAdam": (torch.optim.RAdam, 0),
    "Adamax": (torch.optim.Adamax, 0),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9), 0),
    "Adagrad": (torch.optim.Adagrad, 0),
    "Adadelta": (torch.optim.Adadelta, 0),
    "Rprop": (torch.optim.Rprop, 0),
    "Adafactor": (torch.optim.Adafactor, 0),
    "Lion": (lambda p: Plain(p, lambda W, G: G.sign()), 0),
    "LARS": (lambda p: Plain(p, lars), 0),
    "msign": (lambda p: Plain(p, keller), 0),
    "square root": (lambda p: Plain(p, root), sympy.Rational(1, 2)),
    "needs a closure": (Sam, 1),
}


@pytest.mark.parametrize("name", DEGREES)
def test_the_degree_is_that_of_the_update_in_the_gradient(name, table):
    make, degree = DEGREES[name]
    assert {one.degree for one in seen(make, table).values()} == {degree}


def test_an_update_of_a_matrix_as_a_whole_is_told_from_one_row_by_row(table):
    apart = {name: seen(make, table)["hidden.weight"].apart for name, (make, degree) in DEGREES.items() if degree == 0}
    assert {name for name, value in apart.items() if not value} == {"LARS", "msign"}
    assert seen(lambda p: Plain(p, rows), table)["wte.weight"].apart


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (torch.optim.AdamW, "hidden.weight", 0),
        (lambda p: Plain(p, keller), "hidden.weight", -1),
        (lambda p: Plain(p, keller), "head.weight", -1 / 2),
        (lambda p: Plain(p, lars), "hidden.weight", -1 / 2),
        (torch.optim.Adafactor, "hidden.weight", -1 / 2),
    ],
)
def test_the_size_of_an_update_is_measured_with_all_that_its_code_multiplies_it_by(make, name, expected, table):
    """‖UVᵀ‖ is spread over √(d·2d) entries; LARS and Adafactor move entries by a share of the weight's own, here 1/√d."""
    assert power(make, table, name) == pytest.approx(expected, abs=0.06)


# --- decay and ε --------------------------------------------------------------------------------------------------------------------


def test_decay_is_the_fraction_taken_off_and_whether_lr_multiplies_it(table):
    assert seen(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1), table)["hidden.weight"].decay == pytest.approx(1e-4)
    coupled, own = (
        seen(lambda p, c=c: Plain(p, lambda W, G: G.sign(), 1e-3, 0.01, coupled=c), table)["hidden.weight"] for c in (True, False)
    )
    assert (coupled.decay, coupled.coupled) == (pytest.approx(1e-5), True)
    assert (own.decay, own.coupled) == (pytest.approx(1e-2), False)
    assert not coupled.l2
    assert not own.l2


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adamax])
def test_l2_that_goes_through_the_normalisation_is_seen(make, table):
    assert all(one.l2 for one in seen(lambda p: make(p, weight_decay=0.1), table).values())
    assert not any(one.l2 for one in seen(make, table).values())


def test_l2_in_sgd_is_a_decay(table):
    one = seen(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01), table)["hidden.weight"]
    assert (one.l2, one.coupled) == (False, True)
    assert one.decay > 0


@pytest.mark.parametrize("eps", [1e-3, 1e-6, 1e-10])
def test_epsilon_is_the_gradient_whose_update_it_halves(eps, table):
    found = seen(lambda p: torch.optim.AdamW(p, eps=eps), table)
    assert all(one.eps == pytest.approx(eps, rel=0.02) for one in found.values())

    def inside(W, G):
        return G / (G.square() + eps).sqrt()

    assert seen(lambda p: Plain(p, inside), table)["hidden.weight"].eps == pytest.approx(math.sqrt(eps), rel=1)
    assert seen(lambda p: Plain(p, lambda W, G: G.sign()), table)["hidden.weight"].eps == 0


# --- copies -------------------------------------------------------------------------------------------------------------------------


def test_model_optimizer_and_generator_are_left_as_they_are(table):
    model = Model(32)
    optimizer = torch.optim.Adagrad(model.parameters())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    responses(model, [optimizer], table, 32)
    after = (model.state_dict(), optimizer.state_dict(), torch.get_rng_state())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(weight.grad is None for weight in model.parameters())


def test_a_scheduler_is_not_stepped_and_its_warm_up_from_zero_is_undone(table):
    def make(params):
        optimizer = torch.optim.AdamW(params, lr=1e-3)
        make.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        assert optimizer.param_groups[0]["lr"] == 0
        return optimizer

    assert seen(make, table)["hidden.weight"].rate == pytest.approx(1e-3, rel=1e-3)
    assert make.scheduler.last_epoch == 0


def test_a_factor_that_torch_ignores_and_the_training_loop_applies_counts(table):
    """nanoGPT-mup: `param_group["lr"] = lr * param_group.get("lr_scale", 1.0)`."""
    plain = seen(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1), table)["hidden.weight"]
    scaled = seen(lambda p: torch.optim.AdamW([{"params": list(p), "lr_scale": 0.25}], lr=1e-3, weight_decay=0.1), table)["hidden.weight"]
    assert (scaled.rate, scaled.decay) == (pytest.approx(plain.rate / 4), pytest.approx(plain.decay / 4))


def test_blocks_of_one_weight_are_seen_apart(table):
    class Fused(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.stem, self.both, self.head = nn.Linear(8, d), nn.Linear(d, d + 3, bias=False), nn.Linear(d + 3, 2)

        def forward(self, x):
            a, b = self.both(torch.tanh(self.stem(x))).split([self.both.in_features, 3], dim=-1)
            return self.head(torch.cat([torch.tanh(a), b], -1))

    fused = derive(Fused, torch.zeros(2, 8), widths=WIDTHS)
    model, optimizer = compiler.compile(Fused(32), fused, "sgd", lr=0.1)
    first, second = responses(model, [optimizer], fused, 32)["both.weight"]
    assert first.rate / second.rate == pytest.approx(32 / 3, rel=1e-3)


def test_optimizers_are_found_in_lists_dicts_and_objects():
    model = Model(32)
    one, two = torch.optim.SGD([model.wte.weight], lr=0.1), torch.optim.AdamW(model.head.parameters())
    for given in ([one, two], (one, two), {"a": one, "b": two}, Both(one, two)):
        assert optimizers_in(given) == [one, two]
    assert memberships(model, [one, two]) == {"wte.weight": ("SGD",), "hidden.weight": (), "head.weight": ("AdamW",)}


def test_an_optimizer_that_needs_more_than_gradients_is_refused_with_its_own_error(table):
    class Hessian(Plain):
        def step(self, closure=None):
            raise ValueError("where is the Hessian")

    with pytest.raises(CannotMeasure, match=r"Hessian could not be stepped: ValueError: where is the Hessian"):
        seen(lambda p: Hessian(p, rows), table)
    with pytest.raises(CannotMeasure, match="not finite"):
        seen(lambda p: Plain(p, lambda W, G: G / 0), table)
