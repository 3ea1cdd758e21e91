"""The model's side of a table: initial weights in place, and the forward multipliers that ties and gauges need."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from compiler.blocks import axes_of, block_view, matrices
from compiler.errors import AlreadyCompiled, BadOption, NotExpressible
from compiler.factors import Base, Factors, base_model, ruled_weights
from compiler.norms import spectral_norm, spectral_normalize, svc
from scaling.errors import UnknownName
from scaling.folding import template
from scaling.records import Block, Branch, ScalingTable, Use, WeightRule

__all__ = ["LAWS", "Multiplier", "init_", "plan_init", "plan_multipliers"]

Action = Callable[[], object]
MARK = "_spectral_mup"


def init_(
    model: nn.Module,
    table: ScalingTable,
    base: Base = None,
    law: str = "gaussian",
    generator: torch.Generator | None = None,
    base_depth: int | None = None,
) -> nn.Module:
    """Give every trainable weight the table's initial size, in place, and install the forward multipliers.

    Without `base` matrices and embeddings are drawn anew: σ and ‖W‖₂ are the table's formulas at the model's width. What it keeps:
    weights (and blocks) that are constant, times the block's `gain`; all-zero rows of an embedding (padding); vectors and
    scalars with a law of their own (decay rates, position tables), whose scale has no width in it. Vectors drawn around zero
    are biases by torch's default law U(±1/√fan_in), which shrinks with width: they become zero. Frozen weights are left alone.

    With a base model (or a function that builds one) the user's own draw stays and is rescaled, block by block, to the base
    model's measured size times the table's ratio between the two widths. With a width as `base` nothing happens at that width;
    at another one there is no size to match, so matrices are drawn by the absolute formulas, with a warning.

    Args:
        model: in the table's shapes at some width; on a device with data, not meta.
        table: from `scaling.derive`.
        base: the width, model or function at which everything is the user's own.
        law: of the maps (everything but embeddings, vectors and scalars, which stay Gaussian): "gaussian" entries of std σ;
            "sn" a Gaussian scaled to spectral norm T exactly (to 0.1 %), T = √(fan_out/fan_in) in the plain case; "svc" a
            Gaussian of std σ clipped at T; "msign" orthogonal with gain T.
        generator: of the random numbers; torch's global one by default.
        base_depth: see `compiler.compile`. A block that the base model does not have is compared with the last of its kind there.

    Returns:
        The model.

    Raises:
        UnknownName: for an unknown law. AlreadyCompiled: the second time. UnreachedWeights, WrongWidth: if table and model do not fit.
        BadOption: if base is none of the things it may be, or the model has no data or is sharded.
        NotExpressible: if a multiplier has to go into the user's code. The model is unchanged whenever this raises.
    """
    built = base_model(base)
    factors = Factors.of(model, table, built or base, base_depth)
    actions = [*plan_init(model, table, factors, built, law, generator), *plan_multipliers(model, table, factors)]
    for action in actions:
        action()
    return model


def plan_init(
    model: nn.Module, table: ScalingTable, factors: Factors, base: nn.Module | None, law: str, generator: torch.Generator | None
) -> list[Action]:
    """What `init_` does to the weights, as actions yet to be taken; everything that can go wrong goes wrong here."""
    if law not in LAWS:
        raise UnknownName("law", law, LAWS)
    if "init" in _marks(model):
        raise AlreadyCompiled("initialising this model")
    weights = ruled_weights(model, table)
    if factors.at_base:
        return [partial(_mark, model, init=law)]
    _require_data("model", model, "call model.to_empty(device=...) and load or reset its weights first, or pass init=None")
    if lying := [name for name, weight, _ in weights if isinstance(weight, DTensor)]:
        raise BadOption("model", lying[0], "a model of whole weights: init_ it, then fully_shard it, then compile it with init=None")
    if base is not None:
        _require_data("base", base, "build the base model on a device with data: its sizes are measured")
    elif factors.base is not None:
        message = (
            f"base={factors.base} is a width, and the model has width {factors.width}: its weights are drawn by the absolute formulas. "
            f"To keep your own initialisation, pass base=<the model built at width {factors.base}>"
        )
        warnings.warn(message, UserWarning, stacklevel=3)
    bases = dict(base.named_parameters(remove_duplicate=False)) if base is not None else {}
    actions: list[Action] = []
    for name, weight, rule in weights:
        like = _counterpart(rule, bases)
        for block in rule.blocks:
            part = _Part(name, block, weight, factors, law, generator)
            actions.append(part.rescaled(like, factors) if like is not None else part.drawn())
    return [*actions, partial(_mark, model, init=law)]


def _counterpart(rule: WeightRule, bases: dict[str, nn.Parameter]) -> nn.Parameter | None:
    """The base model's weight of the name; of a block that it does not have, the last of the same kind."""
    own = next((bases[alias] for alias in rule.names if alias in bases), None)
    alike = [weight for name, weight in bases.items() if template(name) == template(rule.name) and weight.ndim == len(rule.dims)]
    return own if own is not None or not alike else alike[-1]


