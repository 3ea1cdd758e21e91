"""Defects of other Muons, by name, and that ours does not have them. Those that take ranks to show are in test_distributed.py."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compiler import SpectralOptimizer, msign, spectral_normalize, svc
from compiler.errors import NotAMatrix
from compiler.maps import MAPS
from compiler.updates import UPDATES


def weight(*shape, dtype=torch.float32):
    W = nn.Parameter(torch.randn(shape).to(dtype))
    W.grad = torch.randn(shape).to(dtype)
    return W


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_torch_muon_divides_its_bf16_momentum_in_place(map, nesterov, dtype):
    """torch 2.14.1: grad.bfloat16() is the buffer itself if that is bf16, and div_ writes it. Here the buffer is the momentum."""
    W = weight(8, 20, dtype=dtype)
    optimizer = SpectralOptimizer([W], 0.1, "nesterov" if nesterov else "momentum", map, momentum=0.9)
    expected = torch.zeros_like(W)
    for _ in range(3):
        W.grad = torch.randn(8, 20).to(dtype)
        expected.lerp_(W.grad, 1 - 0.9)
        optimizer.step()
        assert torch.equal(optimizer.state[W]["momentum_buffer"], expected)


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", UPDATES)
def test_keller_jordans_lerp_overwrites_the_gradient(map, update):
    W = weight(8, 20)
    before = W.grad.clone()
    SpectralOptimizer([W], 0.1, update, map).step()
    assert torch.equal(W.grad, before)


@pytest.mark.parametrize("of", [msign, spectral_normalize, lambda X: svc(X, 2.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gram_newton_schulz_divides_its_input_in_place(of, dtype):
    X = torch.randn(8, 20).to(dtype)
    before = X.clone()
    of(X)
    assert torch.equal(X, before)


@pytest.mark.parametrize("shape", [(6,), (1,), ()])
@pytest.mark.parametrize("map", MAPS)
def test_heavyball_and_pytorch_optimizer_orthogonalize_vectors(shape, map):
    with pytest.raises(NotAMatrix, match="put vectors in a group with map=None"):
        SpectralOptimizer([nn.Parameter(torch.zeros(shape))], 0.1, map=map)


@pytest.mark.parametrize("shape", [(3, 4, 5), (8, 4, 3, 3)])
def test_a_stack_or_a_kernel_is_not_flattened_without_being_told(shape):
    """KellerJordan/Muon takes 3-D as a batch and flattens 4-D, torch refuses both, HeavyBall merges: which it is only the graph knows."""
    with pytest.raises(NotAMatrix, match=r"compiler\.compile"):
        SpectralOptimizer([nn.Parameter(torch.zeros(shape))], 0.1)


@pytest.mark.parametrize("map", MAPS)
def test_scion_and_emerging_optimizers_take_no_closure(map):
    W = nn.Parameter(torch.ones(3, 3))
    optimizer = SpectralOptimizer([W], 0.1, map=map)

    def closure():
        optimizer.zero_grad()
        loss = W.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure=closure).item() == 9


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("started", [False, True])
def test_scion_has_no_state_that_a_distributed_checkpoint_could_take(map, update, started):
    """And taking it before the first step leaves no trace: flashoptim#3, dummy steps in the count."""
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 4, bias=False))
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    make = [
        lambda of: SpectralOptimizer([{"params": of[0].parameters()}, {"params": of[1].parameters(), "lr_scale": 2.0}], 0.1, update, map)
    ]
    optimizer, other, third_optimizer = (make[0](of) for of in (model, twin, third))

    def train(of, its, steps):
        for step in steps:
            for i, W in enumerate(of.parameters()):
                W.grad = torch.randn(W.shape, generator=torch.Generator().manual_seed(10 * step + i))
            its.step()
            its.zero_grad()

    if started:
        train(model, optimizer, range(2)), train(twin, other, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    train(model, optimizer, range(2, 5)), train(twin, other, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    if started:
        train(third, make[0](third), range(2))
    set_optimizer_state_dict(third, third_optimizer, saved)
    train(third, third_optimizer, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), third.parameters(), strict=True))


@pytest.mark.parametrize("map", MAPS)
def test_normuon_turns_a_zero_gradient_into_nan(map):
    """dion#24. Zero-initialised projections give the weights before them exactly this at the first step."""
    W = weight(6, 10)
    before, W.grad = W.detach().clone(), torch.zeros(6, 10)
    SpectralOptimizer([W], 0.1, map=map).step()
    assert torch.equal(W, before)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e37])
