"""`derive`: the pipeline, from a model to its scaling table."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from scaling.capture import Recording, record, unwrap
from scaling.contractions import folded
from scaling.depth import alpha_of, deepen
from scaling.errors import CannotMakeInputs, CaptureFailed, GraphsDiffer, ScalingError
from scaling.graph import LayerGraph, align
from scaling.growth import Override, growth_of
from scaling.huggingface import at_twice_the_width
from scaling.initialised import init_only_note, wide_constants
from scaling.inputs import made_up
from scaling.kept import random_states_kept
from scaling.records import Coverage, ScalingTable, Trace
from scaling.rules import rules_of
from scaling.scales import bent, few_normalized, few_taken, grown_outputs, scales_of, too_large_once_aligned
from scaling.uses import joined_axes, uses_of

__all__ = ["derive"]

_NEW_OBJECTS = 100_000
"""Between two looks for garbage: at Python's own 700, a sixth of a derivation goes into walking the graph again and again."""


@contextmanager
def _rarely_collected() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(max(_NEW_OBJECTS, before[0]) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_rarely_collected()
def derive(
    model: nn.Module | Callable[[int], nn.Module] | torch.export.ExportedProgram,
    args: Any = None,
    kwargs: dict[str, Any] | Callable[[int], dict[str, Any]] | None = None,
    *,
    widths: Sequence[int] | None = None,
    also: nn.Module | None = None,
    fixed: Override | None = None,
    grows: Override | None = None,
    heads: str = "grow",
    depth: bool | str | float | Fraction | sympy.Rational = False,
    many_growing_axes: bool = False,
) -> ScalingTable:
    """Derives the scaling table of a model from how its graph uses every weight.

    Which axes grow with the width d is exact from a factory with `widths` or from `also`, the same model at another width; a Hugging Face
    model's own config is scaled to find out; from one model alone it is guessed, and the table's footer says so.

    Args:
        model: any nn.Module (on the CPU or the meta device), unmodified; or with `widths` a function of the width that builds one; or an
            ExportedProgram, with its own example inputs.
        args: its positional inputs as for `torch.export`: a tuple, or a lone tensor; with a factory also a function of the width.
            Left out, they are made up from what the model's first layers consume.
        kwargs: its keyword inputs; with a factory also a function of the width.
        widths: at least two widths at which to build the factory; the first is the table's `size`.
        also: the same model at another width.
        fixed: `{weight pattern: axis}`: the axis, and all the graph joins to it, does not grow.
        grows: `{weight pattern: axis}`: it grows.
        heads: "grow" or "fixed": which of heads × head_dim grows, where only one model is given.
        depth: True for rules in the depth L as well, the number of residual branches on the stream: each is multiplied by L^-α with α = 1,
            or with the α of [1/2, 1] given here ("1/2"). The model's forward stays as it is, see `scaling.depth`.
        many_growing_axes: True for rules of weights of which more than two axes grow (`nn.Bilinear`) too, by counting terms and outputs
            as for all others: the theory (TP5, App. B) does not cover them.

    Returns:
        The table: one rule per trainable weight, exact in d.

    Raises:
        CannotMakeInputs: if no inputs were given and none could be made up.
        CaptureFailed: if the model's forward raises on the inputs.
        GraphsDiffer: if the models of several widths do not run the same operators.
        ScalingError: if they have the same shapes, or what is given is no model.
        UnsupportedOperator: if an operator without a rule consumes a weight.
        ConflictingUses: if the uses of a tied weight cannot be reconciled.
        TooManyGrowingAxes: if a weight has more than two growing axes, without `many_growing_axes`.
        NoSuchAxis: if `fixed` or `grows` matches nothing.
        NoResidualBranches: with `depth`, if the layers that repeat have no residual connections.
        UnstableDepth: for a `depth` under which the stream grows with L.
    """
    if isinstance(model, torch.export.ExportedProgram):
        if args is None and not kwargs:
            args, kwargs = model.example_inputs or (None, None)
        model = model.module()
    models = _models(model, widths, also)
    if len(models) > 1 and all(_shapes(other) == _shapes(models[0]) for other in models):
        raise ScalingError(_nothing_grows(type(models[0]).__name__, widths))
    graph, notes = _graph(models, args, kwargs, widths)
    axes, without_rule = joined_axes(graph)
    uses, dots = uses_of(graph, axes)
    growth = growth_of(graph, axes, widths=widths, heads=heads, fixed=fixed, grows=grows)
    scales = scales_of(graph, growth, uses, dots)
    contractions, folds = folded(graph, growth, dots, scales.at)
    deep = None if depth is False else deepen(graph, uses, alpha_of(depth), models[0])
    rules = rules_of(graph, uses, growth, [*folds, *scales.folds, *(deep.folds if deep else ())], scales.at, many=many_growing_axes)
    notes += (*few_normalized(graph, growth, uses, rules), *few_taken(graph, growth), *bent(graph, growth, uses))
    notes += (*too_large_once_aligned(rules), *wide_constants(models, rules, growth.sizes))
    if deep is not None:
        rules = [deep.rule(rule) for rule in rules]
        notes += (*deep.residual.notes, *init_only_note(models[0], deep.residual, rules, growth.size))
    names = [name for name, weight in models[0].named_parameters() if weight.requires_grad]
    reached = {name: rule for rule in rules for name in rule.names}
    table = ScalingTable(
        size=growth.size,
        rules=tuple(dict.fromkeys(reached[name] for name in names if name in reached)),
        classes=growth.classes,
        contractions=(*contractions, *grown_outputs(graph, scales)),
        coverage=Coverage(
            trainable=len(names),
            reached=sum(name in reached for name in names),
            unreached=tuple(name for name in names if name not in reached),
            operators_without_rule=without_rule,
            made_up=graph.recordings[0].made_up,
        ),
        residual=deep.residual if deep else None,
        model=type(models[0]).__name__,
        notes=notes,
    )
    table._trace = Trace(graph, growth, tuple(uses))
    return table


def _models(model: nn.Module | Callable[[int], nn.Module], widths: Sequence[int] | None, also: nn.Module | None) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        if widths is not None:
            message = "widths= needs a function that builds the model: derive(lambda d: GPT(width=d), args, widths=(64, 128))"
            raise ScalingError(message)
        return [_ready(model, "model")] if also is None else [_ready(model, "model"), _ready(also, "also=")]
    if not callable(model):
        raise ScalingError(_taken("model", model))
    if widths is None or len(set(widths)) < 2 or also is not None:
        message = "a function that builds the model needs at least two widths: derive(build, args, widths=(64, 96, 128))"
        raise ScalingError(message)
    with random_states_kept():
        return [_ready(model(width), f"the model that the function builds at width {width}") for width in widths]


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _nothing_grows(model: str, widths: Sequence[int] | None) -> str:
    if widths is None:
        return f"also= is a {model} of the same width, and nothing tells what grows\n  pass one that is wider, or derive(model) alone"
    at = " and ".join(map(str, dict.fromkeys(widths)))
    what = f"the function builds a {model} of the same shapes at widths {at}, and nothing grows"
    return f"{what}\n  use its argument, as in lambda d: GPT(width=d)"


def _ready(model: Any, what: str) -> nn.Module:
    """The user's module, which has all its weights."""
    if not isinstance(model, nn.Module):
        raise ScalingError(_taken(what, model))
    model = unwrap(model)
    if getattr(model.forward, "__name__", "") == _NO_FORWARD:
        raise ScalingError(_without_forward(model))
    lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
    if lazy:
        message = (
            f"{', '.join(map(repr, lazy))} of {type(model).__name__} {'is' if len(lazy) == 1 else 'are'} not initialised yet:"
            " a lazy layer has no shape before its first input\n  run one forward first: model(*args), then derive(model, args)"
        )
        raise ScalingError(message)
    sharded = next((name for name, weight in model.named_parameters() if type(weight).__name__ == "DTensor"), None)
    if sharded is not None:
        message = (
            f"{sharded!r} of {type(model).__name__} is sharded over ranks, and what is recorded is the model before that\n"
            "  derive first, or from the same model on the meta device, and shard then: the table goes by the names of the weights"
        )
        raise ScalingError(message)
    return model


_NO_FORWARD = nn.Module.forward.__name__
"""What `forward` is called in a module that has none of its own."""


def _without_forward(model: nn.Module) -> str:
    own = [
        name
        for kind in type(model).__mro__
        if not kind.__module__.startswith("torch.")
        for name, value in vars(kind).items()
        if callable(value) and not isinstance(value, type) and not name.startswith("_")
    ]
    has = f"; its methods are {', '.join(dict.fromkeys(own))}" if own else ""
    entry = own[-1] if own else "the_method"
    return (
        f"{type(model).__name__} has no forward, and what is recorded is a call of the model{has}\n"
        f"  say which one training goes through, as one that reaches every weight: model.forward = model.{entry}, then derive(model, args)"
    )


def _taken(what: str, value: Any) -> str:
    return (
        f"{what} is {f'the {type(value).__name__} {value!r}'[:80]}, but derive takes an nn.Module, a function of the width that builds one"
        " (with widths=), or an ExportedProgram\n"
        "  build the model first: derive(model), or derive(lambda d: GPT(width=d), args, widths=(64, 128))"
    )


def _graph(
    models: list[nn.Module], args: Any, kwargs: dict[str, Any] | Callable[[int], dict[str, Any]] | None, widths: Sequence[int] | None
) -> tuple[LayerGraph, tuple[str, ...]]:
    if len(models) > 1:
        labels = [f"d={width}" for width in widths] if widths is not None else ["the model", "the other width"]
        return align([_recorded(m, args, kwargs, w) for m, w in zip(models, widths or (None, None), strict=True)], labels), ()
    own = _recorded(models[0], args, kwargs, None)
    note: tuple[str, ...] = ()
    for alike in (False, True):
        twin = at_twice_the_width(models[0], alike=alike)
        if twin is not None:
            try:
                return align([own, _recorded(twin, args, kwargs, None)], ["the model", "its config at twice the width"]), ()
            except (CannotMakeInputs, CaptureFailed, GraphsDiffer) as error:
                note = note or (f"the model's config at twice the width did not tell what grows, so it is guessed: {error}",)
    return align([own], ["the model"]), note


def _recorded(model: nn.Module, args: Any, kwargs: dict[str, Any] | Callable[[int], dict[str, Any]] | None, width: int | None) -> Recording:
    if callable(kwargs):
        if width is None:
            message = "kwargs as a function of the width need a factory: derive(build, args, kwargs, widths=(64, 128))"
            raise ScalingError(message)
        kwargs = kwargs(width)
    if args is None and not kwargs:
        return made_up(model)[1]
    if callable(args) and not isinstance(args, torch.Tensor):
        args = args(width)
    return record(model, args if isinstance(args, (tuple, list)) else () if args is None else (args,), kwargs or {})
