"""The table as plain torch parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from compiler.errors import NotExpressible
from compiler.factors import Base, Factors, ruled_weights
from scaling.errors import UnknownName
from scaling.optimizers import LEARNING_RATES
from scaling.records import Block, ScalingTable, WeightRule

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module,
    table: ScalingTable,
    family: str,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    base: Base = None,
    base_depth: int | None = None,
) -> list[dict[str, Any]]:
    """Groups for any `torch.optim` class, with the factors already multiplied into lr, weight_decay and (for "adam") eps.

    A scheduler that writes one lr into every group (OneCycleLR with a scalar max_lr, eta_min, min_lr) destroys these factors;
    `compiler.compile` does not have this weakness.

    Args:
        model: the model the table was derived from, or the same model at another width.
        table: from `scaling.derive`.
        family: "sgd", "adam" (AdamW and everything sign-like; not Adam(weight_decay=…), whose L2 term no factor makes right)
            or "muon" (an update of unit spectral norm; an optimizer with a shape factor of its own, as
            torch.optim.Muon, would scale twice).
        lr: nominal.
        weight_decay: nominal; the fraction decayed per step, lr·weight_decay, is the same in every group.
        eps: nominal, for "adam".
        base: see `compiler.compile`.
        base_depth: see `compiler.compile`.

    Returns:
        Dicts with "params", "param_names", "lr", "weight_decay" and, for "adam", "eps"; every trainable weight in exactly one.

    Raises:
        UnknownName: for an unknown family.
        UnreachedWeights: if a trainable weight is in no rule. WrongWidth: if the shapes fit at no width.
        NotExpressible: if the blocks of a weight need different factors.
    """
    if family not in LEARNING_RATES:
        raise UnknownName("optimizer family", family, LEARNING_RATES)
    factors = Factors.of(model, table, base, base_depth)
    groups: dict[tuple[float, ...], dict[str, Any]] = {}
    for name, weight, rule in ruled_weights(model, table):
        lr_factor, eps_factor = _agreed(name, rule, family, factors)
        options = {"lr": lr * lr_factor, "weight_decay": weight_decay / lr_factor}
        if family == "adam":
            options["eps"] = eps * eps_factor
        group = groups.setdefault(tuple(options.values()), {"params": [], "param_names": [], **options})
        group["params"].append(weight)
        group["param_names"].append(name)
    return list(groups.values())


def _agreed(name: str, rule: WeightRule, family: str, factors: Factors) -> tuple[float, float]:
    """The (lr, ε) factors of a weight."""

    def of(block: Block) -> tuple[float, float]:
        return factors.at(block.lr[family]), factors.at(block.eps) if family == "adam" else 1.0

    first, *rest = dict.fromkeys(of(block) for block in rule.blocks)
    if rest:
        raise NotExpressible(
            name,
            f"has blocks that need different (lr, eps) factors, {[first, *rest]}, and one torch group holds whole weights",
            "use compiler.compile(model, table, ...), whose optimizer steps every block for itself",
        )
    return first