def test_torch_muons_eps_shrinks_small_updates_and_large_ones_come_out_zero(size):
    """eps 1e-7: ‖U‖_F 7.1 for 8 at entries of 1e-10, 3e-19 at 1e-30; at 1e37 the norm is Inf and U zero."""
    W = nn.Parameter(torch.zeros(64, 64))
    W.grad = torch.linalg.qr(torch.randn(64, 64))[0] * size
    SpectralOptimizer([W], 1.0).step()
    assert torch.linalg.matrix_norm(W.detach()).item() == pytest.approx(8, rel=0.03)


def test_emerging_optimizers_aol_flips_the_sign_of_a_rank_1_gradient():
    W = nn.Parameter(torch.zeros(16, 24))
    W.grad = torch.randn(16, 1) @ torch.randn(1, 24) + 1e-4 * torch.randn(16, 24)
    SpectralOptimizer([W], 1.0).step()
    U, _, Vh = torch.linalg.svd(W.grad)
    assert -(U[:, 0] @ W.detach() @ Vh[0]) == pytest.approx(1, abs=0.03)


def test_all_muons_orthogonalize_fp64_in_bf16():
    """σmax/σmin of the update was 1.33 to 1.87; here "high" is exact to 1.3 %, "exact" to rounding."""
    G = torch.randn(20, 40, dtype=torch.float64)
    for accuracy, spread in (("default", 1.03), ("high", 1.013), ("exact", 1 + 1e-12)):
        W = nn.Parameter(torch.zeros_like(G))
        W.grad = G
        SpectralOptimizer([W], 1.0, accuracy=accuracy).step()
        sigma = torch.linalg.svdvals(W.detach())
        assert sigma[0] / sigma[-1] < spread


def test_newton_schulz_quintic_overshoots_the_spectral_norm_by_a_fifth():
    G = torch.randn(64, 256)
    W, V = nn.Parameter(torch.zeros_like(G)), nn.Parameter(torch.zeros_like(G))
    W.grad, V.grad = G.clone(), G.clone()
    SpectralOptimizer([W], 1.0).step()
    torch.optim.Muon([V], 1.0, weight_decay=0, adjust_lr_fn="original").step()
    ours, theirs = (torch.linalg.svdvals(X.detach()) for X in (W, V))
    assert ours[0] < 1.013
    assert ours[0] / ours[-1] < 1.03 < theirs[0] / theirs[-1]


def test_mup_divides_a_shared_lr_tensor_group_by_group():
    lr = torch.tensor(0.5)
    groups = [{"params": [weight(4, 6)], "lr_scale": scale} for scale in (0.5, 0.25)]
    optimizer = SpectralOptimizer(groups, lr)
    optimizer.step()
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.5, 0.5]
    assert lr.item() == 0.5


