"""The errors of this project: what happened, where in the user's file, what to type next."""

from __future__ import annotations

from collections.abc import Iterable

from scaling.folding import fold

__all__ = [
    "CannotMakeInputs",
    "CannotMeasure",
    "CaptureFailed",
    "ConflictingUses",
    "FormatError",
    "GraphsDiffer",
    "MissingExtra",
    "MixedBlocks",
    "NoGraph",
    "NoSuchAxis",
    "OurBug",
    "ScalingError",
    "TooManyGrowingAxes",
    "UnknownName",
    "UnreachedWeights",
    "UnsupportedOperator",
    "WrongWidth",
]


class ScalingError(Exception):
    """Base class: `except ScalingError` catches everything this project raises on purpose."""


class CannotMakeInputs(ScalingError):
    """The model's first consumers do not tell what its inputs must be."""

    def __init__(self, model: str, signature: str, tried: Iterable[str], last: str, where: str = "", names: Iterable[str] = ()) -> None:
        self.model, self.signature, self.tried, self.last, self.where = model, signature, tuple(tried), last, where
        tries = "\n  tried: ".join(("", *self.tried))
        asked = ", ".join(names)
        call = f"derive(model, ({asked}{'' if ', ' in asked else ','}))" if asked else "derive(model, (x, y), {'name': z})"
        lines = [
            f"no inputs could be made up for {model}.forward{signature}{tries}",
            f"the last attempt ended in: {last}",
            *([f"at {where}"] if where else []),
            *(["what is asked for there is an object or a container of yours, not a tensor"] if _is_no_tensor(last) else []),
            f"pass them as to torch.export: {call}",
        ]
        super().__init__("\n  ".join(lines))


def _is_no_tensor(said: str) -> bool:
    """Whether an attempt ended in a tensor that was asked for an attribute or a key of something else."""
    return "Tensor' object has no attribute" in said or "only integers, slices" in said


class CaptureFailed(ScalingError):
    """The model's own forward raised while it was recorded."""

    def __init__(self, model: str, where: str, cause: str, cure: str = "check that model(*args, **kwargs) runs on its own") -> None:
        self.model, self.where, self.cause, self.cure = model, where, cause, cure
        super().__init__(f"{model} could not be recorded: {cause}\n  at {where}\n  {cure}")


class UnsupportedOperator(ScalingError):
    """An operator without a rule consumes a weight."""

    def __init__(self, operator: str, weight: str, where: str) -> None:
        self.operator, self.weight, self.where = operator, weight, where
        super().__init__(
            f"no rule for {operator}, which uses weight '{weight}'\n  at {where}\n"
            f'  add its signature: scaling.operators.register("{operator}", "... i, o i -> ... o")'
        )


class ConflictingUses(ScalingError):
    """A weight is used twice in ways no choice of multipliers reconciles (THEORY 2.3)."""

    def __init__(self, weight: str, wants: Iterable[str], where: Iterable[str], why: str) -> None:
        self.weight, self.wants, self.where = weight, tuple(wants), tuple(where)
        super().__init__(
            f"weight '{weight}' is used more than once, wanting {' and '.join(self.wants)}\n  at {'   and   '.join(self.where)}\n  {why}"
        )


class TooManyGrowingAxes(ScalingError):
    """More than two axes of one map grow: outside the theory (TP5, App. B)."""

    def __init__(self, weight: str, dims: str, where: str) -> None:
        self.weight, self.dims, self.where = weight, dims, where
        super().__init__(
            f"weight '{weight}' {dims} has more than two growing axes, which the theory does not cover\n  at {where}\n"
            "  keep one of them fixed: derive(..., fixed={'" + weight + "': axis}), or take the rules that counting gives:"
            " derive(..., many_growing_axes=True)"
        )


class GraphsDiffer(ScalingError):
    """The models of two widths do not run the same operators."""

    def __init__(self, widths: tuple[str, str], first: str, second: str) -> None:
        self.widths, self.first, self.second = widths, first, second
        super().__init__(
            f"the models at {widths[0]} and {widths[1]} do not run the same operators; the first difference:\n"
            f"  {widths[0]}: {first}\n  {widths[1]}: {second}\n"
            "  choose widths at which the model takes the same path (no size of 1, the same depth and number of experts)"
        )


