"""What bench_optimizer.py times side by side: our optimizer at every level, AdamW, and whatever other Muon is installed.

Peers are imported inside their builders, so that one that is missing or broken costs a line in the table and nothing else. All run
with Nesterov momentum 0.95 and no weight decay; what differs from a peer's own defaults is said in `options`.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

from compiler import SpectralOptimizer
from compiler.coefficients import SCHEDULES
from compiler.msign import storage

MOMENTUM = 0.95
CLIP = 10_000.0
"""λ of the SVC row. Gradients have σ₁ = 0.01 (momenta.SIZE), the first Φ is (1 - μ²)·G: λ·σ₁(Φ) is about 10."""

APART = "ours, default, weights apart"
GRAPHED = "ours, default, CUDA graph"
GRAM_NS, EMERGING, PYTORCH = "gram-newton-schulz", "emerging-optimizers", "pytorch-optimizer"
PE, FULL, GRAM = {"coefficient_type": "polar_express"}, {"fp32_matmul_prec": "highest"}, {"ns_method": "gram_newton_schulz"}

Weights = list[torch.nn.Parameter]


class Steps(Protocol):
    """What is timed."""

    def step(self) -> Any:
        """Update the weights from their gradients."""
        ...


class Chunk(NamedTuple):
    """X ← q(X·Xᵀ)·X: one product for X·Xᵀ, some of (m, m) matrices for the polynomial q, one for q·X."""

    squares: int
    dtype: torch.dtype


class Floor(NamedTuple):
    """The least work an algorithm needs.

    Attributes:
        chunks: those of an (m, n) matrix, m ≤ n.
        symmetric: whether kernels compute one triangle of X·Xᵀ and of products of symmetric matrices that commute.
        passes: reads and writes of a tensor of the weights' size and dtype, if every elementwise stage were one pass.
        between: the same, of what lies between those stages and the products: input and result of the iteration.
    """

    chunks: Callable[[int, int], tuple[Chunk, ...]] = lambda _m, _n: ()
    symmetric: bool = False
    passes: int = 5  # read gradient, momentum, weight; write momentum, weight
    between: int = 2

    def flops(self, m: int, n: int) -> Counter[torch.dtype]:
        """Floating point operations of one (m, n) matrix's products, m ≤ n."""
        found: Counter[torch.dtype] = Counter()
        for chunk in self.chunks(m, n):
            triangle = 1 if self.symmetric else 2
            found[chunk.dtype] += triangle * (m * m * n + chunk.squares * m**3) + 2 * m * m * n
        return found


class Contestant(NamedTuple):
    """One line of the table.

    Attributes:
        name: as printed.
        package: what pip installs; "" for ours.
        build: weights -> the optimizer, at learning rate 1.
        floor: of its algorithm; None where none is known (an SVD).
        kind: the map: "msign", "sn", "svc" or "" for AdamW.
        scale: what its update of an (out, in) weight is multiplied by, besides the learning rate.
        options: how it differs from the package's defaults.
        cuda: whether it runs on CUDA only.
    """

    name: str
    package: str
    build: Callable[[Weights], Steps]
    floor: Floor | None
    kind: str = "msign"
    scale: Callable[[int, int], float] = lambda _out, _in: 1.0
    options: str = ""
    cuda: bool = False


class _Apart:
    """One optimizer per weight: what batching is measured against."""

    def __init__(self, weights: Weights) -> None:
        self.optimizers = [_ours()([W]) for W in weights]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class _Graphed:
    """The step as a CUDA graph, captured after three steps: for gradients that stay where they are."""

    def __init__(self, map: str, weights: Weights) -> None:
        self.optimizer, self.taken, self.graph = _ours(map)(weights), 0, None

    def step(self) -> None:
        self.taken += 1
        if self.taken <= 3:
            self.optimizer.step()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.optimizer.step()
        self.graph.replay()


def _ours(map: str | None = "msign", accuracy: str = "default") -> Callable[[Weights], Steps]:
    def build(weights: Weights) -> Steps:
        return SpectralOptimizer(weights, 1.0, "nesterov", map, momentum=MOMENTUM, accuracy=accuracy, clip=CLIP)

    return build


def _our_floor(accuracy: str, device: torch.device) -> Floor | None:
    """Of `compiler.msign`: a triangle of X·Xᵀ and of every square, though on a CPU it takes whole ones below 384 rows."""
    if accuracy == "exact" and device.type == "cpu":
        return None
    chunks = [len(chunk) for chunk in SCHEDULES[accuracy].chunks]

    def of(m: int, _n: int) -> tuple[Chunk, ...]:
        working = storage(m, torch.float32, device, accuracy)
        return tuple(Chunk(n, working) for n in chunks)

    return Floor(of, symmetric=True)


def _gram(dtype: torch.dtype, cuts: tuple[int, ...]) -> tuple[Chunk, ...]:
    """Quintics in Gram space, X·Xᵀ made anew at the cuts: R² in each, and R·Z, (R·Z)·Z, Q·Z in all but the first of a chunk."""
    return tuple(Chunk(4 * (last - first) - 3, dtype) for first, last in pairwise(cuts))


