"""What gradients and weights can be like, and what becomes of a step then: norms, ranks, dtypes, memory, limits of a buffer."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compiler import SpectralOptimizer
from compiler.errors import BadOption
from compiler.maps import MAPS
from compiler.updates import UPDATES

FORMS = {
    "gaussian": lambda g: torch.randn(8, 20, generator=g),
    "rank 1": lambda g: torch.randn(8, 1, generator=g) @ torch.randn(1, 20, generator=g),
    "rank 2": lambda g: torch.randn(8, 2, generator=g) @ torch.randn(2, 20, generator=g),
    "one entry": lambda g: torch.zeros(8, 20).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(-2.0)),
    "orthogonal": lambda g: torch.linalg.qr(torch.randn(20, 8, generator=g))[0].mT,
    "one value": lambda g: torch.ones(8, 20),
}
"""Matrices by what is special about them."""


def step_of(G, W=None, **options):
    """What one step of lr 1 takes away from a weight of zeros."""
    W = nn.Parameter(torch.zeros_like(G)) if W is None else W
    W.grad = G
    optimizer = SpectralOptimizer([W], 1.0, **options)
    optimizer.step()
    return -W.detach(), optimizer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-12, 1.0, 1e12, 1e37])
@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_gradient_of_any_size_moves_the_weight_by_the_spectral_norm_of_the_map(form, scale, map, nesterov):
    """No ε: 1e-44 is subnormal. SVC clips at 1/λ, which follows the gradient here; of numbers below its reach it moves less."""
    G = FORMS[form](torch.Generator().manual_seed(0))
    G = (G / G.abs().max()).mul(scale)
    U, optimizer = step_of(G, update="nesterov" if nesterov else "momentum", map=map, momentum=0.5, clip=min(100 / scale, 1e38))
    norm = torch.linalg.matrix_norm(U.double(), 2).item()
    if scale >= 1e-30:
        assert 0.97 < norm < 1.013
        assert (U.double() * G.double()).sum() > 0
    else:
        assert 0 <= norm < 1.03
    assert optimizer.skipped == {}


@pytest.mark.parametrize("map", MAPS)
def test_no_finite_gradient_freezes_a_weight(map):
    """1e37 squared is Inf, and would stay in Adam's second moment for good: such a gradient is skipped, and the next one taken."""
    for update in UPDATES:
        W = nn.Parameter(torch.zeros(4, 6))
        optimizer = SpectralOptimizer([W], 0.1, update, map)
        for value in (1.0, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 1.0):
            W.grad = torch.full((4, 6), value)
            before = W.detach().clone()
            optimizer.step()
        assert all(T.isfinite().all() for T in optimizer.state[W].values() if isinstance(T, torch.Tensor))
        assert not torch.equal(before, W)
        assert optimizer.skipped == {"0.0": 2}


