"""The optimizer over ranks: the updates of a single process, the bytes of the plan, and no rank left waiting."""

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import over
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from compiler import SpectralOptimizer
from compiler.errors import BadGradient, NotShardable


def matrix(m, n):
    return [[[m, "out", 0, m]], [[n, "in", 0, n]]]


MUON = {"map": "msign", "blocks": None}
ADAM = {"map": None, "update": "adam"}
HEADS = [[[5, "copy", 0, 5], [3, "out", 0, 3]], [[14, "in", 0, 14]]]  # cut by every way of sharding 15 rows
QKV = [{"axes": [[[24, "out", a, a + 8]], [[10, "in", 0, 10]]], "lr_scale": scale} for a, scale in ((0, 1.0), (8, 2.0), (16, 0.5))]
PARITY = [{"axes": [[[9, "out", 0, 9], [2, "copy", i, i + 1]], [[7, "in", 0, 7]]], "update": u} for i, u in ((0, "momentum"), (1, "adam"))]
MIXED = [{"axes": [[[11, "out", 0, 6]], [[6, "in", 0, 6]]]}, {"axes": [[[11, "out", 6, 11]], [[6, "in", 0, 6]]], **ADAM}]
EXPERTS = [{"axes": [[[6, "copy", 0, 6]], [[5, "out", 0, 5]], [[8, "in", 0, 8]]]}]
CONV = [{"axes": [[[9, "out", 0, 9]], [[4, "in", 0, 4]], [[3, "in", 0, 3]], [[3, "in", 0, 3]]]}]

WEIGHTS = [
    ((33, 70), {}),
    ((70, 33), {}),
    ((3, 33), {}),  # empty shards on 4 ranks
    ((40, 16), {}),
    ((15, 14), {"blocks": [{"axes": HEADS}]}),
    ((24, 10), {"blocks": QKV}),
    ((18, 7), {"blocks": PARITY}),
    ((11, 6), {"blocks": MIXED}),
    ((6, 5, 8), {"blocks": EXPERTS}),
    ((9, 4, 3, 3), {"blocks": CONV}),
    ((7,), ADAM),
    ((1,), ADAM),
    ((5, 6), {**ADAM, "map": None}),
]


def group(W, options, i):
    return {"params": [(f"w{i}", W)], "weight_decay": 0.1, **options}


