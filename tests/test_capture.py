"""One run of any model becomes one graph: whatever Python its forward is, and nothing of the model changes."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from models import GPT, MLP
from torch import nn
from torch.nn import functional as F

from scaling import derive
from scaling.capture import record
from scaling.graph import align
from scaling.uses import joined_axes


class Wrapped(nn.Module):
    """An MLP in the middle of whatever `forward` does."""

    def __init__(self, forward, d=160):
        super().__init__()
        self.inp, self.mid, self.out = nn.Linear(8, d), nn.Linear(d, d), nn.Linear(d, 4)
        self.run = forward

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


@dataclass
class Batch:
    x: torch.Tensor
    mask: torch.Tensor


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


x = torch.zeros(2, 8)
FORWARDS = {
    "a dict of inputs": (lambda m, batch: m.out(m.mid(m.inp(batch["x"]))), ({"x": x},)),
    "a dataclass of inputs and outputs": (lambda m, b: Batch(m.out(m.mid(m.inp(b.x))), b.mask), (Batch(x, torch.ones(2)),)),
    "python ints of a tensor": (lambda m, ids: m.out(m.mid(m.inp(torch.eye(8)[ids])) * int(ids.max())), (torch.tensor([1, 2]),)),
    "a branch on a float": (lambda m, y: m.out(m.mid(m.inp(y))) if m.inp(y).sum() > 0 else m.out(m.inp(y)), (x,)),
    "the other branch on a float": (lambda m, y: m.out(m.inp(y)) if m.inp(y).sum() > 0 else m.out(m.mid(m.inp(y))), (x,)),
    "an early exit": (lambda m, y: m.out(m.inp(y)) if m.inp(y).sigmoid().max().item() > 0.9 else m.out(m.mid(m.inp(y))), (x,)),
    "numpy on ids": (lambda m, ids: m.out(m.mid(m.inp(torch.eye(8)[torch.from_numpy(ids.numpy() + 1)]))), (torch.tensor([1, 2]),)),
    "an in-place write into a new tensor": (lambda m, y: _written(m, y), (x,)),
    "a custom autograd function": (lambda m, y: m.out(Twice.apply(m.mid(m.inp(y)))), (x,)),
    "a gradient in forward": (lambda m, y: _energy(m, y), (x,)),
    "boolean indexing": (lambda m, y: m.out(m.mid(m.inp(y))[y.sum(-1) >= 0]), (x,)),
    "a mask of all pairs of very many": (lambda m, y: m.out(m.mid(m.inp(y)) * (_pairs(200_000) >= 0)[0, :160]), (x,)),
    "rows picked by a large mask": (lambda m, y: m.out(m.mid(m.inp(y)) * _picked(20_000)), (x,)),
    "a loop over rows": (lambda m, y: torch.stack([m.out(m.mid(m.inp(row))) for row in y]), (x,)),
    "top-k routing": (lambda m, y: m.out(m.mid(m.inp(y)).gather(-1, m.inp(y).topk(160).indices)), (x,)),
    "checkpointing": (lambda m, y: m.out(torch.utils.checkpoint.checkpoint(m.mid, m.inp(y), use_reentrant=False)), (x,)),
}


def _pairs(n):
    places = torch.ones(n, dtype=torch.long)
    return places[:, None] * places


def _picked(n):
    places = torch.arange(n)
    return places[places > n - 161][:160]


def _written(m, y):
    buffer = torch.zeros(2, 160)
    buffer[:, :] = m.mid(m.inp(y))
    return m.out(buffer)


def _energy(m, y):
    with torch.enable_grad():
        z = y.clone().requires_grad_()
        energy = m.out(m.mid(m.inp(z))).sum()
        return torch.autograd.grad(energy, z)[0]


@pytest.mark.parametrize("name", FORWARDS)
def test_every_weight_is_reached_whatever_python_the_forward_is(name):
    forward, args = FORWARDS[name]
    table = derive(Wrapped(forward), args, fixed={"out.weight": 0})
    assert table.coverage.unreached == ()
    assert [table[f"{layer}.weight"].role for layer in ("inp", "mid", "out")] == ["input", "hidden", "output"]


class Auxiliary(nn.Module):
    """A second classifier that only runs in training, and layers dropped at random."""

    def __init__(self, d):
        super().__init__()
        self.first, self.layers, self.head, self.auxiliary = (
            nn.Linear(7, d),
            nn.ModuleList(nn.Linear(d, d) for _ in range(9)),
            nn.Linear(d, 5),
            nn.Linear(d, 5),
        )

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            if not (self.training and torch.rand([]) < 0.5):
                x = layer(x)
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


def test_a_head_that_only_runs_in_training_is_reached_and_the_widths_drop_the_same_layers():
    table = derive(lambda d: Auxiliary(d).eval(), torch.zeros(3, 7), widths=(16, 32))
    assert not table.coverage.unreached
    assert table["auxiliary.weight"].role == "output"


def test_made_up_integers_are_counted():
    forward, args = FORWARDS["top-k routing"]
    assert derive(Wrapped(forward), args).coverage.made_up > 0
    assert derive(MLP(32)).coverage.made_up == 0


def test_an_operator_without_a_rule_on_activations_is_listed_and_joins_nothing():
    table = derive(Wrapped(lambda m, y: m.out(m.mid(torch.linalg.pinv(m.inp(y)).mT))), (x,))
    assert table.coverage.operators_without_rule == ("aten.linalg_pinv",)
    assert "aten.linalg_pinv" in str(table)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_are_taken_off(wrap):
    assert [rule.blocks for rule in derive(wrap(MLP(32)))] == [rule.blocks for rule in derive(MLP(32))]


def test_an_exported_program_gives_the_table_of_its_model():
    model = MLP(32)
    exported = torch.export.export(model, (torch.zeros(2, 16),))
    assert {rule.name: rule.blocks for rule in derive(exported)} == {rule.name: rule.blocks for rule in derive(model)}


def test_every_node_knows_the_users_line_and_its_module():
    recording = record(GPT(32, layers=1), (torch.zeros(1, 4, dtype=torch.long),), {})
    linear = [node for node in recording.graph.nodes if node.op == "call_function" and "linear" in str(node.target)]
    assert [node.meta["source"].module for node in linear] == ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.0", "h.0.mlp.2", "lm_head"]
    assert all(node.meta["source"].file.endswith("models.py") for node in linear)
    assert linear[0].meta["source"].code == "q, k, v = self.c_attn(x).split(C, dim=2)"
    assert "models.py" in linear[0].meta["stack_trace"]


HELPER = """
import torch


