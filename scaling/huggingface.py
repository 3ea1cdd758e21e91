"""A Hugging Face model at another width: its own config with every width and head count doubled, rebuilt on the meta device.

Config fields are Hugging Face's documented interface; head_dim, vocabularies, positions, kernels and ranks that are not listed stay.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

__all__ = ["at_twice_the_width"]

WIDTH_FIELDS = re.compile(
    r"hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|hidden_dim|n_inner|intermediate_size|ffn_dim|d_ff|d_inner|ffn_hidden_size"
    r"|(en|de)coder_ffn_dim|moe_intermediate_size|shared_(expert_)?intermediate_size|(en|de)coder_hidden_size|mlp_dim|dim_feedforward"
    r"|embedding_size|embedding_dim|word_embed_proj_dim|hidden_sizes|embed_dims|out_hidden_size|lru_width|pooler_hidden_size"
)
HEAD_FIELDS = re.compile(
    r"num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads|attention_heads|num_key_value_heads|num_kv_heads|n_head_kv"
    r"|mamba_n_heads|linear_num_(key|value)_heads"
)


def at_twice_the_width(model: nn.Module) -> nn.Module | None:
    """The model's class built from its scaled config, on the meta device; None if it has no config or cannot be built."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or not hasattr(model, "main_input_name"):
        return None
    scaled = _scaled(config)
    try:
        with torch.device("meta"):
            twin = type(model)(scaled)
    except Exception:  # whatever a config validator raises: then it cannot be known this way
        return None
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    return twin if ours.keys() == theirs.keys() else None


def _scaled(config: Any) -> Any:
    out = copy.deepcopy(config)
    for name, value in list(vars(out).items()):
        if hasattr(value, "to_dict"):
            setattr(out, name, _scaled(value))
        elif WIDTH_FIELDS.fullmatch(name) or HEAD_FIELDS.fullmatch(name):
            if isinstance(value, int) and not isinstance(value, bool):
                setattr(out, name, 2 * value)
            elif isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
                setattr(out, name, type(value)(2 * v for v in value))
    return out
