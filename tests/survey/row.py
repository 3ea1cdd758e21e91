"""One model of the survey: what `derive` makes of it, compared with what is right."""

import fnmatch
import re
import time
from collections import Counter
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_structure

from scaling import ScalingTable, derive
from scaling.capture import record
from scaling.errors import ScalingError
from scaling.growth import growth_of
from scaling.limits import WIDTH, exponent
from scaling.records import Block, WeightRule
from tests.survey import oracle
from tests.survey.cases import Case

UNIT = 64
"""The widths that a factory is asked for: 64·k."""
MOST = 12
"""Overrides after which the search for them ends."""


class Alone(nn.Module):
    """A model without its config: all that is left to guess from is its graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def row(case: Case) -> dict[str, Any]:
    """The comparison, as JSON."""
    out: dict[str, Any] = {"family": case.family, "name": case.name}
    model = case.build(1)
    args, kwargs = case.inputs(model)
    marks = _marked(model)
    start = time.process_time()
    try:
        alone = derive(Alone(model), args, kwargs)
    except ScalingError as error:
        return out | {"derived": False, "error": _said(error)}
    out |= {"derived": True, "seconds": round(time.process_time() - start, 2)}
    covered = alone.coverage
    out |= {
        "weights": covered.trainable,
        "made_up": covered.made_up,
        "unreached": [name.removeprefix("model.") for name in covered.unreached],
        "without_rule": list(covered.operators_without_rule),
        "conflicts": len(alone.trace.growth.axes.conflicts),
    }
    out["no_inputs"], without = _without_inputs(model)
    out["untouched"] = marks == _marks(model)
    if len(case.multiples) > 1:
        out |= _widths(case, model, alone, without)
    return {key: value for key, value in out.items() if value not in ([], {}, None)}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:600]


# nothing about the model changes


def _marked(model: nn.Module) -> dict[str, Any]:
    """Training flags as no survey would choose them, a gradient, and a state to compare."""
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    first = next(model.parameters())
    if not first.is_meta:
        first.grad = torch.ones_like(first)
    torch.manual_seed(7)
    return _marks(model)


def _marks(model: nn.Module) -> dict[str, Any]:
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    return {
        "ids": [id(tensor) for tensor in tensors.values()],
        "versions": [tensor._version for tensor in tensors.values()],
        "sums": [_bits(tensor) for tensor in tensors.values()],
        "grads": [None if tensor.grad is None else _bits(tensor.grad) for tensor in tensors.values()],
        "training": [module.training for module in model.modules()],
        "requires_grad": [tensor.requires_grad for tensor in tensors.values()],
        "rng": _bits(torch.get_rng_state()),
        "config": _fields(getattr(model, "config", None)),
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
    }


def _fields(config: Any) -> Any:
    """A config's fields, private ones and those of sub-configs too, as text."""
    return (
        {name: _fields(value) if hasattr(value, "to_dict") else repr(value) for name, value in vars(config).items()}
        if hasattr(config, "to_dict")
        else None
    )


