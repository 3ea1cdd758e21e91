"""The Triton kernels against torch, run by test_kernels.py in a process of its own: TRITON_INTERPRET is read when they are made."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from compiler import kernels, triton_kernels
from compiler.bits import join
from compiler.norms import follow
from compiler.triton_kernels import _root

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
PRODUCTS = [torch.float16, torch.float32]
"""The interpreter (Triton 3.8) multiplies the bits of bf16 as integers: products of bf16 are compiled, but not run, here."""
EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-18}


BROKEN = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4),
    reason="the interpreter of Triton before 3.7 takes int() of arrays, which NumPy 2.4 refuses",
)
pytestmark = BROKEN


@pytest.fixture(autouse=True)
def interpreter():
    torch.manual_seed(0)
    assert kernels._triton() is not None


def in_torch(function, *args, **kwargs):
    """The same call with Triton out of the way."""
    found, kernels.runs_triton = kernels.runs_triton, lambda *_: None
    try:
        return function(*args, **kwargs)
    finally:
        kernels.runs_triton = found


@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
@pytest.mark.parametrize(("batch", "m", "k"), [(1, 64, 64), (2, 70, 33), (3, 5, 200), (1, 1, 1), (1, 520, 8)])
def test_symmetric_products_are_those_of_torch(dtype, batch, m, k):
    A = (torch.randn(batch, m, k) / k**0.5).to(dtype)
    C, D = ((lambda T: (T + T.mT) / 2)(torch.randn(batch, m, m)).to(dtype) for _ in range(2))
    for options in (
        {},
        {"alpha": 0.5, "C": C, "beta": -2.0, "gamma": 3.0},
        {
            "alpha": torch.rand(batch) + 1,
            "C": C,
            "beta": torch.randn(batch),
            "D": D,
            "delta": torch.randn(batch),
            "gamma": torch.randn(batch),
        },
        {"D": D, "delta": 0.25, "gamma": torch.randn(batch)},
    ):
        exact = in_torch(
            kernels.symmetric, A.double(), **{name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        )
        result = kernels.symmetric(A, **options)
        assert result.dtype == dtype
        tile = torch.arange(m) // triton_kernels.shape_of(batch, m, dtype).side
        mirrored = tile[:, None] != tile  # NumPy's own product of a tile with itself is not always symmetric to the last bit
        assert torch.equal(result * mirrored, result.mT * mirrored)
        torch.testing.assert_close(result.double(), exact, rtol=EPS[dtype], atol=EPS[dtype] * exact.abs().max().item())


@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
def test_operands_of_any_strides(dtype):
    """A slice of columns, every second row of the result, columns for rows."""
    A = torch.randn(2, 80, 80).to(dtype) / 9
    exact = A.double() @ A.double().mT
    wide = torch.zeros(2, 80, 100, dtype=dtype)
    wide[..., 10:90] = A
    out = torch.zeros(2, 80, 96, dtype=dtype)[..., :80]
    kernels.symmetric(wide[..., 10:90], out=out)
    torch.testing.assert_close(out.double(), exact, rtol=EPS[dtype], atol=4 * EPS[dtype] * exact.abs().max().item())
    tall = torch.randn(2, 70, 40).to(dtype)
    torch.testing.assert_close(kernels.symmetric(tall.mT).double(), tall.mT.double() @ tall.double(), rtol=EPS[dtype], atol=0.02)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("m", "k"), [(72, 40), (128, 64), (136, 72)])
def test_tiles_that_reach_into_the_next_matrix(m, k, tma):
    """The descriptor of the tensor memory accelerator holds all matrices one below the other."""
    A = (torch.randn(3, m, k) / k**0.5).half()
    C = torch.randn(3, m, m).half()
    C = (C + C.mT) / 2
    out = torch.full((3, m, m), float("nan")).half()
    triton_kernels.symmetric(A, [0.5, -1.0, 1.0, 2.0], C, None, out, triton_kernels.Shape(64, 32, 4, 3, 1, tma=tma))
    exact = 0.5 * A.double() @ A.double().mT - C.double() + 2 * torch.eye(m)
    torch.testing.assert_close(out.double(), exact, rtol=EPS[A.dtype], atol=4 * EPS[A.dtype])


@triton.jit
def _rows(t, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, _root(tl.load(t + at)))


def test_every_tile_of_a_triangle_is_found():
    """The row of entry t, also where fp32 cannot hold 8t + 1 exactly."""
    i = torch.cat([torch.arange(64), torch.randint(64, 8192, (192,))])
    for t in (i * (i + 1) // 2, i * (i + 1) // 2 + i):
        out = torch.zeros(256, dtype=torch.int32)
        _rows[(1,)](t.int(), out, N=256)
        assert torch.equal(out, i.int())


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float16, (64, 128)), (torch.bfloat16, (130, 70)), (torch.float32, (1, 9)), (torch.float32, (70, 65))],
    ids=str,
)
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_pass_before_is_that_of_torch(dtype, shape, nesterov):
    grads = [torch.randn(shape).to(dtype) * 2.0 ** (3 * i) for i in range(4)]
    grads[2][0, 0] = float("nan")
    finite, exponent = torch.tensor([True, True, False, True]), torch.tensor([0, 4, 7, -3], dtype=torch.int32)
    for momentum in (0.9, torch.tensor(0.9), None):
        results = []
        for call in (lambda f, *a, **k: f(*a, **k), in_torch):
            torch.manual_seed(1)
            buffers = None if momentum is None else [torch.randn(shape).to(dtype) for _ in grads]
            out = torch.full((4, min(shape), max(shape)), float("nan"), dtype=torch.float16 if dtype == torch.float32 else dtype)
            sums = call(
                kernels.advance_, grads, buffers, out, momentum=0.0 if momentum is None else momentum, nesterov=nesterov,
                exponent=exponent, finite=finite,
            )  # fmt: skip
            results.append((out, *(buffers or []), *sums))
        for ours, torchs in zip(*results, strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-3 + EPS[dtype], atol=1e-5 + 4 * EPS[dtype] * torchs.abs().max().item())
        assert results[0][0][2].eq(0).all()
        assert results[0][-2][2] == 0


def test_a_weight_that_is_not_finite_keeps_every_bit():
    shape = (40, 100)
    grads, buffers, weights = ([torch.randn(shape) for _ in range(2)] for _ in range(3))
    grads[1][3, 3] = float("inf")
    before, finite = buffers[1].clone(), torch.tensor([True, False])
    out = torch.empty(2, *shape, dtype=torch.float16)
    kernels.advance_(grads, buffers, out, momentum=0.5, nesterov=True, exponent=torch.zeros(2, dtype=torch.int32), finite=finite)
    assert torch.equal(buffers[1], before)
    same = weights[1].clone()
    kernels.apply_(weights, torch.full((2, *shape), float("nan")), scale=1.0, decay=0.5, finite=finite)
    assert torch.equal(weights[1], same)
    assert weights[0].isnan().all()


def test_exponents_beyond_the_range_of_fp32_are_exact():
    G = torch.tensor([[2.0**-140, 2.0**-149]])
    out = torch.empty(1, 1, 2, dtype=torch.float32)
    kernels.advance_(
        [G], None, out, momentum=0.0, nesterov=False, exponent=torch.tensor([-139], dtype=torch.int32), finite=torch.tensor([True])
    )
    assert out.flatten().tolist() == [0.5, 2.0**-10]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 80), (130, 70)], ids=str)
def test_the_pass_after_is_that_of_torch(dtype, shape):
    U = torch.randn(3, min(shape), max(shape)).half()
    finite = torch.tensor([True, False, True])
    for scale, decay in ((torch.tensor([0.1, 0.2, -0.3]), 0.9), (0.01, torch.tensor(1.0))):
        results = []
        for call in (lambda f, *a, **k: f(*a, **k), in_torch):
            torch.manual_seed(1)
            weights = [torch.randn(shape).to(dtype) for _ in range(3)]
            call(kernels.apply_, weights, U, scale=scale, decay=decay, finite=finite)
            results.append(weights)
        for ours, torchs in zip(*results, strict=True):
            torch.testing.assert_close(ours, torchs, rtol=EPS[dtype], atol=1e-6)


@pytest.mark.parametrize(("dtype", "master"), [*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True)], ids=str)
def test_adams_pass_is_that_of_torch(dtype, master):
    """Tensors smaller and larger than a block, one spoilt, no scalar alike; bf16 also kept to fp32."""
    shapes, finite = [(7,), (), (40, 60), (3, 5, 70), (1024,)], torch.tensor([True, True, True, False, True])
    factors = {"rate": torch.rand(5), "decay": 1 - torch.rand(5) / 10, "root": torch.rand(5)}
    results = []
    for call in (lambda f, *a, **k: f(*a, **k), in_torch):
        torch.manual_seed(1)
        weights, grads = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
        means, squares = ([f(shape).to(torch.float32 if master else dtype) for shape in shapes] for f in (torch.randn, torch.rand))
        lows = [torch.randint(-(2**15), 2**15, shape, dtype=torch.int16) for shape in shapes] if master else None
        grads[3].flatten()[5] = torch.nan
        before = grads[3].clone(), weights[3].clone(), means[3].clone(), squares[3].clone()
        call(kernels.adam_, weights, grads, means, squares, betas=(0.9, 0.99), eps=1e-3, finite=finite, lows=lows, **factors)
        for kept, now in zip(before, (grads[3], weights[3], means[3], squares[3]), strict=True):
            torch.testing.assert_close(now, kept, rtol=0, atol=0, equal_nan=True)
        results.append((weights if lows is None else [join(W, low) for W, low in zip(weights, lows, strict=True)]) + means + squares)
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=EPS[ours.dtype], atol=EPS[ours.dtype] if ours.dtype != torch.float32 else 1e-6)


@pytest.mark.parametrize("shape", [(64, 80), (130, 70)], ids=str)
def test_bits_that_bf16_lacks_are_kept(shape):
    """Sums of many small steps, with old bits of either sign, and zeros; exactly as torch joins and splits them."""
    results = []
    for call in (lambda f, *a, **k: f(*a, **k), in_torch):
        torch.manual_seed(2)
        weights = [(torch.randn(shape) * (torch.rand(shape) > 0.1)).bfloat16() for _ in range(3)]
        lows = [torch.randint(-(2**15), 2**15, shape, dtype=torch.int16) for _ in weights]
        finite = torch.tensor([True, False, True])
        before = weights[1].clone(), lows[1].clone()
        for _ in range(4):
            U = torch.randn(3, min(shape), max(shape)).half()
            call(kernels.apply_, weights, U, scale=torch.full((3,), 2.0**-12), decay=1.0, finite=finite, lows=lows)
        assert torch.equal(weights[1], before[0])
        assert torch.equal(lows[1], before[1])
        results.append([join(W, low) for W, low in zip(weights, lows, strict=True)])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=2**-22, atol=2**-30)


def test_slices_of_weights_are_taken_where_they_lie():
    """Views of one fused weight: rows of q, k and v."""
    fused, grad = torch.randn(96, 64), torch.randn(96, 64)
    expected = fused - 0.1 * grad
    parts = [fused[i : i + 32] for i in (0, 32, 64)]
    out = torch.empty(3, 32, 64)
    grads = [grad[i : i + 32] for i in (0, 32, 64)]
    kernels.advance_(
        grads, None, out, momentum=0.0, nesterov=False, exponent=torch.zeros(3, dtype=torch.int32), finite=torch.ones(3, dtype=torch.bool)
    )
    kernels.apply_(parts, out, scale=0.1, decay=1.0, finite=torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(fused, expected)


def test_the_same_input_gives_the_same_bits():
    A = torch.randn(2, 100, 60)
    assert torch.equal(kernels.symmetric(A), kernels.symmetric(A))


@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
def test_the_spectral_norm_of_a_drifting_matrix_is_followed(dtype):
    """As Φ drifts with momentum 0.9; then a direction that was not there before takes the lead. fp16 is what CUDA takes."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3, 40, 60, generator=generator) * torch.logspace(0, -2, 40)[:, None]
    basis = torch.linalg.qr(torch.randn(3, 40, 16, generator=generator))[0]
    for step in range(14):
        X = 0.9 * X + 0.1 * torch.randn(3, 40, 60, generator=generator) * torch.logspace(0, -2, 40)[:, None]
        if step == 10:
            X[:, 39] += 3 * X.square().sum((1, 2), keepdim=True).sqrt()[..., 0] * torch.nn.functional.normalize(torch.randn(3, 60), dim=1)
        Y = X / X.abs().amax((1, 2), keepdim=True)
        sigma, basis = follow(Y.to(dtype), basis)
        ratio = sigma / torch.linalg.matrix_norm(Y, 2)
        if step > 1:
            assert ratio.min() > 0.998
            assert ratio.max() < 1 + EPS[dtype]


def test_the_spectral_norm_of_zero_and_of_rank_one():
    basis = torch.linalg.qr(torch.randn(2, 20, 16))[0]
    X = torch.stack([torch.zeros(20, 30), torch.outer(torch.randn(20), torch.randn(30))])
    for _ in range(3):
        sigma, basis = follow(X, basis)
        assert basis.isfinite().all()
        torch.testing.assert_close(sigma, torch.linalg.matrix_norm(X, 2), rtol=1e-4, atol=1e-6)
