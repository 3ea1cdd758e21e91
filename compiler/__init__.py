"""Carries a scaling table out: initial weights, forward multipliers, one optimizer, in torch."""

from compiler.clip import clip_grad_norm_
from compiler.compile import compile
from compiler.emit import emit
from compiler.model import init_
from compiler.msign import msign
from compiler.norms import spectral_norm, spectral_normalize, svc
from compiler.optimizer import SpectralOptimizer
from compiler.param_groups import param_groups

__all__ = [
    "SpectralOptimizer",
    "clip_grad_norm_",
    "compile",
    "emit",
    "init_",
    "msign",
    "param_groups",
    "spectral_norm",
    "spectral_normalize",
    "svc",
]
