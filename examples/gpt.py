"""A small GPT and a text to train it on, as a user would write them: nothing here knows of this project.

The model follows nanoGPT (Karpathy 2022, github.com/karpathy/nanoGPT, model.py): pre-norm blocks, fused c_attn, learned positions; the
initialisation is torch's own. The text is the source of Python's standard library.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CHARACTERS", "GPT", "batches", "text"]

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""The vocabulary: newline and the 95 printable ASCII characters."""


class Attention(nn.Module):
    """Causal self-attention over `heads` heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> (batch, time, width)."""
        batch, time, width = x.shape
        q, k, v = (part.view(batch, time, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> (batch, time, width)."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> (batch, time, width)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer. Tokens (batch, time), int64 -> logits (batch, time, vocabulary).

    Args:
        width: the residual stream's width.
        layers: number of blocks.
        context: longest sequence.
        vocabulary: number of tokens.
        head_dim: width of one head; the number of heads grows with `width`.
        heads: number of heads; `head_dim` is then `width // heads` and grows with `width`.
        tie: whether the output layer shares the token embedding's weight.
    """

    def __init__(
        self,
        width: int,
        *,
        layers: int = 2,
        context: int = 64,
        vocabulary: int = len(CHARACTERS),
        head_dim: int = 16,
        heads: int | None = None,
        tie: bool = False,
    ) -> None:
        super().__init__()
        heads = heads or width // head_dim
        if width % heads:
            message = f"width {width} is not a multiple of {heads} heads"
            raise ValueError(message)
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tie:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time), int64 -> (batch, time, vocabulary)."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


@cache
def text() -> Tensor:
    """The standard library's top-level modules as indices into CHARACTERS: (characters,), int64. Other characters are left out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    index = {character: i for i, character in enumerate(CHARACTERS)}
    return torch.tensor([index[character] for character in code if character in index])


def batches(count: int, *, batch: int = 16, context: int = 64, seed: int = 0, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """`count` random batches of the text: (tokens, next tokens), each (batch, context), int64. The same for the same seed."""
    data = text()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - context - 1, (count, batch, 1), generator=generator)
    windows = data[starts + torch.arange(context + 1)].to(device)
    return [(window[:, :-1].contiguous(), window[:, 1:].contiguous()) for window in windows]
