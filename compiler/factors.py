"""From the table's exact expressions to numbers at one model's width, and which weight follows which rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import sympy
from torch import nn

from compiler.errors import BadOption, NotExpressible
from scaling.errors import UnreachedWeights
from scaling.limits import DEPTH, WIDTH
from scaling.records import ScalingTable, WeightRule

__all__ = ["Base", "Factors", "base_model", "ruled_weights", "width_of"]

Base = int | nn.Module | Callable[[], nn.Module] | None
"""The model at which everything is the user's own: its width, the model, or a function that builds it; None for absolute factors."""


def width_of(model: nn.Module, table: ScalingTable) -> int:
    """The width d at which the table's shapes are the model's.

    Raises:
        WrongWidth: if there is none.
    """
    return table.size_of(_shapes(model))


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
    """Numbers for the table's expressions at one width and depth: absolute, or relative to their value at those of a base."""

    def __init__(self, width: int, base: int | None = None, depth: int | None = None, base_depth: int | None = None) -> None:
        self.width, self.base, self.depth, self.base_depth = width, base, depth, base_depth

    @classmethod
    def of(cls, model: nn.Module, table: ScalingTable, base: Base = None, base_depth: int | None = None) -> Factors:
        """The factors for a model; the L of a base model is counted if `base_depth` is not given.

        Raises:
            WrongWidth: if the table's shapes are the model's, or the base model's, at no width.
            BadOption: if base is none of the things it may be, or its depth is missing, of no use, or cannot be told; if table is none.
        """
        if not isinstance(table, ScalingTable):
            raise BadOption("table", type(table).__name__, "what derive(model) returns, as in compile(model, derive(model), ...)")
        built = base_model(base)
        width = base if built is None else table.size_of(_shapes(built), fewer=True)
        if (base is None or table.residual is None) and base_depth is not None:
            cure = "give base= as well" if base is None else "derive the table with depth: derive(model, depth=True)"
            raise BadOption("base_depth", base_depth, f"of no use here: {cure}")
        if base is not None and table.residual is not None and base_depth is None:
            base_depth = table.depth_of(_shapes(built)) if built is not None else None
            if base_depth is None:
                raise BadOption("base_depth", None, f"the L of the base, as L = {table.residual.size} is the model's: this table has depth")
        if base_depth is not None and not base_depth > 0:
            raise BadOption("base_depth", base_depth, "a number of residual branches")
        return cls(width_of(model, table), width, table.depth_size, base_depth)  # pyright: ignore[reportArgumentType]

    @property
    def at_base(self) -> bool:
        """Whether the model has the base's width and depth, where every relative factor is exactly 1."""
        return self.width == self.base and (self.depth is None or self.depth == self.base_depth)

    def value(self, expression: sympy.Expr) -> float:
        """The expression at the model's width and depth."""
        return _number(expression, self.width, self.depth)

    def at(self, expression: sympy.Expr) -> float:
        """The expression at the model's width and depth, over its value at the base's if there is one."""
        if self.base is None:
            return self.value(expression)
        return 1.0 if self.at_base else _ratio(expression, (self.width, self.depth), (self.base, self.base_depth))


@cache
def _number(expression: sympy.Expr, width: int, depth: int | None) -> float:
    return float(_at(expression, width, depth))


@cache
def _ratio(expression: sympy.Expr, size: tuple[int, int | None], base: tuple[int, int | None]) -> float:
    return float(_at(expression, *size) / _at(expression, *base))


def _at(expression: sympy.Expr, width: int, depth: int | None) -> sympy.Expr:
    return expression.subs({WIDTH: width} if depth is None else {WIDTH: width, DEPTH: depth})


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


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
        unused = [name for name in unreached if name in table.coverage.unreached]
        raise UnreachedWeights(unused, [name for name in unreached if name not in unused])
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