def both(placement, options, dtype=torch.float32):
    """The same weights here alone and over all ranks, with an optimizer each."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)) for i, (shape, _) in enumerate(WEIGHTS)]
    place = [placement if placement.is_replicate() or len(shape) > placement.dim else Replicate() for shape, _ in WEIGHTS]
    spread = [nn.Parameter(distribute_tensor(W.detach().clone(), mesh, [p], src_data_rank=None)) for W, p in zip(alone, place, strict=True)]
    return [
        (Ws, SpectralOptimizer([group(W, own, i) for i, (W, (_, own)) in enumerate(zip(Ws, WEIGHTS, strict=True))], 0.1, **options))
        for Ws in (alone, spread)
    ]


def gradients(Ws, step, scale=1.0):
    for i, W in enumerate(Ws):
        G = torch.randn(W.shape, generator=torch.Generator().manual_seed(1000 * step + i)).to(W.dtype) * scale
        W.grad = distribute_tensor(G, W.device_mesh, W.placements, src_data_rank=None) if isinstance(W, DTensor) else G


def furthest(alone, spread):
    return max((a - b.full_tensor()).abs().max().item() for a, b in zip(alone, spread, strict=True))


def updates_are_those_of_one_process(placement, options, tolerance):
    (alone, single), (spread, shared) = both(placement, options)
    for step in range(3):
        gradients(alone, step), gradients(spread, step)
        single.step(), shared.step()
        assert furthest(alone, spread) < tolerance, (
            step,
            [(a - b.full_tensor()).abs().max().item() for a, b in zip(alone, spread, strict=True)],
        )
    for W, other in zip(alone, spread, strict=True):
        for name, value in single.state[W].items():
            if name.startswith(("momentum", "exp")):
                assert shared.state[other][name].placements == other.placements
                assert shared.state[other][name].full_tensor().equal(value)


MAPPINGS = [{}, {"map": "sn"}, {"map": "svc", "clip": 0.3}, {"map": "sn", "strict": True}, {"update": "adam", "maximize": True}]
MAPPINGS += [{"capturable": True, "update": "adam"}, {"capturable": True, "map": "sn"}]


def every_map_on_every_placement(tolerance):
    for options in MAPPINGS:
        updates_are_those_of_one_process(Shard(0), options, tolerance)
    for placement in (Shard(1), Replicate()):
        for options in MAPPINGS[:2]:
            updates_are_those_of_one_process(placement, options, tolerance)


@pytest.mark.parametrize("ranks", [2, 4])
def test_updates_are_those_of_one_process(ranks, tmp_path):
    """Fused, interleaved, mixed and convolutional weights, experts, heads cut by shard boundaries, empty shards."""
    over(ranks, every_map_on_every_placement, tmp_path, 1e-5)


def half_precision_travels(tolerance):
    """One step in fp16 moves each weight by its update up to rounding; the replicas of a weight stay the same to the bit."""
    for placement, group in ((Shard(0), None), (Replicate(), dist.group.WORLD)):
        (alone, single), (spread, shared) = both(placement, {"travel": "half", "process_group": group})
        for scale in (1.0, 1e-30, 1e30):
            gradients(alone, 0, scale), gradients(spread, 0, scale)
            single.step(), shared.step()
        assert furthest(alone, spread) < tolerance
        for W in spread:
            if W.placements[0].is_replicate():
                copies = [torch.empty_like(W.to_local()) for _ in range(dist.get_world_size())]
                dist.all_gather(copies, W.to_local().contiguous())
                assert all(torch.equal(copies[0], other) for other in copies)


def test_half_precision_travels_at_any_scale(tmp_path):
    over(2, half_precision_travels, tmp_path, 2e-3)


# --- what travels -------------------------------------------------------------------------------------------------------------


def squares(count, size, options, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    weights = [nn.Parameter(distribute_tensor(torch.zeros(size, size), mesh, [Shard(0)])) for _ in range(count)]
    optimizer = SpectralOptimizer([(f"w{i}", W) for i, W in enumerate(weights)], 0.1, **options)
    return weights, optimizer


def bytes_are_those_of_the_plan():
    ranks = dist.get_world_size()
    for travel, width in (("full", 4), ("half", 2)):
        weights, optimizer = squares(ranks, 32, {"travel": travel}, ranks)
        gradients(weights, 0)
        optimizer.step()
        # one matrix each: 3/4 of the own shards there, 3/4 of the own matrix back; in fp16 with an exponent (8 bytes) a part
        parts = (ranks - 1) * 2 if travel == "half" else 0
        expected = 2 * (ranks - 1) / ranks * 32 * 32 * width + 8 * parts
        assert optimizer.traffic.exchanged == optimizer.plan().bytes == expected
        gradients(weights, 1)
        optimizer.step()
        assert optimizer.traffic.exchanged == 2 * expected
        assert optimizer.traffic.reduced == 0
    weights, optimizer = squares(3, 64, {"map": "sn"}, ranks)
    for step in range(2):
        gradients(weights, step)
        optimizer.step()
    cold = optimizer.traffic.reduced
    gradients(weights, 2)
    optimizer.step()
    assert optimizer.traffic.exchanged == optimizer.plan().bytes == 0
    # a warm step: Aᵀ·Q and A·Q of 16 vectors, Aᵀ·Q of 32, and the largest entry
    assert optimizer.traffic.reduced - cold == 3 * (64 * 16 + 64 * 16 + 64 * 32 + 1) * 4
    experts = nn.Parameter(distribute_tensor(torch.zeros(8, 5, 6), init_device_mesh("cpu", (ranks,)), [Shard(0)]))
    for map in ("msign", "sn"):
        stack = [{"axes": [[[8, "copy", 0, 8]], [[5, "out", 0, 5]], [[6, "in", 0, 6]]]}]
        optimizer = SpectralOptimizer([{"params": [experts], "blocks": stack, "map": map}], 0.1)
        gradients([experts], 0)
        optimizer.step()
        assert (optimizer.traffic.exchanged, optimizer.traffic.reduced) == (0, 0)


def test_bytes_are_those_of_the_plan(tmp_path):
    over(4, bytes_are_those_of_the_plan, tmp_path)


# --- what a step asks of torch.distributed --------------------------------------------------------------------------------------


def few_collectives_and_no_operator_on_dtensors(monkeypatch=pytest.MonkeyPatch):
    calls, asked = [], []
    with monkeypatch.context() as patched:
        for name in (
            "all_to_all_single",
            "all_reduce",
            "all_gather",
            "all_gather_into_tensor",
            "all_to_all",
            "broadcast",
            "reduce_scatter",
        ):
            of = getattr(dist, name)
            patched.setattr(dist, name, lambda *args, of=of, name=name, **kwargs: (calls.append(name), of(*args, **kwargs))[1])
        dispatch = DTensor.__torch_dispatch__
        patched.setattr(DTensor, "__torch_dispatch__", classmethod(lambda cls, func, *args: (asked.append(func), dispatch(func, *args))[1]))
        for placement in (Shard(0), Replicate()):
            (_, _), (weights, optimizer) = both(placement, {})
            for step in range(3):
                gradients(weights, step)
                calls.clear(), asked.clear()
                optimizer.step()
            assert asked == []
            if placement.is_replicate():
                continue
            # flags agreed on, once there and back: whatever the number of weights, shapes and options
            assert calls.count("all_to_all_single") == 2
            assert calls == ["all_reduce", "all_to_all_single", "all_to_all_single"]


def test_dion_sends_a_pair_of_messages_per_shape_and_muon_fsdp2_one_per_matrix(tmp_path):
    """And torch 2.12's foreach on DTensors keeps what it has inferred of their sharding for good (NeMo#2888): none is asked here."""
    over(2, few_collectives_and_no_operator_on_dtensors, tmp_path)