def product(x, weight):
    return x @ weight.T


class Installed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(32, 8))

    def forward(self, x):
        return product(x, self.weight)
"""


class Helped(nn.Module):
    def __init__(self, helper):
        super().__init__()
        self.inp, self.weight, self.helper = helper.Installed(), nn.Parameter(torch.randn(4, 32)), [helper]

    def forward(self, x):
        return self.helper[0].product(self.inp(x), self.weight)


def test_a_helper_of_an_installed_package_is_passed_over_for_the_line_that_calls_it(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "helper_of_shapes"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(HELPER)
    monkeypatch.syspath_prepend(str(package.parent))
    model = Helped(importlib.import_module("helper_of_shapes"))
    table = derive(model, torch.randn(2, 8))
    assert table["weight"].uses[0].source.code == "return self.helper[0].product(self.inp(x), self.weight)"
    assert table["inp.weight"].uses[0].source.code == "return x @ weight.T", "the module's own package"


def test_composite_operators_stay_whole_and_tied_weights_are_one_node():
    recording = record(GPT(32, layers=1, tie=True), (torch.zeros(1, 4, dtype=torch.long),), {})
    names = [str(node.target) for node in recording.graph.nodes if node.op == "call_function"]
    assert {"aten.linear.default", "aten.scaled_dot_product_attention.default", "aten.layer_norm.default", "aten.embedding.default"} <= set(
        names
    )
    assert not any("addmm" in name or "bmm" in name for name in names)
    (tied,) = [node for node in recording.graph.nodes if len(node.meta.get("names", ())) == 2]
    assert tied.meta["names"] == ("wte.weight", "lm_head.weight")
    digraph = align([recording], ["once"]).digraph
    assert digraph.out_degree(tied) == 2


def test_frozen_weights_have_no_rule():
    model = MLP(32)
    model.first.weight.requires_grad_(False)
    table = derive(model)
    assert "first.weight" not in table
    assert table.coverage.trainable == 7


def test_hooks_of_the_user_run_and_stay():
    model, seen = MLP(32), []
    model.second.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)) or output * 2)
    derive(model, (torch.zeros(3, 16),))
    assert seen == [(3, 32)]
    assert len(model.second._forward_hooks) == 1


def test_a_model_on_the_meta_device_and_on_the_cpu_have_one_table():
    with torch.device("meta"):
        meta = GPT(64)
        inside = derive(meta)
    assert inside == derive(meta) == derive(GPT(64))


class Strict(nn.Module):
    """A model that looks at the size of its images before anything else (timm's vision transformers)."""

    def __init__(self, d=16, size=160):
        super().__init__()
        self.size, self.patches, self.head = size, nn.Conv2d(3, d, 16, 16), nn.Linear(d, 5)

    def forward(self, x):
        batch, _, height, _ = x.shape
        assert height == self.size
        return self.head(self.patches(x).flatten(2).mean(-1).view(batch, -1))


def test_images_are_tried_on_a_model_that_asks_for_their_size_first():
    assert not derive(Strict()).coverage.unreached


COMPOSITIONS = {
    "hstack": lambda x, y: torch.hstack([x, y]),
    "vstack": lambda x, y: torch.vstack([x, y]),
    "column_stack": lambda x, y: torch.column_stack([x, y]),
    "cosine_similarity": lambda x, y: F.cosine_similarity(x, y, dim=0),
    "kron": torch.kron,
    "multi_dot": lambda x, y: torch.linalg.multi_dot([x, y.T, x]),
    "logsigmoid": lambda x, y: F.logsigmoid(x) * y,
    "cdist": lambda x, y: torch.cdist(x.T, y.T),
    "pairwise_distance": lambda x, y: F.pairwise_distance(x.T, y.T),
    "quantile": lambda x, y: torch.quantile(x * y, 0.5, dim=0),
    "meshgrid": lambda x, y: torch.meshgrid(x[0], y[0], indexing="ij")[0],
    "subtract": lambda x, y: torch.subtract(x, y),
    "arctan_": lambda x, y: (x * y).arctan_(),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_an_operator_without_a_rule_that_is_made_of_others_is_recorded_as_these(name):
    class Composed(nn.Module):
        def forward(self, x, y):
            return COMPOSITIONS[name](x, y)

    graph = align([record(Composed(), (torch.randn(4, 6), torch.randn(4, 6)), {})], ["once"])
    axes, without = joined_axes(graph)
    assert not without
    width = {atom for node in graph.calls if node.op == "placeholder" for dim in axes.dims[node] for atom in axes.leaves(dim)}
    out = {atom for dim in axes.dims[graph.outputs[0]] for atom in axes.leaves(dim)}
    assert out & width
    assert not axes.conflicts


def test_a_shape_that_is_changed_in_place_leaves_the_shape_before_it_recorded():
    class InPlace(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.a, self.b, self.w = nn.Linear(7, d), nn.Linear(d, d), nn.Parameter(torch.randn(d, 3))

        def forward(self, x):
            h = self.a(x)
            h.unsqueeze_(1)
            h = self.b(h)
            h.squeeze_(1)
            return self.w.t() @ h.t_()

    table = derive(InPlace, torch.randn(2, 7), widths=(64, 128))
    assert [str(rule.fan_in) for rule in table if rule.name in {"w", "b.weight"}] == ["d", "d"]
    assert not table.trace.growth.axes.conflicts