class _Part:
    """One block to be initialised."""

    def __init__(
        self, name: str, block: Block, weight: nn.Parameter, factors: Factors, law: str, generator: torch.Generator | None
    ) -> None:
        self.name, self.block, self.generator, self.gain = name, block, generator, factors.at(block.gain)
        self.absolute = Factors(factors.width, depth=factors.depth)
        self.W, self.sizes = block_view(weight.detach(), axes_of(block, self.absolute.value))
        self.vector = block.fan_in == 1 and not block.lookup
        self.bias = self.vector and weight.ndim == 1
        self.law = LAWS["gaussian" if self.vector or block.lookup else law]

    @property
    def kept(self) -> bool:
        """Whether the block has a law of its own: it is constant, or a vector that is not drawn around zero."""
        W = _working(self.W)
        return _constant(W) or (self.vector and bool(W.mean().abs() > 5 * W.std(correction=0) / W.numel() ** 0.5))

    def drawn(self) -> Action:
        """By the absolute formulas."""
        if self.kept or (self.vector and not self.bias):
            return self.times_gain
        return self.W.zero_ if self.bias else self.draw

    def rescaled(self, like: Tensor, factors: Factors) -> Action:
        """The user's own draw, in the size of the base model's."""
        if self.kept:
            return self.times_gain
        B, sizes = block_view(like.detach(), axes_of(self.block, Factors(factors.base or 0).value))
        if _constant(B):
            raise BadOption("base", self.name, "a base model whose weight of this name is drawn at random, as the model's own is")
        size = _rms(B) * factors.at(self.block.init_std) / _rms(self.W)
        norm = float(spectral_norm(matrices(_working(B), sizes)).mean()) if self.law is not LAWS["gaussian"] else 1.0
        return lambda: self.write(matrices(_working(self.W) * size, self.sizes), norm * factors.at(self.block.spectral_norm))

    def times_gain(self) -> None:
        if self.gain != 1:
            self.W.mul_(self.gain)

    def draw(self) -> None:
        X = torch.randn(self.sizes, generator=self.generator, device=self.W.device, dtype=_working(self.W).dtype)
        self.write(X * self.absolute.value(self.block.init_std), self.absolute.value(self.block.spectral_norm))

    def write(self, X: Tensor, norm: float) -> None:
        X = self.law(X, norm).reshape(self.W.shape)
        if self.block.lookup:
            X = X.where((matrices(self.W, self.sizes) != 0).any(1, keepdim=True).expand(self.sizes).reshape(self.W.shape), 0)
        self.W.copy_(X)


def _orthogonal(X: Tensor, norm: float) -> Tensor:
    """An orthogonal matrix from a Gaussian one (Haar: the R of its QR has a positive diagonal), times norm."""
    tall = X if X.size(-2) >= X.size(-1) else X.mT
    Q, R = torch.linalg.qr(tall)
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2) * norm
    return Q if X.size(-2) >= X.size(-1) else Q.mT


LAWS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "gaussian": lambda X, norm: X,
    "sn": lambda X, norm: spectral_normalize(X) * norm,
    "svc": lambda X, norm: svc(X, 1 / norm) * norm,
    "msign": _orthogonal,
}
"""Name -> what becomes of a draw (copies, out, in) of std σ that is meant to have spectral norm `norm`."""


def _require_data(option: str, model: nn.Module, cure: str) -> None:
    meta = [name for name, weight in model.named_parameters() if weight.is_meta]
    if meta:
        raise BadOption(option, meta[0], f"a model with data, not on the meta device: {cure}")


