"""What is right, from shapes at several widths and the types of modules alone: nothing here knows of `scaling`."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import nn

Shapes = tuple[tuple[int, ...], ...]
"""A weight's shape at each width."""

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Exponents:
    """Powers of d. `muon` is None for vectors, which no matrix map is applied to."""

    init_std: Fraction
    sgd: Fraction
    adam: Fraction
    muon: Fraction | None


def growth(sizes: Sequence[int]) -> Fraction | None:
    """The power of d that an axis follows: 0 if it has one length at every width, 2 if it is that, else 1 (also c·d + 64).

    None where it falls: 2, 1, 2 heads follow nothing, so that nothing can be said to be right.
    """
    if any(b < a for a, b in pairwise(sizes)):
        return None
    if sizes[-1] == sizes[0]:
        return Fraction(0)
    first, last = sizes[0], sizes[-1]
    multiple = len(sizes)  # the widths are 1, 2, 3 times the first
    if last == first * multiple**2:
        return Fraction(2)
    return Fraction(1)


def follows_a_law(sizes: Sequence[int]) -> bool:
    """Whether the lengths are affine or a square: 8, 8, 16 are rounded, and no law is exact."""
    steps = {b - a for a, b in pairwise(sizes)}
    return growth(sizes) is not None and (len(steps) == 1 or growth(sizes) == 2)


def shapes(models: Sequence[nn.Module]) -> dict[str, Shapes]:
    """The trainable weights that are at every width."""
    tables = [dict(model.named_parameters(remove_duplicate=False)) for model in models]
    return {
        name: tuple(tuple(table[name].shape) for table in tables)
        for name, weight in tables[0].items()
        if weight.requires_grad and all(name in table and table[name].dim() == weight.dim() for table in tables)
    }


def spectral(fan_in: Fraction, fan_out: Fraction) -> Exponents:
    """‖W‖₂ and ‖ΔW‖₂ at √(fan_out/fan_in): σ, and the learning rates of SGD, Adam and msign."""
    return Exponents(
        init_std=-fan_in / 2 + min(Fraction(0), (fan_out - fan_in) / 2) if fan_in else Fraction(0),
        sgd=fan_out - fan_in,
        adam=-fan_in,
        muon=(fan_out - fan_in) / 2,
    )


def vector(length: Fraction) -> Exponents:
    """A gain or a bias."""
    return Exponents(init_std=Fraction(0), sgd=length, adam=Fraction(0), muon=None)


def expected(models: Sequence[nn.Module]) -> dict[str, Exponents]:
    """The exponents of every weight whose module's type says how it is used, under each of its names."""
    out: dict[str, Exponents] = {}
    everything = shapes(models)
    every = [dict(model.named_modules()) for model in models]
    for path, module in every[0].items():
        for short, weight in module.named_parameters(recurse=False):
            name = f"{path}.{short}" if path else short
            if name not in everything:
                continue
            laws = [growth(sizes) for sizes in zip(*everything[name], strict=True)]
            groups = growth([getattr(modules.get(path), "groups", 1) for modules in every])
            axes = [law for law in laws if law is not None]
            if len(axes) < len(laws) or groups is None:
                continue
            found = _of_module(module, short, weight, axes, groups)
            if found is not None:
                out[name] = found
    return out


def _of_module(module: nn.Module, name: str, weight: torch.Tensor, axes: list[Fraction], groups: Fraction) -> Exponents | None:
    kind = type(module).__name__
    if name == "bias" and weight.dim() == 1:
        return vector(axes[0])
    if name == "weight" and weight.dim() == 1 and (isinstance(module, NORMS) or kind.endswith("Norm")):
        return vector(axes[0])
    if name == "weight" and type(module).forward is nn.Linear.forward:
        return spectral(axes[1], axes[0])
    if name == "weight" and kind == "Conv1D":  # GPT-2's: (in, out)
        return spectral(axes[0], axes[1])
    if name == "weight" and isinstance(module, nn.Embedding):
        return spectral(Fraction(0), axes[1])
    if name == "weight" and isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return _convolution(module, axes, groups)
    if "Experts" in kind and weight.dim() == 3 and axes[1] == axes[2]:
        return spectral(axes[1], axes[2])
    return None


def _convolution(module: nn.Module, axes: list[Fraction], groups: Fraction) -> Exponents:
    """`groups` maps, each of (in/groups)·taps to out/groups; SGD sees the copies too."""
    if isinstance(module, TRANSPOSED):
        fan_in, fan_out = axes[0] - groups, axes[1]
    else:
        fan_in, fan_out = axes[1], axes[0] - groups
    one = spectral(fan_in, fan_out)
    return Exponents(init_std=one.init_std, sgd=one.sgd + groups, adam=one.adam, muon=one.muon)
