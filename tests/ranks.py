"""Run a function on several ranks over gloo: processes forked from a server that has imported torch, killed when late."""

import multiprocessing
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "compiler"]
LIMIT = 120
"""Seconds until all ranks are killed."""


def over(ranks, check, folder, *args):
    """Call check(*args) on every rank; the first failure is raised here, with the rank's traceback."""
    multiprocessing.set_forkserver_preload(
        ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "compiler", "scaling"]
    )
    store = Path(folder) / f"store-{time.monotonic_ns()}"
    context = mp.start_processes(_rank, (ranks, check, str(store), args), nprocs=ranks, join=False, start_method="forkserver")
    deadline = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{check.__name__} over {ranks} ranks hangs"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _rank(rank, ranks, check, store, args):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=30))
    try:
        check(*args)
    finally:
        dist.destroy_process_group()