def _bits(tensor: torch.Tensor) -> int | None:
    """A number that any changed bit changes."""
    return None if tensor.is_meta else hash(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


# what grows


def _without_inputs(model: nn.Module) -> tuple[str, ScalingTable | None]:
    """Whether a call that runs is found, and the table (of a Hugging Face model from its own config at another width)."""
    try:
        table = derive(model)
    except ScalingError as error:
        return _said(error), None
    return "found", table


def _widths(case: Case, model: nn.Module, alone: ScalingTable, without: ScalingTable | None) -> dict[str, Any]:
    models = {1: model} | _built(case, model)
    if len(models) == 1:
        return {"one_width": True}
    truth = {
        name: [oracle.growth(sizes) for sizes in zip(*shapes, strict=True)] for name, shapes in oracle.shapes(list(models.values())).items()
    }
    if not any(any(axes) for axes in truth.values()):
        return {"one_width": True}  # what the builder multiplies reaches no weight
    out: dict[str, Any] = {"no_law": [f"{name}:{axis}" for name, axes in truth.items() for axis, law in enumerate(axes) if law is None]}
    try:
        factory = derive(
            lambda d: models[d // UNIT],
            lambda d: case.inputs(models[d // UNIT])[0],
            lambda d: case.inputs(models[d // UNIT])[1],
            widths=[UNIT * k for k in models],
        )
        out["axes"] = sum(len([n for n in rule.shape if n > 1]) for rule in factory) - len(out["no_law"])
        out["factory"] = _wrong(factory, truth) + _inexact(factory, models)
        out |= _rules(factory, list(models.values()))
    except ScalingError as error:
        out["factory"] = [_said(error)]
    also = models[list(models)[1]]
    try:
        args, kwargs = case.inputs(model)
        same = _sizes((args, kwargs)) == _sizes(case.inputs(also))
        at_two = oracle.shapes([model, also])
        of_two = {name: [oracle.growth(sizes) for sizes in zip(*shapes, strict=True)] for name, shapes in at_two.items()}
        out["also"] = _wrong(derive(model, args, kwargs, also=also) if same else derive(model, also=also), of_two)
    except ScalingError as error:
        out["also"] = [_said(error)]
    if hasattr(model, "config") and without is not None:
        scaled = _of_the_scaled_config(without)
        out["config"] = [*(note for note in without.notes if "guessed" in note), *_wrong(without, scaled)]
        out["builder_differs"] = [f"{name}:{axis}" for name, axes in scaled.items() for axis in _apart(axes, truth.get(name, axes))]
        out["unreached_without_inputs"] = len(without.coverage.unreached)
    truth = {f"model.{name}": axes for name, axes in truth.items()}
    out["alone"] = [name.removeprefix("model.") for name in _wrong(alone, truth)]
    stated = {f"{name}:{axis}" for cls in alone.classes if cls.known for name, axis in cls.where}
    out["stated"] = [name for name in _wrong(alone, truth) if name in stated]
    out["overrides"] = _overrides(alone, truth)
    out["unsound"] = _unsound(alone, {f"model.{n}": s for n, s in oracle.shapes(list(models.values())).items()})
    return out


def _of_the_scaled_config(table: ScalingTable) -> dict[str, list]:
    """What grows between the model and its own config scaled, by their shapes; where the survey's builder scales other fields, so be it."""
    every = [
        {name: tuple(node.meta["val"].shape) for node in recording.graph.nodes for name in node.meta.get("names", ())}
        for recording in table.trace.graph.recordings
    ]
    return {name: [oracle.growth(sizes) for sizes in zip(*(shapes[name] for shapes in every), strict=True)] for name in every[0]}


def _apart(axes: list, others: list) -> list[int]:
    """The axes that grow in one and not in the other."""
    return [axis for axis, (a, b) in enumerate(zip(axes, others, strict=True)) if None not in {a, b} and (a != 0) != (b != 0)]


def _sizes(inputs: Any) -> Any:
    return [leaf.shape if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in tree_leaves(inputs)], str(tree_structure(inputs))


def _built(case: Case, model: nn.Module) -> dict[int, nn.Module]:
    """The model at its other widths, as far as its builder can make them and they run."""
    out = {}
    for k in case.multiples[1:]:
        try:
            out[k] = case.build(k)
            args, kwargs = case.inputs(out[k])
            _alike(out[k], model)
            record(out[k], args, kwargs)
        except Exception:  # whatever a config validator or a layer that does not fit raises
            out.pop(k, None)
            break
    return out


def _alike(other: nn.Module, model: nn.Module) -> None:
    """The same training flags: a forward may differ by them."""
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in other.named_modules():
        module.training = flags.get(name, model.training)


def _wrong(table: ScalingTable, truth: dict[str, list]) -> list[str]:
    """The weight axes taken to grow that do not, or the reverse."""
    return [
        f"{rule.name}:{axis}"
        for rule in table
        if rule.name in truth
        for axis, (dim, grows, size) in enumerate(zip(rule.dims, truth[rule.name], rule.shape, strict=True))
        if size > 1 and grows is not None and dim.has(WIDTH) != (grows != 0)  # an axis of length 1 (a single head) does not grow
    ]


def _inexact(table: ScalingTable, models: dict[int, nn.Module]) -> list[str]:
    """The weights whose lengths in d are not their shapes at every width, where these follow a law."""
    out = []
    every = [dict(model.named_parameters()) for model in models.values()]
    for k, model in models.items():
        weights = dict(model.named_parameters())
        out += [
            f"{rule.name} at {k}: {dims} for {tuple(weights[rule.name].shape)}"
            for rule in table
            if all(oracle.follows_a_law(sizes) for sizes in zip(*(weights_at[rule.name].shape for weights_at in every), strict=True))
            and (dims := tuple(sympy.Integer(1) * dim.subs(WIDTH, UNIT * k) for dim in rule.dims)) != tuple(weights[rule.name].shape)
        ]
    return out


def _unsound(table: ScalingTable, shapes: dict[str, oracle.Shapes]) -> list[str]:
    """Classes that hold axes, each of this one class alone, that scale differently."""
    axes = table.trace.growth.axes
    single = set()
    for call in table.trace.graph.weights:
        for axis, dim in enumerate(axes.dims[call.node]):
            resolved = axes.resolve(dim)
            if len(resolved) == 1 and not resolved[0].segments:
                single.add((call.names[0], axis))
    out = []
    for cls in table.classes:
        laws = {
            sizes: f"{name}:{axis}"
            for name, axis in cls.where
            if name in shapes and (name, axis) in single
            if oracle.growth(sizes := tuple(shape[axis] for shape in shapes[name])) is not None
        }
        if len(laws) > 1:
            out.append(", ".join(f"{where} {law}" for law, where in laws.items()))
    return out


def _overrides(table: ScalingTable, truth: dict[str, list]) -> list[str] | None:
    """The overrides that make every axis right, greedily: each time the one that the most wrong axes share."""
    graph, axes = table.trace.graph, table.trace.growth.axes
    dims = {call.names[0]: axes.dims[call.node] for call in graph.weights if call.names[0] in truth}
    chosen: dict[str, dict[str, list[int]]] = {"fixed": {}, "grows": {}}
    for _ in range(MOST + 1):
        growth = growth_of(graph, axes, widths=None, heads="grow", fixed=chosen["fixed"], grows=chosen["grows"])
        wrong = [
            (name, axis)
            for name, of in dims.items()
            for axis, dim in enumerate(of)
            if axes.resolve(dim) and truth[name][axis] is not None and growth.grows(dim) != (truth[name][axis] != 0)
        ]
        said = [f"{option} {pattern}: {which}" for option, of in chosen.items() for pattern, which in of.items()]
        if not wrong:
            return said
        option, pattern, which = _most(wrong, truth)
        if set(which) <= set(chosen[option].get(pattern, [])):
            return [*said, f"no override helps {pattern}"] + ["?"] * MOST
        chosen[option].setdefault(pattern, []).extend(which)
    return [*said, "…"]


def _most(wrong: list[tuple[str, int]], truth: dict[str, list]) -> tuple[str, str, list[int]]:
    """The override that puts the most axes right and none wrong: an axis of a layer that repeats, or all of a part that does not grow."""
    found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for name, axis in wrong:
        grows = truth[name][axis] != 0
        layer = re.sub(r"(?<![^.])\d+(?![^.])", "*", name.removeprefix("model."))
        parts = layer.split(".")
        shorter = [
            pattern
            for length in range(1, len(parts))
            for pattern in ("*." + ".".join(parts[length:]), *(f"*{parts[at]}.*." + ".".join(parts[length:]) for at in range(length - 1)))
        ]
        for pattern in dict.fromkeys((name, f"*{layer}", *shorter)):
            if all((t != 0) == grows for t in _matched(pattern, axis, truth)):
                found["grows" if grows else "fixed", pattern, (axis,)] += 1
        for length in range(1, len(parts)):
            part = "model." + ".".join(parts[:length]) + ".*"
            inside = [axes for other, axes in truth.items() if fnmatch.fnmatchcase(other, part)]
            if not any(any(axes) for axes in inside):
                found["fixed", part, tuple(range(max(map(len, inside))))] += 1
                break
    (option, pattern, which), _ = found.most_common(1)[0]
    return option, pattern, list(which)


def _matched(pattern: str, axis: int, truth: dict[str, list]) -> list:
    matching = (axes for name, axes in truth.items() if fnmatch.fnmatchcase(name, pattern))
    return [axes[axis] for axes in matching if axis < len(axes) and axes[axis] is not None]


# exponents


def _rules(table: ScalingTable, models: list[nn.Module]) -> dict[str, Any]:
    """Exponents against the oracle's: how many were compared, which differ for a reason that the graph gives, and which for none."""
    right = oracle.expected(models)
    compared, reasons, failures = 0, {}, {}
    for rule in table:
        wanted = [right[name] for name in rule.names if name in right]  # a tied weight has the exponents of its first use
        if not wanted:
            continue
        compared += 1
        got = [_exponents(block) for block in rule.blocks]
        if any(all(_agree(g, want, shift=0) for g in got) for want in wanted):
            continue
        want = wanted[0]
        reason = next((said for each in wanted if (said := _reason(rule, each))), "")
        if reason:
            reasons[rule.name] = reason
        else:
            failures[rule.name] = f"{_shown(want)} by its shapes, but {'; '.join(map(_shown, dict.fromkeys(got)))}: {_place(rule)}"
    return {"rules": compared, "exceptions": reasons, "wrong_rules": failures}


def _exponents(block: Block) -> oracle.Exponents:
    return oracle.Exponents(*(Fraction(str(block.exponent(name))) for name in ("init_std", "sgd", "adam", "muon")))


def _agree(got: oracle.Exponents, want: oracle.Exponents, *, shift: Fraction | int) -> bool:
    """Equal, where the output (over the input) is meant to be d^shift in size: σ, Adam and msign take that once, SGD twice."""
    shifted = (
        got.init_std - shift,
        got.sgd - 2 * shift,
        got.adam - shift,
        got.muon - shift if want.muon is not None and got.muon is not None else None,
    )
    return shifted == (want.init_std, want.sgd, want.adam, want.muon)


def _place(rule: WeightRule) -> str:
    return f"{rule.uses[0].operator} at {rule.uses[0].source}"


def _shown(exponents: oracle.Exponents) -> str:
    return f"σ {exponents.init_std}, sgd {exponents.sgd}, adam {exponents.adam}, muon {exponents.muon}"


def _reason(rule: WeightRule, want: oracle.Exponents) -> str:
    """Why the graph is right where shape and type alone are not; "" if it is not known to be."""
    shifts = [Fraction(str(exponent(block.target) - exponent(block.input_scale))) for block in rule.blocks]
    agree = [_agree(_exponents(block), want, shift=shift) for block, shift in zip(rule.blocks, shifts, strict=True)]
    if rule.uses[0].operator == "aten.mul":
        return f"the forward multiplies by it entry by entry: {_place(rule)}"
    turned = oracle.spectral(want.sgd - want.adam, -want.adam)  # fan_in and fan_out change places
    if rule.uses[0].source.module != rule.name.rpartition(".")[0] and all(_agree(g, turned, shift=0) for g in map(_exponents, rule.blocks)):
        return f"another module multiplies by its transpose: {_place(rule)}"
    if all(agree):
        return f"the forward multiplies or sums by a power of d: {rule.notes[0] if rule.notes else rule.uses[0].source}"
    finite = [
        any(not dim.has(WIDTH) and whole.has(WIDTH) for dim, whole in zip(block.dims, rule.dims, strict=True)) for block in rule.blocks
    ]
    if all(a or f for a, f in zip(agree, finite, strict=True)) and any(agree):
        return f"{sum(finite)} of its {len(finite)} blocks do not grow: {_place(rule)}"
    return ""