def _constant(W: Tensor) -> bool:
    return bool((W - W.flatten()[:1] == 0).all())


def _working(W: Tensor) -> Tensor:
    return W.to(torch.promote_types(W.dtype, torch.float32))


def _rms(W: Tensor) -> float:
    return float(W.double().square().mean().sqrt())


class Multiplier:
    """A forward pre-hook that multiplies a module's input, or, where the input is indices, a forward hook on its output."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __repr__(self) -> str:
        return f"Multiplier({self.factor:g})"

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Multiply the first argument."""
        if args:
            return (args[0] * self.factor, *args[1:]), kwargs
        first, *_ = kwargs
        return args, {**kwargs, first: kwargs[first] * self.factor}

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Multiply the output."""
        return output * self.factor

    def install_(self, module: nn.Module, *, lookup: bool) -> None:
        """Register with a module. Bound methods of a module-level class pickle and copy with it."""
        if lookup:
            module.register_forward_hook(self.on_output)
        else:
            module.register_forward_pre_hook(self.on_input, with_kwargs=True)


def plan_multipliers(model: nn.Module, table: ScalingTable, factors: Factors) -> list[Action]:
    """The multipliers to install, as actions yet to be taken; none if the very same are there already.

    Raises:
        NotExpressible: if one has to go into the user's code.
        AlreadyCompiled: if others are there already.
        MixedBlocks: if the blocks of one weight want different ones.
    """
    needed: dict[str, tuple[float, bool]] = {}
    for rule in table:
        scaled = any(use.multiplier != 1 for use in rule.uses)
        for use in rule.uses:
            factor = factors.at(use.multiplier if scaled else rule.multiplier)
            if factor != 1:
                _require_own_module(model, rule, use, factor)
                needed[use.source.module] = factor, use.lookup
    for branch in table.residual.branches if table.residual is not None else ():
        if (factor := factors.at(branch.forward)) != 1:
            _require_own_output(model, branch, needed, factor)
            needed[branch.at] = factor, True
    found = _marks(model).get("multipliers")
    if found is not None and found != needed:
        raise AlreadyCompiled("multiplying this model's forward")
    if found is not None:
        return []
    install = [partial(Multiplier(factor).install_, model.get_submodule(path), lookup=lookup) for path, (factor, lookup) in needed.items()]
    return [*install, partial(_mark, model, multipliers=needed)]


def _require_own_module(model: nn.Module, rule: WeightRule, use: Use, factor: float) -> None:
    """A hook can stand for the factor only if the module does nothing but apply this weight, linearly, once."""
    modules = dict(model.named_modules())
    module = modules.get(use.source.module)
    own = dict(module.named_parameters(recurse=False)) if module is not None else {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    weight = next(weights[name] for name in rule.names if name in weights)
    alone = module is not None and not any(True for _ in module.children()) and any(p is weight for p in own.values())
    alone = alone and all(p is weight or p.ndim < 2 for p in own.values()) and (use.lookup or use.fan_in != 1)
    others = [other for other in rule.uses if other.source.module == use.source.module and other.multiplier != use.multiplier]
    if not alone or others:
        raise NotExpressible(
            rule.name,
            f"needs the forward multiplier {rule.multiplier} (here {factor:g}) at a use that is not a module of its own",
            f"multiply by hand there, and compile a table without it\n  at {use.source}",
        )


def _require_own_output(model: nn.Module, branch: Branch, needed: dict[str, tuple[float, bool]], factor: float) -> None:
    """A hook can stand for a branch's multiplier only if one module makes the branch's last value, and has no other factor."""
    if branch.at not in dict(model.named_modules()) or not branch.at or needed.get(branch.at, (factor, True)) != (factor, True):
        raise NotExpressible(
            branch.weights[-1] if branch.weights else "of a branch",
            f"is in a residual branch that needs the forward multiplier {branch.forward} (here {factor:g}), and no module alone ends it",
            f"end the branch with a linear map, or multiply it by hand and derive without depth=\n  at {branch.source}",
        )


def _marks(model: nn.Module) -> dict[str, Any]:
    return getattr(model, MARK, {})


def _mark(model: nn.Module, **done: Any) -> None:
    setattr(model, MARK, {**_marks(model), **done})
