"""bf16 weights kept to fp32 precision: the 16 bits that rounding left out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LOW", "join", "split"]

LOW = "low_bits"
"""The state they are kept in."""


def join(W: Tensor, low: Tensor) -> Tensor:
    """fp32 from its rounding to bf16 and the 16 bits that rounding left out, as `split` makes them.

    Where the weight has been written by others since, the bits are still worth less than half a unit in its last place.
    """
    bits = W.view(torch.int16).to(torch.int32)
    magnitude = (((bits & 0x7FFF) << 16) + low).clamp(min=0)  # the bits of an older weight must not carry a zero below zero
    return (magnitude | ((bits >> 15) << 31)).view(torch.float32)


def split(W: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bf16 and the rest of the bits of fp32, as int16."""
    bits = W.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)
