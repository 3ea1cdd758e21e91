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
    r"(en|de)coder_(hidden_size|hidden_dim|ffn_dim|dim|intermediate_size|feedforward_dim|in_channels)"
    r"|((linear|moe|shared|shared_expert|moe_shared|moe_shared_expert|dense|expert|mlp|ffn|dense_ffn|fusion|projector|mm|pooler|text|out|output"
    r"|latent|attention|fpn|neck|rnn|image_text|reassemble|decoder_mlp)_)?(hidden|intermediate)_sizes?(_mlp|_per_layer_input)?"
    r"|d_model|n_embd|dim|dims|(embed|emb|hidden|ffn|mlp|model|proj|projection|conv|codebook|text_embed|backbone_channel)_(dim|dims|list)"
    r"|word_embed_proj_dim|embedding_(size|dim)|embed_size|n_inner|d_ff|d_inner|d_embed|dim_feedforward|ffn_hidden_size|lru_width|num_filters"
    r"|pooler_output_size|output_channels|decoder_channels|stem_(hidden_)?channels|classifier_proj_size|upsample_initial_channel|tdnn_dim"
    r"|xvector_output_dim|vector_quantization_hidden_dimension|mask_feature_size|feature_size_hidden|q_lora_rank|kv_lora_rank|mamba_dt_rank"
    r"|time_step_rank|neck_hidden_sizes|decoder_hidden_size"
)
HEAD_FIELDS = re.compile(
    r"((en|de)coder_|swa_|index_)?(num_)?(attention_heads|heads)|n_heads?|num_attention_head|((en|de)coder_)?num_(attention|key_value|kv)_heads?"
    r"|n_head_kv|swa_num_(attention|key_value)_heads|index_n_heads|mamba_(n|num)_heads|linear_num_(key_|value_)?heads|(en|de)coder_num_heads"
    r"|(en|de)coder_num_(attention|key_value)_heads|multi_query_group_num"
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
