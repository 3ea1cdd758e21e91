"""compile: a table, carried out on a model and one optimizer."""

from __future__ import annotations

import json
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from compiler.blocks import axes_of, covers, plain
from compiler.errors import BadOption
from compiler.factors import Base, Factors, base_model, ruled_weights
from compiler.model import plan_init, plan_multipliers
from compiler.optimizer import SpectralOptimizer
from compiler.options import NEW_OPTIONS
from scaling.errors import UnknownName
from scaling.records import Block, ScalingTable

__all__ = ["MATRICES", "OPTIMIZERS", "Recipe", "compile"]


class Recipe(NamedTuple):
    """What an optimizer name stands for; `family` names the column of the table, `momentum` is the default."""

    update: str
    map: str | None
    family: str
    momentum: float


OPTIMIZERS: dict[str, Recipe] = {
    "sgd": Recipe("sgd", None, "sgd", 0.0),
    "adam": Recipe("adam", None, "adam", 0.0),
    "sign": Recipe("sign", None, "adam", 0.95),
    "muon": Recipe("momentum", "msign", "muon", 0.95),
    "adam-msign": Recipe("adam", "msign", "muon", 0.0),
    "sn": Recipe("momentum", "sn", "muon", 0.95),
    "adam-sn": Recipe("adam", "sn", "muon", 0.0),
    "svc": Recipe("momentum", "svc", "muon", 0.95),
}
"""Name -> base update, matrix map, learning-rate family."""

MATRICES = {"hidden": ("hidden",), "all": ("input", "hidden", "output")}
"""Which roles go through the matrix map."""


def compile(
    model: nn.Module,
    table: ScalingTable,
    optimizer: str = "adam",
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    base: Base = None,
    base_depth: int | None = None,
    rest: str | None = None,
    rest_lr: float | None = None,
    matrices: str = "hidden",
    init: str | None = "gaussian",
    momentum: float | None = None,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip: float = 1.0,
    maximize: bool = False,
    accuracy: str = "default",
    strict: bool = False,
    nonfinite: str = "skip",
    travel: str = "auto",
    process_group: ProcessGroup | None = None,
    capturable: bool = False,
    master: bool = False,
    workspace: int = NEW_OPTIONS["workspace"],
    generator: torch.Generator | None = None,
) -> tuple[nn.Module, SpectralOptimizer]:
    """Initialise the model by the table, in place, and build its optimizer.

    Every trainable weight needs a rule. Those that the forward does not use have none (`table.coverage.unreached`); frozen, with
    `requires_grad_(False)`, they stay as they are and out of the optimizer, which holds trainable weights only.

    Weights (blocks of weights) whose fan_in and fan_out both grow go through `optimizer`; embeddings, input and output maps,
    vectors and scalars through `rest`, with factors of their own at the same nominal lr, which has the same meaning there (a
    change of RMS lr per unit input).

    Args:
        model: of the table's shapes at some width. Compile before wrapping it in DDP or torch.compile: rules go by name. Over FSDP2:
            `init_`, then fully_shard, then compile with init=None, as the optimizer has to hold the sharded weights.
        table: from `scaling.derive`.
        optimizer: a name of `OPTIMIZERS`.
        lr: the nominal learning rate, a float or a one-element tensor; every group carries it, `step` applies the factors.
        weight_decay: the fraction decayed per step is lr·weight_decay in every group, whatever its factor.
        base: None: the factors are the table's formulas. A width, a model or a function that builds one: every factor is divided
            by its value there, so that at this width model and optimizer are exactly the user's own. `init_` says how weights follow.
        base_depth: with a table of depth, the L of the base; counted if the base is a model whose weights have this one's names.
        rest: "adam", "sgd" or "sign"; "adam" by default under a matrix map, else `optimizer` itself.
        rest_lr: a nominal lr of its own for the rest, applied as a ratio so that schedulers move both.
        matrices: "hidden", or "all" to send input and output maps through `optimizer` as well.
        init: a law of `init_`, or None to leave the weights as they are (a checkpoint).
        momentum: of "sgd" (default 0), "sign", "muon", "sn" and "svc" (default 0.95), and of the rest.
        nesterov: for the optimizers that map a momentum.
        betas: of Adam.
        eps: of Adam.
        clip: λ of "svc", times √(fan_out/fan_in).
        maximize: ascend.
        accuracy: of msign, see `compiler.msign`.
        strict: "sn" never exceeds spectral norm 1.
        nonfinite: "skip" or "raise", what `step` does about NaN and Inf in a gradient.
        travel: see `SpectralOptimizer`, like the next four.
        process_group: of ranks that share the work on replicated weights.
        capturable: nothing in `step` is read by the host.
        master: keep bf16 weights to fp32 precision.
        workspace: bytes of temporary memory of a step, about.
        generator: of the initial random numbers.

    Returns:
        The same model, and the optimizer.

    Raises:
        UnknownName: for an unknown name. BadOption (a ValueError): for an lr or another option that is negative, NaN or Inf.
        UnreachedWeights: for trainable weights without a rule. WrongWidth: if the shapes fit the table at no width.
        AlreadyCompiled: if the model has been initialised by a table before. NotExpressible: see `init_`.
        The model is unchanged whenever this raises.
    """
    mapped, other = _recipes(optimizer, rest, momentum, nesterov=nesterov)
    if matrices not in MATRICES:
        raise UnknownName("choice of matrices", matrices, MATRICES)
    ratio = _ratio(lr, rest_lr)
    built = base_model(base)
    factors = Factors.of(model, table, built or base, base_depth)
    shared = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "clip": clip, "maximize": maximize}
    shared |= {"accuracy": accuracy, "strict": strict, "nonfinite": nonfinite, "travel": travel}
    shared |= {"capturable": capturable, "master": master, "workspace": workspace}
    groups: dict[str, dict[str, Any]] = {}
    for name, weight, rule in ruled_weights(model, table):
        blocks = []
        for block in rule.blocks:
            inside = block.role in MATRICES[matrices]
            options = _options(block, mapped if inside else other, factors, 1.0 if inside else ratio)
            blocks.append({"axes": axes_of(block, factors.value), **options})
        plan = _plan(blocks, tuple(weight.shape))
        group = groups.setdefault(json.dumps(plan), {"params": [], **shared, **plan})
        group["params"].append((name, weight))
    opt = SpectralOptimizer(groups.values(), lr, process_group=process_group, **shared)
    actions = plan_init(model, table, factors, built, init, generator) if init is not None else []
    for action in [*actions, *plan_multipliers(model, table, factors)]:
        action()
    return model, opt


