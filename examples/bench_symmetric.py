"""How fast is the product known to be symmetric? Every cut of `compiler.triton_kernels.Shape` beside torch.bmm, on CUDA.

Prints a line for each batch of matrices: milliseconds of torch.bmm, of the same step in torch's own operators, and of the kernel by each
cut with its factor over torch.bmm. `shape_of` was chosen from results/symmetric_cuda.txt.

    python examples/bench_symmetric.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

BATCHES = [
    (72, 768, 768), (24, 768, 3072), (32, 512, 2048), (32, 512, 512), (32, 2048, 2048), (24, 2048, 8192), (4, 4096, 4096), (6, 4096, 11008),
    (16, 1024, 1024), (1, 768, 768), (1, 2048, 2048), (4, 768, 3072), (16, 256, 256), (64, 128, 128), (2, 1536, 1536),
]  # fmt: skip
"""(matrices, m, k): with C and D where k = m, as in a polynomial; X·Xᵀ alone elsewhere."""
CUTS = [(128, 64, 8, 4, 1), (128, 64, 4, 3, 2), (64, 64, 4, 4, 3)]
"""(side, depth, warps, stages, programs for each multiprocessor)."""


def line(batch: int, m: int, k: int) -> str:
    """The times of one batch."""
    from compiler.triton_kernels import Shape, symmetric

    polynomial = m == k
    X = (torch.randn(batch, m, k, device="cuda") / k**0.5).half()
    X = (X + X.mT) / 2 if polynomial else X
    D = torch.randn(batch, m, m, device="cuda").half() if polynomial else None
    out, one = torch.empty(batch, m, m, device="cuda", dtype=torch.float16), torch.ones(batch, device="cuda")
    plain = _milliseconds(lambda: torch.bmm(X, X.mT, out=out))
    parts = [f"{batch:3} × {m:4} × {k:5}  bmm {plain:.3f}"]
    if D is not None:
        parts.append(f"torch {_milliseconds(lambda: torch.baddbmm(X, X, X, alpha=0.5, beta=-0.3, out=out).add_(D, alpha=0.2)):.3f}")
    for side, depth, warps, stages, resident in CUTS:
        for tma in (False, True):
            cut = Shape(side, depth, warps, stages, resident, tma=tma)
            numbers: list[float | torch.Tensor] = [0.5, -0.3, 0.2, 0.0] if polynomial else [one, 1.0, 1.0, 0.0]
            spent = _milliseconds(lambda cut=cut, numbers=numbers: symmetric(X, numbers, X if polynomial else None, D, out, cut))
            parts.append(f"{side} w{warps} s{stages} r{resident}{' tma' if tma else ''} {spent:.3f} ({plain / spent:.2f})")
    return "  ".join(parts)


def _milliseconds(work: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(work, warmup=4, rep=16, return_mode="median")  # pyright: ignore[reportReturnType]


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for shape in BATCHES:
        print(line(*shape), flush=True)
