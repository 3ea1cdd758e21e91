"""emit: the table as one plain Python file that needs torch and nothing of this project."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import sympy

from compiler.compile import OPTIMIZERS
from compiler.errors import NotExpressible
from scaling.errors import UnknownName
from scaling.records import Block, ScalingTable, WeightRule

__all__ = ["emit"]

USAGE = {"sgd": "torch.optim.SGD", "adam": "torch.optim.AdamW", "sign": "YourSignOptimizer"}
"""Optimizer name -> the class that the emitted file shows its groups with."""

Slices = tuple[slice, ...] | None

HEAD = '''"""Width scaling of {model}, derived at width {size} and written by spectral-mup. Needs torch only.

    init_(model, d)                        # a new model of width d, in place, before training; draws matrices and embeddings
    multiply_(model, d)                    # the forward multipliers, once per model
    {usage}(param_groups(model, d, lr=...))

With base=256 in param_groups every factor is over its value at width 256: lr is then the one tuned there.
"""

from math import sqrt

import torch

'''

BODY = '''

def _weights(model):
    weights = dict(model.named_parameters(remove_duplicate=False))
    ruled = {id(weights[name]) for rule in RULES for name in rule["names"]}
    missing = [name for name, weight in weights.items() if weight.requires_grad and id(weight) not in ruled]
    if missing:
        raise ValueError(f"no rule for {missing}: emit the file again from this model's table")
    return weights


@torch.no_grad()
def init_(model, d, generator=None):
    """Draw weights N(0, std²); constants keep their value (times gain), vectors their law, biases drawn around zero become zero."""
    weights = _weights(model)
    for rule in RULES:
        for name in rule["names"]:
            if not weights[name].requires_grad:
                continue
            for index, std, gain in rule["init"](d):
                block = weights[name][index]
                vector = rule["vector"]
                centred = block.mean().abs() <= 5 * block.std(correction=0) / block.numel() ** 0.5
                if (block == block.flatten()[0]).all() or (vector and not (centred and block.ndim == 1)):
                    block.mul_(gain)
                elif vector:
                    block.zero_()
                else:
                    padding = (block == 0).all(dim=rule["embedding"], keepdim=True) if rule["embedding"] else torch.tensor(False)
                    draw = torch.randn(block.shape, generator=generator, dtype=block.dtype, device=block.device) * std
                    block.copy_(draw.masked_fill(padding.to(block.device), 0))


class _Multiply:
    def __init__(self, factor):
        self.factor = factor

    def input(self, module, args, kwargs):
        if args:
            return (args[0] * self.factor, *args[1:]), kwargs
        first, *_ = kwargs
        return args, {**kwargs, first: kwargs[first] * self.factor}

    def output(self, module, args, output):
        return output * self.factor


def multiply_(model, d, base=None):
    """Install the forward multipliers."""
    for path, factor, side in MULTIPLIERS:
        hook = _Multiply(factor(d) / (factor(base) if base else 1))
        module = model.get_submodule(path)
        if side == "input":
            module.register_forward_pre_hook(hook.input, with_kwargs=True)
        else:
            module.register_forward_hook(hook.output)


def param_groups(model, d, lr, weight_decay=0.0, eps=1e-8, base=None):
    """Groups for the optimizer; the fraction decayed per step is lr * weight_decay in each."""
    weights = _weights(model)
    groups = []
    for rule in RULES:
        names = [name for name in rule["names"] if weights[name].requires_grad]
        factor = rule["lr"](d) / (rule["lr"](base) if base else 1)
        group = {"params": [weights[name] for name in names], "param_names": names}
        group |= {"lr": lr * factor, "weight_decay": weight_decay / factor}
        if "eps" in rule:
            group["eps"] = eps * rule["eps"](d) / (rule["eps"](base) if base else 1)
        if names:
            groups.append(group)
    return groups
'''


def emit(table: ScalingTable, path: str | os.PathLike[str], optimizer: str = "adam") -> Path:
    """Write init, forward multipliers and parameter groups as formulas in d (and in L), one entry per distinct rule.

    From the same weights the groups take the steps of `compiler.compile` bit for bit on a CPU. The init has its laws, but draws other
    numbers from a seed, as it goes rule by rule.

    Args:
        table: from `scaling.derive`.
        path: the file to write.
        optimizer: "sgd", "adam" or "sign": what plain torch groups can carry. Matrix maps need `compiler.compile`.

    Returns:
        The path.

    Raises:
        UnknownName: for another optimizer.
        NotExpressible: if the blocks of a weight need different learning rates, or a part of it has no slice.
    """
    plain = [name for name, recipe in OPTIMIZERS.items() if recipe.map is None]
    if optimizer not in plain:
        raise UnknownName("optimizer of a plain file", optimizer, plain)
    rules: dict[str, list[str]] = {}
    for rule in table:
        rules.setdefault(_fields(rule, optimizer), []).append(rule.name)
    head, body = (HEAD, BODY) if table.residual is None else (_deep(HEAD), _deep(BODY))
    text = head.format(model=table.model or "a model", size=table.size, usage=USAGE[optimizer])
    text += "RULES = [\n" + "".join(_entry(names, fields) for fields, names in rules.items()) + "]\n\n"
    text += "MULTIPLIERS = [\n" + "".join(f"    {line},\n" for line in _multipliers(table)) + "]\n" + body
    text = text if table.residual is None else text.replace("lambda d:", "lambda d, L:")
    out = Path(path)
    out.write_text(text, encoding="utf-8")
    return out


def _deep(text: str) -> str:
    """The file's fixed part with the depth L next to the width d."""
    pairs = {
        "Width scaling": "Width and depth scaling",
        "a new model of width d,": "a new model of width d and depth L,",
        "model, d": "model, d, L",
        "(d)": "(d, L)",
        "(base)": "(*base)",
        "base=256": "base=(256, 8)",
        "at width 256": "at width 256 and depth 8",
    }
    for old, new in pairs.items():
        text = text.replace(old, new)
    return text