def test_triton_muon_adamw_is_no_optimizer_and_its_state_dict_is_alive():
    W = weight(4, 6)
    optimizer = SpectralOptimizer([W], 0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.step()
    groups = optimizer.state_dict()["param_groups"]
    groups[0]["lr"] = 7.0
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_megatrons_clipping_divides_every_mapped_update_by_its_norm():
    """DeepSpeed#8439: up to 85 times. An update of msign is the same whatever its gradients were scaled by."""
    W = weight(8, 20)
    V = nn.Parameter(W.detach().clone())
    V.grad = W.grad * 1e-3
    SpectralOptimizer([W], 0.1).step(), SpectralOptimizer([V], 0.1).step()
    torch.testing.assert_close(W, V, rtol=0, atol=1e-6)


# --- GPU.md, section 1: one name more each ------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """The dtypes of the operands of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "addbmm"):
            self.dtypes |= {T.dtype for T in tree_leaves(args) if isinstance(T, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_all_muons_multiply_in_bf16_on_a_cpu_that_is_40_times_slower_in_it(map, dtype):
    """0.9 GFLOP/s against 38 to 54 where there is no unit for it."""
    W = weight(20, 40, dtype=dtype)
    optimizer = SpectralOptimizer([W], 0.1, map=map, accuracy="high")
    for _ in range(3):
        with Products() as seen:
            optimizer.step()
        assert seen.dtypes <= {torch.float32, torch.float64}
    assert map == "svc" or seen.dtypes  # which is the SVD here


@pytest.mark.parametrize("shape", [(20, 20), (20, 50), (50, 20)])
def test_heavyball_iterates_alike_whatever_it_is_told(shape):
    """YOU-5 for all but square matrices, whichever mode is set. The level that is asked for here shows in the image."""
    G = torch.linalg.qr(torch.randn(max(shape), 20, dtype=torch.float64))[0] * torch.logspace(0, -2, 20, dtype=torch.float64)
    G = (G if shape[0] >= shape[1] else G.mT).reshape(shape)
    spreads = []
    for accuracy in ("fast", "default", "high", "exact"):
        W = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        W.grad = G
        SpectralOptimizer([W], 1.0, accuracy=accuracy).step()
        sigma = torch.linalg.svdvals(W.detach())
        spreads.append((sigma[0] - sigma[-1]).item())
    assert spreads == sorted(spreads, reverse=True)
    assert len({round(spread, 5) for spread in spreads}) == 4
    assert spreads[0] < 0.02
    assert spreads[-1] < 1e-12


@pytest.mark.parametrize("accuracy", ["default", "high", "exact"])
def test_turbo_muon_scales_rows_and_so_finds_another_polar_factor(accuracy):
    """AOL: D·X has a U·Vᵀ of its own. Off the diagonal in the basis of singular vectors it was 0.13 to 0.16 on momenta."""
    X = torch.diag(torch.logspace(0, -1, 12, dtype=torch.float64)) @ torch.randn(12, 20, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    scaled = X / X.norm(dim=1, keepdim=True)
    other = U.mT @ msign(scaled, accuracy="exact") @ Vh.mT
    assert (other - other.diag().diag()).norm() / other.norm() > 0.1
    ours = U.mT @ msign(X, accuracy=accuracy) @ Vh.mT
    assert (ours - ours.diag().diag()).norm() / ours.norm() < 1e-9


def test_cachemuon_starts_from_the_last_factor_and_leaves_the_ball():
    """Singular values of Q_{t-1}·M_t up to 187 where directions turn. Here an update is the same whatever came before it."""
    W = nn.Parameter(torch.zeros(12, 20))
    optimizer = SpectralOptimizer([W], 1.0, "sgd", momentum=0.0)
    for step in range(6):
        G = torch.randn(12, 20) @ torch.diag(torch.logspace(0, -3, 20).roll(3 * step))
        before, W.grad = W.detach().clone(), G
        optimizer.step()
        fresh = nn.Parameter(before.clone())
        fresh.grad = G
        SpectralOptimizer([fresh], 1.0, "sgd", momentum=0.0).step()
        assert torch.equal(W, fresh)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_power_iteration_of_one_vector_loses_sigma_when_the_top_direction_jumps(capturable):
    """‖ΔW‖₂ is then twice what it should be. 16 vectors that are followed, and noise beside them, see the new direction."""
    W = nn.Parameter(torch.zeros(60, 90))
    optimizer = SpectralOptimizer([W], 1.0, "sgd", "sn", momentum=0.0, capturable=capturable)
    U, V = torch.linalg.qr(torch.randn(60, 60))[0], torch.linalg.qr(torch.randn(90, 60))[0]
    one, theirs, ours = torch.randn(90), [], []
    for step in range(8):
        W.grad = (U * torch.logspace(0, -2, 60).roll(17 * step)) @ V.mT
        one = W.grad.mT @ (W.grad @ one)
        one = one / one.norm()
        theirs.append(1 / (W.grad @ one).norm().item())
        before = W.detach().clone()
        optimizer.step()
        ours.append(torch.linalg.matrix_norm(W.detach() - before, 2).item())
    assert max(theirs) > 2
    assert 0.999 < min(ours) <= max(ours) < 1.1


@pytest.mark.parametrize("ratio", [2, 10, 50])
def test_svc_by_two_msigns_adds_a_tenth_of_its_threshold_to_small_singular_values(ratio):
    """Emerging-Optimizers' spectral_hardcap, Su's identity: 10 to 12 % of τ at σ ≪ τ, 5·τ where σ₁ is 50·τ."""
    s = torch.logspace(0, -5, 20) * ratio
    U, V = torch.linalg.qr(torch.randn(20, 20))[0], torch.linalg.qr(torch.randn(30, 20))[0]
    W = nn.Parameter(torch.zeros(20, 30))
    W.grad = (U * s) @ V.mT
    SpectralOptimizer([W], 1.0, "sgd", "svc", momentum=0.0).step()
    torch.testing.assert_close(-W.detach(), (U * s.clamp(max=1)) @ V.mT, atol=2e-5, rtol=0)


def test_keller_jordans_muon_needs_a_process_group_on_one_device():
    assert not torch.distributed.is_initialized()
    W = weight(4, 6)
    SpectralOptimizer([W], 0.1).step()