@pytest.mark.parametrize("update", ["sgd", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_gradient_that_is_taken_leaves_the_buffers_finite(update, dtype):
    W = nn.Parameter(torch.zeros(4, 6, dtype=dtype))
    optimizer = SpectralOptimizer([W], 0.1, update, None, momentum=0.5)
    top = torch.finfo(dtype).max
    value = top * 0.49 if update == "sgd" else top**0.5 * 0.99
    for _ in range(3):
        W.grad = torch.full((4, 6), value, dtype=dtype)
        optimizer.step()
        W.data.zero_()
    assert optimizer.skipped == {}
    assert optimizer.state[W]["momentum_buffer" if update == "sgd" else "exp_avg_sq"].isfinite().all()


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_real_dtype_is_stepped_in_its_own(map, dtype):
    W = nn.Parameter(torch.randn(6, 10).to(dtype))
    before, W.grad = W.detach().clone(), torch.randn(6, 10).to(dtype)
    optimizer = SpectralOptimizer([W], 0.1, map=map)
    optimizer.step()
    assert W.dtype == optimizer.state[W]["momentum_buffer"].dtype == dtype
    assert W.isfinite().all()
    assert not torch.equal(before, W)


@pytest.mark.parametrize("map", [*MAPS, None])
def test_the_same_steps_give_the_same_bits(map):
    ends = []
    for _ in range(2):
        W = [nn.Parameter(torch.randn(16, 24, generator=torch.Generator().manual_seed(i))) for i in range(3)]
        optimizer = SpectralOptimizer(W, 0.1, map=map)
        generator = torch.Generator().manual_seed(9)
        torch.manual_seed(len(ends))  # the global random state is of no concern
        for _ in range(4):
            for w in W:
                w.grad = torch.randn(16, 24, generator=generator)
            optimizer.step()
        ends.append([w.detach() for w in W])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


STRIDES = {
    "transposed": lambda X: X.mT.contiguous().mT,
    "a column of a wider one": lambda X: torch.cat([X, X], 1)[:, : X.size(1)],
    "every second row": lambda X: X.repeat_interleave(2, 0)[::2],
    "expanded": lambda X: X[:1].clone().expand_as(X),
}


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("of", STRIDES)
def test_strides_of_weight_and_gradient_do_not_matter(map, of):
    G = torch.randn(6, 10)
    if of == "expanded":
        G = G[:1].expand(6, 10).clone()
    expected, _ = step_of(G, map=map)
    strided = STRIDES[of](torch.zeros(6, 10))
    weight = None if of == "expanded" else nn.Parameter(strided)
    got, _ = step_of(STRIDES[of](G), weight, map=map)
    torch.testing.assert_close(got, expected)


def test_a_channels_last_kernel_keeps_its_layout_and_so_does_its_state():
    blocks = [{"axes": [[[8, "out", 0, 8]], [[4, "in", 0, 4]], [[3, "in", 0, 3]], [[3, "in", 0, 3]]]}]
    W = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizer = SpectralOptimizer([{"params": [W], "blocks": blocks}], 0.1)
    W.grad = torch.randn(8, 4, 3, 3)
    optimizer.step()
    assert W.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[W]["momentum_buffer"].stride() == W.stride()


# --- bf16 weights -------------------------------------------------------------------------------------------------------------


def bf16(*shape):
    return nn.Parameter(torch.ones(shape).bfloat16())


def test_a_change_below_the_last_place_of_bf16_adds_up_if_the_weight_is_kept_to_fp32():
    """1 in bf16 has neighbours 1/128 above and 1/256 below; a thousand steps of 1e-4 are 0.1."""
    ends = {}
    for master in (False, True):
        W = bf16(4, 4)
        optimizer = SpectralOptimizer([W], 1e-4, "sign", None, momentum=0.0, master=master)
        for _ in range(1000):
            W.grad = torch.ones(4, 4).bfloat16()
            optimizer.step()
        ends[master] = W[0, 0].item()
    assert ends[False] == 1
    assert ends[True] == pytest.approx(0.9, abs=1 / 256)


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", UPDATES)
def test_a_weight_kept_to_fp32_is_the_fp32_weight_rounded(map, update):
    W, V = nn.Parameter(torch.randn(6, 10).bfloat16()), None
    V = nn.Parameter(W.detach().float())
    a = SpectralOptimizer([W], 0.01, update, map, weight_decay=0.1, master=True)
    b = SpectralOptimizer([V], 0.01, update, map, weight_decay=0.1, master=True)
    for step in range(5):
        W.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(step)).bfloat16()
        V.grad = W.grad.float()
        a.step(), b.step()
        if map != "sn":  # whose vectors are kept in the weight's dtype
            assert ((W.float() - V).abs() <= V.abs() * 2**-8).all()
    assert a.state[W]["low_bits"].dtype == torch.int16
    assert "low_bits" not in b.state[V]
    assert all(T.dtype == torch.float32 for name, T in a.state[W].items() if name.startswith(("momentum", "exp")))


def test_a_weight_that_others_write_is_taken_as_written():
    """Loading or zeroing a weight moves what the bits add by less than half a unit in the last place; they never make a NaN."""
    W = bf16(16, 16)
    optimizer = SpectralOptimizer([W], 0.01, "sgd", None, momentum=0.0, master=True)
    for value in (1.0, -3.0, 0.0, -0.0, 3e38, 5.0):
        W.grad = torch.randn(16, 16).bfloat16()
        optimizer.step()
        assert (optimizer.state[W]["low_bits"] < 0).any()
        W.data.fill_(value)
        W.grad.fill_(1)
        optimizer.step()
        assert (W.float() - (value - 0.01)).abs().max() <= max(abs(value), 0.01) * 2**-7


@pytest.mark.parametrize("update", ["momentum", "adam"])
def test_a_checkpoint_of_weights_kept_to_fp32_continues_bit_for_bit(update):
    W = bf16(6, 6)
    optimizer = SpectralOptimizer([W], 1e-3, update, master=True)

    def go_on(weight, optimizer):
        generator = torch.Generator().manual_seed(3)
        for _ in range(4):
            weight.grad = torch.randn(6, 6, generator=generator).bfloat16()
            optimizer.step()

    go_on(W, optimizer)
    V = nn.Parameter(W.detach().clone())
    resumed = SpectralOptimizer([V], 1e-3, update, master=True)
    saved = optimizer.state_dict()
    saved["state"][0] = {name: value.clone() for name, value in saved["state"][0].items()}
    resumed.load_state_dict(saved)
    assert {n: T.dtype for n, T in resumed.state[V].items()} == {n: T.dtype for n, T in optimizer.state[W].items()}
    go_on(W, optimizer), go_on(V, resumed)
    assert torch.equal(W, V)
    assert torch.equal(optimizer.state[W]["low_bits"], resumed.state[V]["low_bits"])


def test_fp16_weights_cannot_be_kept_to_fp32():
    with pytest.raises(BadOption, match="autocast"):
        SpectralOptimizer([nn.Parameter(torch.zeros(2, 2).half())], 0.1, master=True)


# --- memory -------------------------------------------------------------------------------------------------------------------

SHAPES = [(64, 64)] * 8 + [(64, 256), (256, 64)]


def state_bytes(optimizer):
    return sum(T.numel() * T.element_size() for state in optimizer.state.values() for T in state.values() if isinstance(T, torch.Tensor))


STATES = {
    ("momentum", "msign"): lambda numel, shapes: 4 * numel,
    ("nesterov", "svc"): lambda numel, shapes: 4 * numel,
    ("sgd", None): lambda numel, shapes: 4 * numel,
    ("adam", "msign"): lambda numel, shapes: 8 * numel + 4 * len(shapes),
    ("momentum", "sn"): lambda numel, shapes: 4 * numel + 4 * 16 * sum(min(shape) for shape in shapes),
}


@pytest.mark.parametrize(("update", "map"), STATES)
def test_the_state_is_the_buffers_and_16_vectors_a_matrix_for_sn(update, map):
    W = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = SpectralOptimizer(W, 0.1, update, map)
    for w in W:
        w.grad = torch.randn_like(w)
    optimizer.step()
    assert state_bytes(optimizer) == STATES[update, map](sum(w.numel() for w in W), SHAPES)


class Peak(TorchDispatchMode):
    """The most bytes of storage that were made within and alive at once."""

    def __init__(self):
        super().__init__()
        self.given, self.alive, self.peak = set(), {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.given |= {T.untyped_storage()._cdata for T in tree_leaves((args, kwargs)) if isinstance(T, torch.Tensor)} - self.alive.keys()
        out = func(*args, **(kwargs or {}))
        for T in tree_leaves(out):
            if isinstance(T, torch.Tensor) and (key := T.untyped_storage()._cdata) not in self.given:
                self.alive.setdefault(key, (T.untyped_storage()._weak_ref(), T.untyped_storage().nbytes()))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not torch.UntypedStorage._expired(ref)}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", ["nesterov", "adam"])
@pytest.mark.parametrize("capturable", [False, True])
def test_temporary_memory_keeps_within_the_workspace(map, update, capturable):
    """But for a weight that needs more alone: 40 matrices of 16 KiB here."""
    W = [nn.Parameter(torch.randn(64, 64)) for _ in range(40)]
    for w in W:
        w.grad = torch.randn_like(w)
    optimizer = SpectralOptimizer(W, 0.1, update, map, workspace=2**20, capturable=capturable)
    for step in range(3):
        with Peak() as seen:
            optimizer.step()
        assert 2**16 < seen.peak <= 2**20 + (state_bytes(optimizer) if step == 0 else 0)  # the first one makes the state


@pytest.mark.parametrize("map", [*MAPS, None])
@pytest.mark.parametrize("update", UPDATES)
def test_weights_of_several_dtypes_in_one_group_are_each_stepped_as_if_alone(map, update):
    def weights():
        generator = torch.Generator().manual_seed(0)
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
            W = nn.Parameter(torch.randn(6, 4, generator=generator).to(dtype))
            W.grad = torch.randn(6, 4, generator=generator).to(dtype)
            yield W

    together, alone = list(weights()), list(weights())
    for optimizer in (SpectralOptimizer(together, 0.1, update, map), *(SpectralOptimizer([W], 0.1, update, map) for W in alone)):
        optimizer.step()
        optimizer.step()
    for W, V in zip(together, alone, strict=True):
        torch.testing.assert_close(W, V, atol=0, rtol=8 * torch.finfo(W.dtype).eps)


def test_a_learning_rate_that_yaml_read_as_text_is_refused():
    with pytest.raises(BadOption, match=r"lr=.*1e-3.*finite number"):
        SpectralOptimizer([nn.Parameter(torch.zeros(2, 2))], lr="1e-3")
