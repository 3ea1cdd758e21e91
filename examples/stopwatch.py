"""One contestant with weights and state of its own: its steps timed, its kernels counted, its memory measured."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from bench_results import Timing
from contestants import Contestant, Steps, Weights
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Shapes = Sequence[tuple[int, int]]

PATIENCE = 10.0
"""Seconds of timed steps after which a contestant rests; one whose second step takes longer is not profiled."""

OPERATORS = {"mm", "bmm", "addmm", "baddbmm", "_linalg_svd", "_linalg_eigh"}
KERNELS = ("gemm", "nvjet", "cutlass", "symmetric", "syrk", "xxt", "gram")
"""What multiplies (or decomposes) matrices: operators on a CPU, parts of kernels' names on CUDA."""


class Runner:
    """A contestant on one suite. After an error, `why` says what happened and nothing more is done."""

    def __init__(self, contestant: Contestant, why: str = "") -> None:
        self.contestant, self.why = contestant, why
        self.optimizer: Steps | None = None
        self.milliseconds: list[float] = []
        self.host: list[float] = []
        self.processor: list[float] = []
        self.measured: dict[str, Any] = {}

    def start(self, sets: Sequence[list[Tensor]], warm_up: int) -> None:
        """Make weights and optimizer, take the first steps, and one under the profiler."""
        self.device = sets[0][0].device
        self.weights: Weights = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in sets[0]]
        self.grads = [torch.empty_like(W) for W in self.weights]
        held = self._allocated()
        try:
            begun = time.perf_counter()
            self._load(sets[0])
            self.optimizer = self.contestant.build(self.weights)
            self._step()
            first = time.perf_counter() - begun
            for number in range(warm_up - 1):
                self._load(sets[(number + 1) % len(sets)])
                begun = time.perf_counter()
                self._step()
                if time.perf_counter() - begun > PATIENCE:
                    break
            else:
                self._load(sets[0])
                self.measured = self._profiled()
        except Exception as error:  # whatever a peer raises becomes its line in the table
            self.why = f"does not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.stop()
            return
        state = self._allocated() - held if self.device.type == "cuda" else _bytes_of_state(self.optimizer, self.weights)
        self.measured |= {"state_bytes": state, "first_step_seconds": round(first, 3)}

    def step(self, grads: list[Tensor]) -> None:
        """One timed step. The gradients are put in place before."""
        self._load(grads)
        self._synchronize()
        begun, spent = time.perf_counter(), time.process_time()
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._step(wait=False)
            end.record()
            self.host.append(1e3 * (time.perf_counter() - begun))
            self._synchronize()
            self.milliseconds.append(start.elapsed_time(end))
        else:
            self._step()
            self.milliseconds.append(1e3 * (time.perf_counter() - begun))
            self.processor.append(1e3 * (time.process_time() - spent))

    @property
    def rests(self) -> bool:
        """Whether it cannot go on or has had its time: two steps at least, one if that alone took very long."""
        spent = sum(self.milliseconds) / 1e3
        return self.optimizer is None or (spent > PATIENCE and (len(self.milliseconds) > 1 or spent > 2 * PATIENCE))

    def stop(self) -> None:
        """Free the memory."""
        self.optimizer = None
        self.weights, self.grads = [], []
        gc.collect()
        torch.cuda.empty_cache()

    def timing(self, floor: float | None, dtype: str) -> Timing:
        """The record."""
        who = self.contestant
        return Timing(
            name=who.name,
            package=who.package,
            kind=who.kind,
            options=who.options,
            why=self.why,
            floor=floor,
            products_in=dtype,
            milliseconds=_rounded(self.milliseconds),
            host_milliseconds=_rounded(self.host),
            processor_milliseconds=_rounded(self.processor),
            **self.measured,
        )

    def _load(self, grads: list[Tensor]) -> None:
        """Some peers overwrite gradients, some drop them: each step gets fresh ones."""
        for W, buffer, grad in zip(self.weights, self.grads, grads, strict=True):
            W.grad = buffer.copy_(grad)

    def _step(self, *, wait: bool = True) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
        if wait:
            self._synchronize()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _profiled(self) -> dict[str, Any]:
        """Launches, the share of time in products and the workspace of one step."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            held = self._allocated()
            found = self._under_profiler([ProfilerActivity.CPU, ProfilerActivity.CUDA])
            workspace = torch.cuda.max_memory_allocated(self.device) - held
            events = [(e.key, e.count, e.self_device_time_total) for e in found.key_averages() if e.device_type.name == "CUDA"]
        else:
            found = self._under_profiler([ProfilerActivity.CPU])
            workspace = _most_held(found)
            events = [(e.key, e.count, e.self_cpu_time_total) for e in found.key_averages() if e.key != "[memory]"]
        total = sum(spent for _, _, spent in events)
        products = sum(spent for key, _, spent in events if _multiplies(key)) / max(total, 1e-9)
        return {"launches": sum(count for _, count, _ in events), "products": round(products, 3), "workspace_bytes": workspace}

    def _under_profiler(self, activities: list[ProfilerActivity]) -> profile:
        with warnings.catch_warnings(), profile(activities=activities, profile_memory=self.device.type == "cpu", acc_events=True) as found:
            warnings.simplefilter("ignore")
            self._step()
        return found


def _rounded(times: list[float]) -> tuple[float, ...]:
    return tuple(float(f"{ms:.5g}") for ms in times)


def _multiplies(key: str) -> bool:
    return key.split("::")[-1] in OPERATORS or any(word in key.lower() for word in KERNELS)


def _most_held(found: profile) -> int:
    """The most bytes held at once beyond those at the start, from the profiler's record of allocations."""
    results = found.profiler.kineto_results if found.profiler else None
    events = [e for e in results.events() if e.name() == "[memory]"] if results else []
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, held)
    return most


def _bytes_of_state(optimizer: Steps, weights: Weights) -> int:
    """Of the tensors in the state, each storage once."""
    states = [getattr(part, "state", {}) for part in getattr(optimizer, "optimizers", [optimizer])]
    storages = {T.untyped_storage().data_ptr(): T.untyped_storage().nbytes() for state in states for T in _tensors(dict(state))}
    for W in weights:
        storages.pop(W.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