# --- gradients ----------------------------------------------------------------------------------------------------------------


def missing_and_spoilt_gradients(capturable):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = [nn.Parameter(distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)])) for _ in range(4)]
    weights.append(nn.Parameter(distribute_tensor(torch.ones(9), mesh, [Shard(0)])))
    for map in ("msign", "sn"):
        groups = [{"params": [(f"w{i}", W) for i, W in enumerate(weights[:4])], "map": map}, {"params": [("v", weights[4])], **ADAM}]
        optimizer = SpectralOptimizer(groups, 0.1, weight_decay=0.1, capturable=capturable)
        before = [W.full_tensor().clone() for W in weights]
        gradients(weights, 0)
        if dist.get_rank() == 0:
            weights[0].grad = None  # zeros here, the gradient of the others elsewhere
            weights[2].grad.to_local().fill_(torch.nan)
        if dist.get_rank() == dist.get_world_size() - 1:
            weights[4].grad.to_local().fill_(torch.inf)
        weights[1].grad = None
        optimizer.step()
        moved = [not torch.equal(a, b.full_tensor()) for a, b in zip(before, weights, strict=True)]
        assert moved == [True, False, False, True, False]
        assert optimizer.skipped == {"w2": 1, "v": 1}
        for W, updated in zip(weights, moved, strict=True):
            state = optimizer.state.get(W, {})
            assert any(T.full_tensor().any() for T in state.values() if isinstance(T, DTensor)) == updated
            assert bool(state) in (updated, capturable)  # a device does not know who has a gradient: the state is made, and stays zero
    optimizer = SpectralOptimizer([("w", weights[0])], 0.1, nonfinite="raise", capturable=capturable)
    gradients(weights, 0)
    if dist.get_rank() == 0:
        weights[0].grad.to_local().fill_(torch.nan)
    with pytest.raises(BadGradient, match="NaN or Inf, or too large a number, in the gradient of w"):
        optimizer.step()
    weights[0].grad = distribute_tensor(torch.ones(8, 6), mesh, [Replicate()])
    with pytest.raises(BadGradient, match="placed unlike"):
        optimizer.step()


@pytest.mark.parametrize("capturable", [False, True])
def test_a_gradient_missing_or_spoilt_on_one_rank_is_agreed_on(capturable, tmp_path):
    over(2, missing_and_spoilt_gradients, tmp_path, capturable)


# --- what is refused ----------------------------------------------------------------------------------------------------------


def what_is_refused():
    flat = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 4), flat, [Partial()], run_check=False))
    with pytest.raises(NotShardable, match="'w' has the placement Partial"):
        SpectralOptimizer([("w", partial)], 0.1)
    strided = nn.Parameter(DTensor.from_local(torch.ones(2, 4), flat, [_StridedShard(0, split_factor=2)], run_check=False))
    with pytest.raises(NotShardable, match="StridedShard"):
        SpectralOptimizer([("w", strided)], 0.1)
    for whole in (False, True):
        warnings.simplefilter("ignore")  # FSDP1's own about the CPU
        wrapped = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=whole)
        with pytest.raises(NotShardable, match=r"flat parameter of FSDP1(.|\n)*fully_shard"):
            SpectralOptimizer([{"params": list(wrapped.named_parameters()), **MUON}], 0.1)


def two_mesh_axes_on_a_matrix_are_refused():
    mesh = init_device_mesh("cpu", (2, 2))
    W = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))
    with pytest.raises(NotShardable, match="sharded along 2 axes of its mesh"):
        SpectralOptimizer([("w", W)], 0.1)
    optimizer = SpectralOptimizer([{"params": [("w", W)], **ADAM}], 0.1)  # entry by entry there is nothing to put together
    W.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)])
    optimizer.step()
    assert torch.allclose(W.full_tensor(), torch.full((4, 4), 0.9))
    rows = nn.Parameter(distribute_tensor(torch.ones(5, 4), mesh, [Replicate(), Shard(0)]))  # HSDP
    alone = nn.Parameter(torch.ones(5, 4))
    for Ws in ([rows], [alone]):
        for map in ("msign", "sn"):
            gradients(Ws, 0)
            SpectralOptimizer(Ws, 0.1, map=map).step()
    assert furthest([alone], [rows]) < 1e-6


def test_what_has_no_matrices_is_refused(tmp_path):
    over(2, what_is_refused, tmp_path)


def test_two_mesh_axes_on_a_matrix_are_refused_and_hybrid_sharding_is_not(tmp_path):
    over(4, two_mesh_axes_on_a_matrix_are_refused, tmp_path)
