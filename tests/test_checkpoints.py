"""Training over ranks as users do it: FSDP2, DDP, torch.distributed.checkpoint, and that it is the training of a single process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ranks import over
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import compiler
import scaling
from compiler import SpectralOptimizer
from compiler.errors import BadOption


class Net(nn.Module):
    """Sizes that no number of ranks divides, and a head of 3 rows, of which the fourth rank has none."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 33)
        self.mid = nn.Linear(33, 70)
        self.down = nn.Linear(70, 33)
        self.head = nn.Linear(33, 3, bias=False)

    def forward(self, x):
        x = self.mid(F.gelu(self.up(self.embed(x))))
        return self.head(self.down(F.gelu(x)))


KINDS = {
    "muon": {"update": "nesterov", "map": "msign"},
    "adam-msign": {"update": "adam", "map": "msign"},
    "sn": {"update": "momentum", "map": "sn"},
    "svc": {"update": "momentum", "map": "svc", "clip": 30.0},
}


def fresh(shard=False, seed=0):
    torch.manual_seed(seed)
    model = Net()
    if shard:
        for child in (model.up, model.mid, model.down):
            fully_shard(child)
        fully_shard(model)
    return model


def optimizer_of(model, kind, **options):
    """The hidden matrices and the head through the map, the rest through Adam."""
    named = list(model.named_parameters())
    mapped = [(name, W) for name, W in named if W.ndim == 2 and "embed" not in name]
    rest = [(name, W) for name, W in named if W.ndim != 2 or "embed" in name]
    return SpectralOptimizer([{"params": mapped, **KINDS[kind]}, {"params": rest, "map": None, "update": "adam"}], 0.02, **options)


def train(model, optimizer, steps):
    """The same batch on every rank."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens, labels = torch.randint(11, (16,), generator=generator), torch.randint(3, (16,), generator=generator)
        F.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def furthest(model, other):
    whole = [W.full_tensor() if isinstance(W, DTensor) else W for W in model.parameters()]
    return max((a - b).abs().max().item() for a, b in zip(whole, other.parameters(), strict=True))


def save(folder):
    for kind in KINDS:
        model = fresh(shard=True)
        optimizer = optimizer_of(model, kind)
        train(model, optimizer, range(3))
        parts = get_state_dict(model, optimizer)
        dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=f"{folder}/{kind}")


def resume(folder, tolerance):
    for kind in KINDS:
        model = fresh(shard=True, seed=1)
        optimizer = optimizer_of(model, kind)
        parts = get_state_dict(model, optimizer)
        saved = {"model": parts[0], "optimizer": parts[1]}
        dcp.load(saved, checkpoint_id=f"{folder}/{kind}")
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        train(model, optimizer, range(3, 6))
        alone = fresh()
        train(alone, optimizer_of(alone, kind), range(6))
        assert furthest(model, alone) < tolerance, (kind, furthest(model, alone))


def test_a_checkpoint_of_2_ranks_resumes_on_4_as_if_a_single_process_had_gone_on(tmp_path):
    over(2, save, tmp_path, str(tmp_path))
    over(4, resume, tmp_path, str(tmp_path), 1e-6)


def test_a_checkpoint_of_4_ranks_resumes_on_1(tmp_path):
    over(4, save, tmp_path, str(tmp_path))
    over(1, resume, tmp_path, str(tmp_path), 1e-6)


def test_a_flattened_checkpoint_resumes_though_a_weight_had_no_gradient_yet():
    """Where a weight has no state torch fills in an empty dict for each of what it would have."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    for kind in KINDS:
        model, other = fresh(), fresh(seed=1)
        optimizer, resumed = optimizer_of(model, kind), optimizer_of(other, kind)
        for one in (model, other):
            one.mid.requires_grad_(False)
        train(model, optimizer, range(2))
        for one in (model, other):
            one.mid.requires_grad_(True)
        parts = get_state_dict(model, optimizer, options=flat)
        set_state_dict(other, resumed, model_state_dict=parts[0], optim_state_dict=parts[1], options=flat)
        train(model, optimizer, range(2, 4)), train(other, resumed, range(2, 4))
        assert furthest(model, other) == 0


# --- what is the same on all ranks --------------------------------------------------------------------------------------------


def the_state_has_the_same_keys_everywhere():
    for kind in KINDS:
        for options in ({}, {"capturable": True}):
            model = fresh(shard=True)
            optimizer = optimizer_of(model, kind, **options)
            train(model, optimizer, range(2))
            keys = {name: sorted(optimizer.state[W]) for name, W in model.named_parameters()}
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, keys)
            assert all(other == keys for other in everywhere)
            assert all(keys.values())
        alone = fresh()
        train(alone, optimizer_of(alone, kind), range(2))
        assert furthest(model, alone) < 1e-5
        for W in model.parameters():
            for name, value in optimizer.state[W].items():
                if name.startswith(("momentum", "exp")):
                    assert value.placements == W.placements
                    assert value.to_local().shape == W.to_local().shape


def test_dion_and_xtuner_make_state_on_owners_only_and_empty_shards_crash_dion(tmp_path):
    """Rank-asymmetric keys break checkpoints; dion#83. On 4 ranks the 3 × 33 head leaves the last without a row."""
    over(4, the_state_has_the_same_keys_everywhere, tmp_path)


