"""This machine: its name, its rates, the versions of what runs on it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import torch

from scaling.measure import Environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that change what is fast: results under other values are kept apart."""


class Machine(Environment):
    """Where numbers were measured, and with what."""

    processor: str
    driver: str
    threads: int
    variables: dict[str, str]
    packages: dict[str, str]
    teraflops: dict[str, float]
    gigabytes_per_second: float

    @property
    def title(self) -> str:
        """The device in words, and what was set to change it."""
        name = self.processor if self.device == "cpu" else self.device
        return ", ".join([f"{name} ({self.threads} threads)" if self.device == "cpu" else name, *self.set])

    @property
    def set(self) -> list[str]:
        """Environment variables that change what is fast."""
        return [f"{name}={value}" for name, value in self.variables.items()]


def measured(device: torch.device, packages: Iterable[str]) -> Machine:
    """This machine, its rates, and the versions of those packages."""
    cuda = device.type == "cuda"
    return Machine(
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.platform(),
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        commit=_git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        processor=_processor(),
        driver=_run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "",
        threads=torch.get_num_threads(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        packages={name: version for name in sorted({*packages, "triton", "quack-kernels"}) if (version := installed(name))},
        teraflops={name: float(f"{_product_rate(dtype, device) / 1e12:.4g}") for name, dtype in DTYPES.items()},
        gigabytes_per_second=float(f"{_copy_rate(device) / 1e9:.4g}"),
    )


def _git(*arguments: str) -> str:
    return _run("git", "-C", str(Path(__file__).parent), *arguments)


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The fastest of some repeats, after one to warm up."""
    best = float("inf")
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = time.perf_counter() - begun
        best = min(best, spent)
        if spent > 5:
            break
    return best


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square product, 256 first to see whether a large one is worth waiting for."""
    rate = 0.0
    for size in (256, 1024) if device.type == "cpu" else (8192,):
        if size == 1024 and rate < 5e9:
            break
        A, B = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rate = max(rate, 2 * size**3 / _seconds(lambda A=A, B=B: A @ B, device, 8))
    return rate


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written each second by a copy that no cache holds."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, 8)


def installed(package: str) -> str | None:
    """Its version, if pip knows it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
