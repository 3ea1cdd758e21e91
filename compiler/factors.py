"""From the table's exact expressions to numbers at one model's width, and which weight follows which rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import sympy
from torch import nn

from compiler.errors import BadOption, NotExpressible
from scaling.errors import UnreachedWeights
from scaling.limits import WIDTH
from scaling.records import ScalingTable, WeightRule

__all__ = ["Base", "Factors", "base_model", "ruled_weights", "width_of"]

Base = int | nn.Module | Callable[[], nn.Module] | None
"""The model at which everything is the user's own: its width, the model, or a function that builds it; None for absolute factors."""


def width_of(model: nn.Module, table: ScalingTable) -> int:
    """The width d at which the table's shapes are the model's.

    Raises:
        WrongWidth: if there is none.
    """
    return table.size_of({name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)})


def base_model(base: Base) -> nn.Module | None:
    """The base model itself, built if need be; None where only its width, or nothing, is given.

    Raises:
        BadOption: if base is none of the things it may be.
    """
    if base is None or (isinstance(base, int) and not isinstance(base, bool) and base > 0):
        return None
    built = base if isinstance(base, nn.Module) else base() if callable(base) else None
    if not isinstance(built, nn.Module):
        raise BadOption("base", base, "a width, a model, or a function of no arguments that returns one")
    return built


class Factors:
    """Numbers for the table's expressions at one width: absolute, or relative to their value at a base width."""

    def __init__(self, width: int, base: int | None = None) -> None:
        self.width, self.base = width, base

    @classmethod
    def of(cls, model: nn.Module, table: ScalingTable, base: Base = None) -> Factors:
        """The factors for a model.

        Raises:
            WrongWidth: if the table's shapes are the model's, or the base model's, at no width.
            BadOption: if base is none of the things it may be.
        """
        built = base_model(base)
        return cls(width_of(model, table), width_of(built, table) if built is not None else base)  # pyright: ignore[reportArgumentType]

    @property
    def at_base(self) -> bool:
        """Whether the model has the base width, where every relative factor is exactly 1."""
        return self.width == self.base

    def value(self, expression: sympy.Expr) -> float:
        """The expression at the model's width."""
        return _number(expression, self.width)

    def at(self, expression: sympy.Expr) -> float:
        """The expression at the model's width, over its value at the base width if there is one."""
        if self.base is None:
            return self.value(expression)
        return 1.0 if self.at_base else _ratio(expression, self.width, self.base)


@cache
def _number(expression: sympy.Expr, width: int) -> float:
    return float(expression.subs(WIDTH, width))


@cache
def _ratio(expression: sympy.Expr, width: int, base: int) -> float:
    return float(expression.subs(WIDTH, width) / expression.subs(WIDTH, base))


def ruled_weights(model: nn.Module, table: ScalingTable) -> list[tuple[str, nn.Parameter, WeightRule]]:
    """Every trainable weight once, by the first of its names in the table, with its rule.

    Raises:
        UnreachedWeights: if a trainable weight is in no rule.
        NotExpressible: if the model ties other weights than the table.
    """
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.requires_grad:
            aliases.setdefault(weight, []).append(name)
    unreached = [names[0] for names in aliases.values() if not any(name in table for name in names)]
    if unreached:
        raise UnreachedWeights(unreached, "the table has no rule for these trainable weights")
    found = {name: (weight, table[name]) for weight, names in aliases.items() for name in names if name in table}
    out: dict[str, tuple[str, nn.Parameter, WeightRule]] = {}
    for name, (weight, rule) in found.items():
        first, known, _ = out.setdefault(rule.name, (name, weight, rule))
        if known is not weight:
            raise NotExpressible(name, f"shares the rule of '{first}', but not its tensor", "tie them, or derive the table from this model")
    for names in aliases.values():
        rules = list(dict.fromkeys(table[name].name for name in names if name in table))
        if len(rules) > 1:
            raise NotExpressible(
                names[0], f"has {len(rules)} rules: {', '.join(rules)}", "derive the table from this model, where they are tied"
            )
    return list(out.values())