def plain_and_sharded_weights_together():
    mesh = init_device_mesh("cpu", (2,))
    whole = [torch.randn(6, 10, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    places = [None, [Shard(0)], [Shard(1)], [Replicate()]]
    for options in KINDS.values():
        alone = [nn.Parameter(W.clone()) for W in whole]
        mixed = [nn.Parameter(W.clone() if p is None else distribute_tensor(W, mesh, p)) for W, p in zip(whole, places, strict=True)]
        a, b = SpectralOptimizer(alone, 0.1, **options), SpectralOptimizer(mixed, 0.1, **options)
        for step in range(2):
            for i, (w, v) in enumerate(zip(alone, mixed, strict=True)):
                w.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(10 * step + i))
                v.grad = w.grad.clone() if places[i] is None else distribute_tensor(w.grad, mesh, places[i])
            a.step(), b.step()
        for w, v in zip(alone, mixed, strict=True):
            torch.testing.assert_close(w, v.full_tensor() if isinstance(v, DTensor) else v, atol=1e-5, rtol=0)


def test_optimuon_cannot_mix_tensors_and_dtensors(tmp_path):
    over(2, plain_and_sharded_weights_together, tmp_path)


def clipping_sees_whole_gradients():
    qkv = [{"axes": [[[9, "out", a, a + 3]], [[10, "in", 0, 10]]], "norm_scale": scale} for a, scale in ((0, 1.0), (3, 2.0), (6, 0.5))]
    mesh = init_device_mesh("cpu", (2,))
    for place in (Shard(0), Shard(1), Replicate()):
        alone, sharded = fresh(), fresh(shard=True)
        W = nn.Parameter(torch.zeros(9, 10))
        V = nn.Parameter(distribute_tensor(W.detach(), mesh, [place]))
        for model, weight in ((alone, W), (sharded, V)):
            F.cross_entropy(model(torch.arange(11)), torch.arange(11) % 3).backward()
            G = torch.randn(9, 10, generator=torch.Generator().manual_seed(0))
            weight.grad = distribute_tensor(G, mesh, [place]) if isinstance(weight, DTensor) else G
        groups = [
            [{"params": list(model.parameters()), "map": None, "norm_scale": 3.0}, {"params": [weight], "blocks": qkv}]
            for model, weight in ((alone, W), (sharded, V))
        ]
        norms = [compiler.clip_grad_norm_(SpectralOptimizer(group, 0.1), 0.5) for group in groups]
        torch.testing.assert_close(norms[1], norms[0])
        for w, v in zip([*alone.parameters(), W], [*sharded.parameters(), V], strict=True):
            torch.testing.assert_close(v.grad.full_tensor(), w.grad)
    if dist.get_rank() == 0:
        sharded.up.weight.grad = V.grad = None
    assert compiler.clip_grad_norm_(SpectralOptimizer(groups[1], 0.1), 1.0) < norms[0]  # and no rank waits for ever


def test_clipping_sees_whole_gradients(tmp_path):
    over(2, clipping_sees_whole_gradients, tmp_path)


# --- DDP ----------------------------------------------------------------------------------------------------------------------


def ddp_shares_the_work():
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for kind in KINDS:
        model = DistributedDataParallel(fresh())
        optimizer = optimizer_of(model, kind, process_group=dist.group.WORLD)
        train(model, optimizer, range(3))
        alone = fresh()
        train(alone, optimizer_of(alone, kind), range(3))
        assert furthest(model, alone) < 1e-5
        for W in model.parameters():
            copies = [torch.empty_like(W) for _ in range(ranks)]
            dist.all_gather(copies, W.detach().contiguous())
            assert all(torch.equal(W, other) for other in copies)
        plan = optimizer.plan()
        assert optimizer.traffic.exchanged == 3 * plan.bytes
        if kind == "sn":
            assert plan.bytes == 0
        else:
            sizes = {W: W.numel() for name, W in model.named_parameters() if W.ndim == 2 and "embed" not in name}
            sent = torch.tensor([plan.bytes])
            dist.all_reduce(sent)
            aligned = sum(-(-4 * size // 8) * 8 for size in sizes.values())
            assert sent.item() == (ranks - 1) * aligned  # every update goes from its owner to each of the others, gradients to none
            owners = {unit.owner for exchange, _ in plan.exchanges for unit in exchange.units}
            assert len(owners) == min(ranks, 4)
            assert rank in range(ranks)


def test_ddp_ranks_map_a_matrix_each_and_stay_the_same_to_the_bit(tmp_path):
    over(2, ddp_shares_the_work, tmp_path)


# --- compile ------------------------------------------------------------------------------------------------------------------


def init_then_shard_then_compile(table):
    table = scaling.ScalingTable.from_json(table)
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Embedding(11, 20), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 20), nn.Linear(20, 3))
    with pytest.raises(BadOption, match=r"0\.weight.*init_ it, then fully_shard it"):
        compiler.init_(fully_shard(copy.deepcopy(alone)), table)
    compiler.init_(alone, table)
    sharded = copy.deepcopy(alone)
    fully_shard(sharded)
    optimizers = [compiler.compile(model, table, "muon", lr=0.02, weight_decay=0.1, init=None)[1] for model in (alone, sharded)]
    for model, optimizer in zip((alone, sharded), optimizers, strict=True):
        train(model, optimizer, range(3))
    assert furthest(sharded, alone) < 1e-5
    assert [len(group["params"]) for group in optimizers[0].param_groups] == [len(group["params"]) for group in optimizers[1].param_groups]


def test_a_model_is_initialised_then_sharded_then_compiled(tmp_path):
    model = nn.Sequential(nn.Embedding(11, 20), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 20), nn.Linear(20, 3))
    table = scaling.derive(model, (torch.zeros(4, dtype=torch.long),))
    over(2, init_then_shard_then_compile, tmp_path, table.to_json())