def _recipes(optimizer: str, rest: str | None, momentum: float | None, *, nesterov: bool) -> tuple[Recipe, Recipe]:
    if optimizer not in OPTIMIZERS:
        raise UnknownName("optimizer", optimizer, OPTIMIZERS)
    plain_names = [name for name, recipe in OPTIMIZERS.items() if recipe.map is None]
    mapped = OPTIMIZERS[optimizer]
    rest = rest if rest is not None else "adam" if mapped.map else optimizer
    if rest not in plain_names:
        raise UnknownName("optimizer for the rest", rest, plain_names)
    other = OPTIMIZERS[rest]
    if nesterov:
        if mapped.update != "momentum":
            raise BadOption("nesterov", nesterov, f"only for the optimizers that map a momentum; {optimizer!r} does not")
        mapped = mapped._replace(update="nesterov")
    if momentum is not None:
        mapped, other = mapped._replace(momentum=momentum), other._replace(momentum=momentum)
    return mapped, other


def _ratio(lr: float | Tensor, rest_lr: float | None) -> float:
    if rest_lr is None:
        return 1.0
    if not 0 < float(lr) < float("inf"):
        raise BadOption("lr", lr, "a finite number above 0 when rest_lr is given, which is applied as a ratio to it")
    if not isinstance(rest_lr, Real) or not 0 <= float(rest_lr) < float("inf"):
        raise BadOption("rest_lr", rest_lr, "a finite number of at least 0")
    return rest_lr / float(lr)


def _options(block: Block, recipe: Recipe, factors: Factors, ratio: float) -> dict[str, Any]:
    """The options of one block, as plain numbers."""
    factor = factors.at(block.lr[recipe.family])
    return {
        "update": recipe.update,
        "map": recipe.map,
        "momentum": recipe.momentum,
        "lr_scale": factor * ratio,
        "wd_scale": 1 / factor,
        "eps_scale": factors.at(block.eps) if recipe.update == "adam" else 1.0,
        "clip_scale": factors.at(block.spectral_norm / block.gradient) if recipe.map == "svc" else 1.0,
        "norm_scale": factors.at(block.lr["sgd"]) ** 0.5,
    }


def _plan(blocks: list[dict[str, Any]], shape: tuple[int, ...]) -> dict[str, Any]:
    """The group options of a weight: what its blocks share, and the blocks themselves where they matter."""
    shared = {key: value for key, value in blocks[0].items() if all(block[key] == value for block in blocks)}
    same = all(key in shared for key in blocks[0] if key != "axes")
    whole = len(blocks) == 1 and covers(blocks[0]["axes"], shape)
    if same and (shared["map"] is None or (whole and blocks[0]["axes"] == _plain_layout(shape))):
        shared.pop("axes", None)
        return {**shared, "blocks": None}
    own = [{key: value for key, value in block.items() if key == "axes" or key not in shared} for block in blocks]
    shared.pop("axes", None)
    return {**shared, "blocks": own}


def _plain_layout(shape: tuple[int, ...]) -> list[list[list[Any]]] | None:
    """The layout `SpectralOptimizer` assumes without blocks, if it assumes one."""
    return plain(shape) if len(shape) == 2 else None
