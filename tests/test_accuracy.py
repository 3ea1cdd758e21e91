"""How near msign of each level comes to the polar factor, on the spectra of real momenta, beside every other Muon's own code.

`descent` is ⟨U, Φ⟩/(‖U‖₂·‖Φ‖_*), the share of the steepest descent per unit spectral norm; `norm` is ‖U‖₂, `cosine` that of the angle
between U and the polar factor: all in fp64, of the update of a zero weight at learning rate 1. `-m slow -s` prints the table.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from compiler.coefficients import SCHEDULES
from compiler.msign import polar, power_of_two


@pytest.fixture(scope="module", autouse=True)
def examples():
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    yield
    sys.path.remove(str(Path(__file__).parent.parent / "examples"))


MADE = "near rank 1"
"""No momentum has been seen to be like it."""


def momenta_halved(halved):
    """Name -> a matrix and its SVD: momenta in the shapes they come from, or in half of them."""
    from momenta import TESTED, Exact, matrix

    generator = torch.Generator().manual_seed(1)
    return {
        f"{name} {shape[0]}x{shape[1]}": Exact.of(matrix(name, tuple(side // halved for side in shape), generator), torch.device("cpu"))
        for name, shape in TESTED
    }


def errors(contestant, matrices):
    """Of the updates of a contestant's own code."""
    weights = [nn.Parameter(torch.zeros(exact.X.shape)) for exact in matrices.values()]
    for W, exact in zip(weights, matrices.values(), strict=True):
        W.grad = exact.X.float()
    contestant.build(weights).step()
    return {
        name: exact.error(-W.detach() / contestant.scale(*W.shape), "msign")
        for W, (name, exact) in zip(weights, matrices.items(), strict=True)
    }


def check(ours, peers):
    """The bounds of each level; peers: name -> errors."""
    for name, error in ours["default"].items():
        assert error.descent >= 0.97, name
        assert error.norm <= 1.01, name
    for name, error in ours["high"].items():
        assert error.descent >= (0.98 if MADE in name else 0.99), name
        assert error.norm <= 1.005, name
        for peer, theirs in peers.items():
            assert error.cosine > theirs[name].cosine, (name, peer)
    for name, error in ours["fast"].items():
        assert error.descent >= 0.93, name
        assert error.norm <= 1.01, name
    for name, error in ours["exact"].items():
        assert error.descent >= 0.99, name
        assert error.norm <= 1 + 1e-6, name
    for peer, theirs in peers.items():
        for name, error in theirs.items():
            assert ours["default"][name].descent > error.descent, (name, peer)


def levels(contestants, matrices):
    by_name = {contestant.name: contestant for contestant in contestants}
    return {level: errors(by_name[f"ours, {level}"], matrices) for level in SCHEDULES}


def test_every_level_reaches_more_of_the_steepest_descent_than_torch_muon_at_the_norm_it_claims():
    from contestants import contestants

    entered, matrices = contestants(torch.device("cpu")), momenta_halved(2)
    theirs = errors(next(c for c in entered if c.name == "torch.optim.Muon"), matrices)
    check(levels(entered, matrices), {"torch.optim.Muon": theirs})
    assert all(error.descent < 0.9 and error.norm > 1.1 for error in theirs.values())  # what there is to be better than


@pytest.mark.slow  # a minute; where bf16 products are slow, some
def test_every_level_beside_every_peer_that_is_installed():
    from contestants import contestants

    entered, matrices = contestants(torch.device("cpu")), momenta_halved(1)
    ours, peers = levels(entered, matrices), {}
    for contestant in entered:
        if contestant.kind == "msign" and not contestant.name.startswith("ours") and not contestant.cuda:
            try:
                peers[contestant.name] = errors(contestant, matrices)
            except Exception as error:  # not installed, or broken here
                print(f"{contestant.name}: {type(error).__name__}: {str(error)[:80]}")
    for name in matrices:
        print(f"\n{name:32}  descent   norm    cosine")
        for who, found in (*ours.items(), *peers.items()):
            print(f"  {who:30}  {found[name].descent:.4f}   {found[name].norm:.4f}  {found[name].cosine:.4f}")
    check(ours, peers)


@pytest.mark.slow  # a minute: few CPUs multiply fp16
def test_levels_in_half_precision_as_on_cuda():
    """Emulated: stored in fp16, summed in fp32."""
    for name, exact in momenta_halved(1 if torch.cuda.is_available() else 2).items():
        tall = exact.X.size(0) > exact.X.size(1)
        A = power_of_two((exact.X.mT if tall else exact.X).float())[0].half()[None]
        for level, least, most in (("fast", 0.93, 1.01), ("default", 0.97, 1.01), ("high", 0.98, 1.005)):
            Y, scale = polar(A.clone(), A.float().square().sum((1, 2)), level)
            Y = (Y.float() * scale[:, None, None])[0]
            error = exact.error(Y.mT if tall else Y, "msign")
            print(f"{name:32}  {level:8}  {error.descent:.4f}   {error.norm:.4f}  {error.cosine:.4f}")
            assert error.descent >= least, (name, level)
            assert error.norm <= most, (name, level)