class NoSuchAxis(ScalingError):
    """An axis override matches no weight axis."""

    def __init__(self, option: str, pattern: str, why: str) -> None:
        self.option, self.pattern = option, pattern
        super().__init__(f"{option}={{{pattern!r}: ...}} {why}")


class UnreachedWeights(ScalingError):
    """Trainable weights without a rule: `unused` by the forward that was derived, or `unknown` to the table."""

    def __init__(self, unused: Iterable[str], unknown: Iterable[str]) -> None:
        self.unused, self.unknown = tuple(unused), tuple(unknown)
        lines = ["the table has no rule for some trainable weights"]
        if self.unused:
            lines += [
                f"the forward did not use these when the table was derived: {', '.join(fold(self.unused))}",
                "  derive it with inputs that make the model use them, derive(model, args); or leave them as they are, not optimized:",
                "  for name in table.coverage.unreached: model.get_parameter(name).requires_grad_(False)",
            ]
        if self.unknown:
            lines += [
                f"the model that was derived did not have these, or had them frozen: {', '.join(fold(self.unknown))}",
                "  derive the table from this model as it is now: derive(model)",
            ]
        super().__init__("\n".join(lines))

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.unused + self.unknown


class FormatError(ScalingError, ValueError):
    """Text that is not a scaling table as `to_json` writes it, or one whose values do not follow from its own entries."""

    def __init__(self, where: str, what: str) -> None:
        self.where, self.what = where, what
        super().__init__(f"this is not a scaling table that can be read: {what}\n  at {where}\n  write one anew: derive(model).to_json()")


class MixedBlocks(ScalingError):
    """The blocks of one weight follow different rules, so the weight as a whole has none."""

    def __init__(self, weight: str, quantity: str, values: Iterable[str]) -> None:
        self.weight, self.quantity, self.values = weight, quantity, tuple(values)
        super().__init__(
            f"the blocks of '{weight}' differ in {quantity}: {', '.join(self.values)}\n"
            f"  ask one of them: table['{weight}'].blocks[0].{quantity}"
        )


class UnknownName(ScalingError, ValueError):
    """A name that is in no table; the known ones are listed."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(self.known)}")


class WrongWidth(ScalingError):
    """A model whose shapes are the table's shapes at no width; `shape` is None for a weight that the model lacks."""

    def __init__(self, weight: str, shape: tuple[int, ...] | None, expected: str, there: Iterable[str] = ()) -> None:
        self.weight, self.shape, self.expected, self.there = weight, shape, expected, tuple(there)
        some = ", ".join(self.there[:6]) + (", …" if len(self.there) > 6 else "")
        what = (
            f"weight '{weight}' has shape {shape}, the table says {expected}"
            if shape is not None
            else f"the model has no weight '{weight}', which the table has a rule for: the table is of another model (this one has {some})"
        )
        within = next((name.removesuffix(weight) for name in self.there if name.endswith(f".{weight}")), "") if shape is None else ""
        inner = f"a wrapper has it as '{within}{weight}': pass model.{within.removesuffix('.')}, and wrap it afterwards"
        super().__init__(f"{what}\n  {inner if within else 'derive the table from this model, or build the model it was derived from'}")


class CannotMeasure(ScalingError, ValueError):
    """What was given cannot be trained or compared over widths."""

    def __init__(self, what: str, cure: str) -> None:
        self.what, self.cure = what, cure
        super().__init__(f"{what}\n  {cure}")


class MissingExtra(ScalingError, ImportError):
    """A package that only some functions need is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"{what} needs {package}, which is not installed\n  pip install 'spectral-mup[{extra}]'")


class NoGraph(ScalingError):
    """A table that was read from a file has rules, but no graph."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"this table of {model or 'a model'} was not derived here, so it has no layer graph\n"
            "  derive it from the model: table = derive(model)"
        )


class OurBug(ScalingError):
    """Something this project got wrong by its own standards."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}\n  this is a bug of spectral-mup, not of your model: please report it with the model and the inputs")