def _peer(where: str, **options: Any) -> Callable[[Weights], Steps]:
    """The optimizer class at "module:class", imported when it is built, with the learning rate 1."""

    def build(weights: Weights) -> Steps:
        module, _, name = where.partition(":")
        with contextlib.redirect_stdout(io.StringIO()):  # gram-newton-schulz prints its search for restarts
            return getattr(import_module(module), name)(weights, lr=1.0, **options)

    return build


def _pytorch_optimizer(**options: Any) -> Callable[[Weights], Steps]:
    build = _peer("pytorch_optimizer:Muon", momentum=MOMENTUM, **options)
    return lambda weights: build([{"params": weights, "use_muon": True}])  # pyright: ignore[reportArgumentType]


def _tall(out: int, into: int) -> float:
    return math.sqrt(max(1.0, out / into))


def _standard(dtype: torch.dtype, *, symmetric: bool = False) -> Floor:
    """Five quintics, X·Xᵀ made anew before each."""
    return Floor(lambda _m, _n: (Chunk(1, dtype),) * 5, symmetric)


def _gram_or_standard(dtype: torch.dtype, *, symmetric: bool = False) -> Floor:
    """Five quintics in Gram space with one restart; the usual iteration for square matrices."""
    return Floor(lambda m, n: _gram(dtype, (0, 2, 5)) if m < n else _standard(dtype).chunks(m, n), symmetric)


def contestants(device: torch.device) -> list[Contestant]:
    """All lines of the table, ours first."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    gram = Floor(lambda _m, _n: _gram(fp16, (0, 2, 5)))
    plain = {"momentum": MOMENTUM, "weight_decay": 0.0}
    gram_ns = partial(_peer, "gram_newton_schulz:Muon", **plain, adjust_lr=None)
    emerging = partial(_peer, "emerging_optimizers.orthogonalized_optimizers:Muon", **plain, nesterov=True, scale_mode="shape_scaling")
    optimuon = partial(_peer, "optimuon:Muon", **plain, adjust_lr="none", normuon=False)
    heavyball = _peer("heavyball:Muon", betas=(MOMENTUM, 0.99))
    muonium = _peer("muonium.optim:Muon", momentum=MOMENTUM, wd=0.0)
    triton_muon = _peer("triton_muon_adamw.muon.triton_muon:TritonMuon", beta=MOMENTUM, weight_decay=0.0)
    by = Contestant
    return [
        *(by(f"ours, {level}", "", _ours(accuracy=level), _our_floor(level, device)) for level in SCHEDULES),
        by(APART, "", _Apart, _our_floor("default", device), options="an optimizer for each weight"),
        by(GRAPHED, "", partial(_Graphed, "msign"), _our_floor("default", device), cuda=True),
        by("ours, SN", "", _ours("sn"), Floor(between=5), kind="sn"),
        by("ours, SN, CUDA graph", "", partial(_Graphed, "sn"), Floor(between=5), kind="sn", cuda=True),
        by("ours, SVC", "", _ours("svc"), None, kind="svc", options=f"clip={CLIP:g}"),
        by("AdamW, fused", "torch", _peer("torch.optim:AdamW", weight_decay=0.0, fused=True), Floor(passes=7, between=0), kind=""),
        by("torch.optim.Muon", "torch", _peer("torch.optim:Muon", **plain), _standard(bf16), scale=_tall),
        by("Keller Jordan", "muon-optimizer", _peer("muon:SingleDeviceMuon", momentum=MOMENTUM), _standard(bf16), scale=_tall),
        by("heavyball", "heavyball", heavyball, _standard(bf16), scale=_tall),
        by("gram-newton-schulz", GRAM_NS, gram_ns(ns_use_kernels=False), _gram_or_standard(fp16), options="ns_use_kernels=False"),
        by("gram-newton-schulz, kernels", GRAM_NS, gram_ns(), _gram_or_standard(fp16, symmetric=True), cuda=True),
        by("emerging-optimizers", EMERGING, emerging(), _standard(bf16), scale=_tall),
        by("emerging-optimizers, PE", EMERGING, emerging(**PE), _standard(bf16), scale=_tall, options=_said(PE)),
        by(
            "emerging-optimizers, PE, syrk",
            EMERGING,
            emerging(**PE, use_syrk=True),
            _standard(bf16, symmetric=True),
            scale=_tall,
            options=_said({**PE, "use_syrk": True}),
            cuda=True,
        ),
        by(
            "emerging-optimizers, PE, fp32",
            EMERGING,
            emerging(**PE, **FULL),
            _standard(fp32),
            scale=_tall,
            options=_said({**PE, **FULL}),
        ),
        by("optimuon", "optimuon", optimuon(), _gram_or_standard(fp16), options="normuon=False"),
        by(
            "optimuon, fp32",
            "optimuon",
            optimuon(ns_dtype=fp32),
            _gram_or_standard(fp32),
            options="normuon=False, ns_dtype=torch.float32",
        ),
        by("muonium", "muonium", muonium, _standard(bf16, symmetric=True), scale=_tall, cuda=True),
        by("pytorch-optimizer", PYTORCH, _pytorch_optimizer(), _standard(bf16), scale=_tall),
        by("pytorch-optimizer, Gram", PYTORCH, _pytorch_optimizer(**GRAM), gram, scale=_tall, options=_said(GRAM)),
        by("triton-muon-adamw", "triton-muon-adamw", triton_muon, _standard(bf16, symmetric=True), scale=_tall, cuda=True),
    ]


def _said(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