def _entry(names: list[str], fields: str) -> str:
    lines = "".join(f'            "{name}",\n' for name in names)
    return f'    {{\n        "names": [\n{lines}        ],\n{fields}    }},\n'


def _fields(rule: WeightRule, optimizer: str) -> str:
    """The entries of one rule; equal text is one rule."""
    lines = {"lr": _function([block.lr[OPTIMIZERS[optimizer].family] for block in rule.blocks], rule, "learning rates")}
    if optimizer == "adam":
        lines["eps"] = _function([block.eps for block in rule.blocks], rule, "values of Adam's ε")
    lines["init"] = "lambda d: [" + ", ".join(_init(rule)) + "]"
    lines["vector"] = str(all(_vector(block) for block in rule.blocks))
    lines["embedding"] = str(_embedding(rule))
    return "".join(f'        "{key}": {value},\n' for key, value in lines.items())


def _function(values: Iterable[sympy.Expr], rule: WeightRule, what: str) -> str:
    first, *others = dict.fromkeys(values)
    if others:
        raise NotExpressible(
            rule.name, f"has blocks that need different {what}", "use compiler.compile, whose optimizer steps every block for itself"
        )
    return f"lambda d: {_code(first)}"


def _init(rule: WeightRule) -> list[str]:
    parts = {(_code(block.init_std), _code(block.gain)) for block in rule.blocks}
    if len(parts) == 1:
        std, gain = parts.pop()
        return [f"((), {std}, {gain})"]
    out = []
    for block in rule.blocks:
        slices: Slices = block.slices
        if slices is None:
            raise NotExpressible(rule.name, "has interleaved blocks of different initial size", "use compiler.init_")
        index = ", ".join(f"slice({_index(s.start)}, {_index(s.stop)})" for s in slices)
        out.append(f"(({index},), {_code(block.init_std)}, {_code(block.gain)})")
    return out


def _vector(block: Block) -> bool:
    return block.fan_in == 1 and not block.lookup


def _embedding(rule: WeightRule) -> tuple[int, ...]:
    """The axes of a looked-up row, over which a row of padding is all zero."""
    if not all(block.lookup for block in rule.blocks):
        return ()
    return tuple(i for i, axis in enumerate(rule.blocks[0].axes) if all(factor.part != "lookup" for factor in axis))


def _multipliers(table: ScalingTable) -> list[str]:
    lines = {}
    for rule in table:
        for use in rule.uses:
            if use.multiplier != 1:
                side = "output" if use.lookup else "input"
                lines[use.source.module] = f'("{use.source.module}", lambda d: {_code(use.multiplier)}, "{side}")'
    for branch in table.residual.branches if table.residual is not None else ():
        if branch.forward != 1 and not branch.at:
            why = f"is in a residual branch that needs the forward multiplier {branch.forward}, and no module of its own ends it"
            raise NotExpressible(branch.weights[-1], why, f"multiply it by hand there\n  at {branch.source}")
        if branch.forward != 1:
            lines[branch.at] = f'("{branch.at}", lambda d: {_code(branch.forward)}, "output")'
    return list(lines.values())


def _index(expression: sympy.Expr) -> str:
    """Code that makes an int of an int d."""
    code = _code(expression)
    return f"round({code})" if "/" in code else code


def _code(expression: sympy.Expr) -> str:
    return str(sympy.pycode(expression, fully_qualified_modules=False))
