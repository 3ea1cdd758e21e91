"""The kernels: their torch form against float64, and the Triton code interpreted and compiled, as no GPU is needed for either."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compiler import kernels
from compiler.errors import BadOption

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton does not come with this torch")


@needs_triton
def test_the_triton_kernels_agree_with_torch_in_the_interpreter():
    here = Path(__file__).parent
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{here.parent}"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(here / "interpreted.py")],
        env=env, capture_output=True, text=True, cwd=here.parent, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


COMPILED = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from compiler import triton_kernels as kernels

def ptx(function, types, constants, aligned=(), shape=kernels.Shape(64, 64, 4, 2, 1, False)):
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()}, attrs)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": shape.warps, "num_stages": shape.stages}).asm["ptx"]

numbers = dict.fromkeys(["beta", "delta", "gamma"], "fp32")
for shape in {kernels.shape_of(batch, m, torch.float16) for batch, m in ((1, 256), (32, 2048), (16, 4096))}:
    operands = dict.fromkeys(["a", "rows_of_a", "c", "d", "out"], "*fp16") | {"alpha": "*fp32"}
    if shape.tma:
        operands["rows_of_a"] = f"tensordesc<fp16[{shape.side}, {shape.depth}]>"
    constants = {"C": True, "D": True, "EACH": (True, False, False, False), "EVEN": True, "PRECISION": "ieee", "TMA": shape.tma}
    constants |= {"SIDE": shape.side, "DEPTH": shape.depth, "a_col": 1}
    names = kernels._symmetric.arg_names
    aligned = [n for n in names if operands.get(n) == "*fp16" or n.endswith(("_batch", "_row")) or n in ("m", "k")]
    code = ptx(kernels._symmetric, {**operands, **numbers}, constants, aligned, shape)
    assert "wgmma.mma_async" in code, "no tensor cores"
    assert ("cp.async.bulk.tensor" if shape.tma else "cp.async") in code, "no pipeline"
import triton.language as tl
tables = {"grads": "*i64", "buffers": "*i64", "weights": "*i64", "lows": "*i64", "finite": "*i1"}
numbers = dict.fromkeys(["factors", "squares", "largest", "momentum", "scale", "decay"], "*fp32")
for tall in (False, True):
    ptx(kernels._advance, {**tables, **numbers, "out": "*fp16"}, {"DTYPE": tl.float32, "STATE": tl.float32, "NESTEROV": True, "TALL": tall})
    ptx(kernels._apply, {**tables, **numbers, "U": "*fp16"}, {"DTYPE": tl.bfloat16, "LOW": tall, "TALL": tall})
tables = dict.fromkeys(["weights", "lows", "grads", "means", "squares", "sizes"], "*i64") | {"work": "*i32", "finite": "*i1"}
numbers = dict.fromkeys(["rate", "decay", "root"], "*fp32") | dict.fromkeys(["rest1", "beta2", "rest2", "eps"], "fp32")
for dtype, low in ((tl.float32, False), (tl.bfloat16, False), (tl.bfloat16, True)):
    ptx(kernels._adam, {**tables, **numbers}, {"DTYPE": dtype, "STATE": tl.float32 if low else dtype, "LOW": low, "BLOCK": kernels.BLOCK})
print("compiled")
"""


@needs_triton
def test_the_triton_kernels_compile_for_an_h100_without_one(tmp_path):
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}", "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "compiled", run.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("batch", "m", "k"), [(3, 5, 200), (2, 70, 33), (2, 3 * kernels.STRIP + 7, 64)])
def test_symmetric_products(dtype, batch, m, k, device):
    """Every option, numbers and tensors, also where the triangle is computed in strips."""
    check_symmetric(dtype, batch, m, k, device)


@pytest.mark.parametrize("each", [False, True])
def test_a_symmetric_product_in_fp16_may_be_out_of_range_before_it_is_scaled(each, device):
    """fp16 ends at 65504; sums and summands are in fp32 and rounded once."""
    A = torch.ones(2, 3, 70_000, dtype=torch.float16, device=device)
    alpha = torch.tensor([1e-4, 2e-4], device=device) if each else 1e-4
    out = kernels.symmetric(A, alpha=alpha, C=A[..., :3].clone(), beta=0.5)
    exact = 7 * torch.tensor([1, 2 if each else 1], device=device) + 0.5
    torch.testing.assert_close(out, exact[:, None, None].half().expand_as(out))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("batch", "m", "k"), [(16, 768, 768), (4, 1100, 520), (1, 4096, 256), (1, 4100, 72)])
def test_symmetric_products_by_every_tile(batch, m, k):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check_symmetric(dtype, batch, m, k, torch.device("cuda"))


def check_symmetric(dtype, batch, m, k, device):
    A = (torch.randn(batch, m, k, device=device) / k**0.5).to(dtype)
    C, D = ((lambda T: (T + T.mT) / 2)(torch.randn(batch, m, m, device=device)).to(dtype) for _ in range(2))
    one = torch.ones(batch, device=device)
    for options in (
        {},
        {"alpha": 0.5, "C": C, "beta": -2.0, "D": D, "delta": 0.25, "gamma": 3.0},
        {"alpha": 0.5 * one, "C": C, "beta": -2.0 * one, "D": D, "delta": 0.25 * one, "gamma": 3.0 * one},
    ):
        a, b, d, g = (torch.as_tensor(options.get(x, y), device=device).double().expand(batch)[:, None, None] for x, y in
                      (("alpha", 1.0), ("beta", 0.0), ("delta", 0.0), ("gamma", 0.0)))  # fmt: skip
        exact = a * A.double() @ A.double().mT + b * C.double() + d * D.double() + g * torch.eye(m, device=device)
        result = kernels.symmetric(A, **options)
        assert result.dtype == dtype
        units = 32 if (A.is_cuda, dtype) == (True, torch.float32) else 4  # summed one after the other there
        close = units * torch.finfo(dtype).eps * exact.abs().max().item()
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=max(close, 1e-12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_passes_are_those_of_torch_optim_muon(dtype):
    """Momentum as torch.optim.Muon keeps it, and W ← (1 - η·λ)·W - η·U."""
    G, B, W = (torch.randn(7, 4, dtype=torch.float64) for _ in range(3))
    working = torch.promote_types(dtype, torch.float32)
    out, buffer, weight = torch.empty(1, 4, 7, dtype=working), B.to(dtype, copy=True), W.to(dtype, copy=True)
    yes, zero = torch.tensor([True]), torch.zeros(1, dtype=torch.int32)
    squares, largest = kernels.advance_([G.to(dtype)], [buffer], out, momentum=0.9, nesterov=True, exponent=zero, finite=yes)
    expected = 0.9 * (0.9 * B + 0.1 * G) + 0.1 * G
    close = {"rtol": 0, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out[0].T.double(), expected, **close)
    torch.testing.assert_close(squares.item(), out.square().sum().item(), rtol=1e-5, atol=0)
    assert largest.item() == pytest.approx(buffer.abs().max().item())
    kernels.apply_([weight], out, scale=0.5, decay=0.75, finite=yes)
    torch.testing.assert_close(weight.double(), 0.75 * W.to(dtype).double() - 0.5 * out[0].T.double(), **close)


@needs_triton
def test_matrices_of_different_shape_are_refused_in_one_launch():
    with pytest.raises(BadOption, match="one shape, dtype and strides"):
        kernels._addresses([torch.zeros(2, 3), torch.zeros(3, 2)])


def test_without_a_device_torch_does_it():
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        assert kernels._triton() is None
