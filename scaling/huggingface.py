"""What the interface of a Hugging Face model tells: itself at another width, and inputs on which it runs.

The names of config fields and of forward's parameters are Hugging Face's documented interface. At twice the width every width and head
count is doubled; head_dim, vocabularies, positions, kernels, the dimension that two towers are projected to and ranks that are not listed
stay.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["at_twice_the_width", "calls", "completed"]

BATCH, LENGTH = 2, 8

WIDTH_FIELDS = re.compile(
    r"(en|de)coder_(hidden_size|hidden_dim|ffn_dim|dim|intermediate_size|feedforward_dim|in_channels)"
    r"|((linear|moe|shared|shared_expert|moe_shared|moe_shared_expert|dense|expert|mlp|ffn|dense_ffn|fusion|projector|mm|pooler|text|out|output"
    r"|latent|attention|cross_attention|fpn|neck|rnn|reassemble|decoder_mlp|merged)_)?(hidden|intermediate)_sizes?(_mlp|_per_layer_input)?"
    r"|d_model|n_embd|dim|dims|(embed|emb|hidden|ffn|mlp|model|conv|text_embed|backbone_channel)_(dim|dims|list|dim_per_stage)"
    r"|word_embed_proj_dim|embedding_(size|dim)|embed_size|n_inner|d_ff|d_inner|d_embed|dim_feedforward|ffn_hidden_size|lru_width|num_filters"
    r"|stem_channels|stage_(in|mid|out)_channels|pooler_output_size|projection_size|(coordinate|shape)_size|decoder_channels|stem_hidden_channels|vector_quantization_hidden_dimension|mask_feature_size|feature_size_hidden|q_lora_rank|kv_lora_rank|mamba_dt_rank"
    r"|time_step_rank|neck_hidden_sizes|decoder_hidden_size"
)
HEAD_FIELDS = re.compile(
    r"((en|de)coder_|swa_|index_)?(num_)?(attention_heads|heads)(_per_stage)?|n_heads?|num_attention_head|((en|de)coder_)?num_(attention|key_value|kv)_heads?"
    r"|n_head_kv|swa_num_(attention|key_value)_heads|index_n_heads|mamba_(n|num)_heads|linear_num_(key_|value_)?heads|(en|de)coder_num_heads"
    r"|(en|de)coder_num_(attention|key_value)_heads|multi_query_group_num"
)

SIZE_FIELDS = re.compile(r"(?!.*(head|kernel|patch|image|vocab|window|stride|position))\w+_(dim|size|channels|features|width)")


def at_twice_the_width(model: nn.Module, *, alike: bool = False) -> nn.Module | None:
    """The model's class built from its scaled config, on the meta device; None if it has no config or cannot be built.

    With `alike`, sizes of any other name that are as long as a width are doubled with it (a descriptor's, which is the stream's).
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or not hasattr(model, "main_input_name"):
        return None
    scaled = _scaled(config, _widths(config) if alike else frozenset())
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            twin = type(model)(scaled)
    except Exception:  # whatever a config validator raises: then it cannot be known this way
        return None
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    if ours.keys() != theirs.keys():
        return None
    modules = dict(model.named_modules())
    for path, module in twin.named_modules():  # a forward may differ between training and evaluation
        module.training = modules[path].training if path in modules else model.training
    _take_numbers(twin, model)
    return twin


def _take_numbers(twin: nn.Module, model: nn.Module) -> None:
    """Gives whole numbers that the forward computes shapes with (a codec's padding) their values, which the meta device does not keep."""
    ours = dict(model.named_buffers())
    for path, module in twin.named_modules():
        for short, buffer in module.named_buffers(recurse=False):
            own = ours.get(f"{path}.{short}" if path else short)
            if buffer.is_meta and not buffer.is_floating_point() and own is not None and own.shape == buffer.shape and not own.is_meta:
                module._buffers[short] = own.detach().clone()


def _scaled(config: Any, alike: frozenset[int]) -> Any:
    out = copy.deepcopy(config)
    doubled = {name: twice for name, value in vars(config).items() if (twice := _doubled(name, value, alike)) is not value}
    for name, value in (_derived(config, doubled) | doubled).items():
        setattr(out, name, value)
    return out


def _doubled(name: str, value: Any, alike: frozenset[int]) -> Any:
    """The field's value at twice the width: the same object if it is no width."""
    if hasattr(value, "to_dict"):
        return _scaled(value, alike)
    if not (
        WIDTH_FIELDS.fullmatch(name)
        or HEAD_FIELDS.fullmatch(name)
        or (isinstance(value, int) and value in alike and SIZE_FIELDS.fullmatch(name))
    ):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return 2 * value if value > 1 else value  # one key for all heads stays one
    if name == "stem_channels" and isinstance(value, (list, tuple)):  # from the image's
        return type(value)((*value[:1], *(2 * v for v in value[1:])))
    return type(value)(2 * v for v in value) if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value) else value


def _widths(config: Any) -> frozenset[int]:
    """The lengths of the fields that are widths by their names, and of their entries."""
    named = (value for each in _configs(config) for name, value in vars(each).items() if WIDTH_FIELDS.fullmatch(name))
    sizes = (size for value in named for size in (value if isinstance(value, (list, tuple)) else [value]))
    return frozenset(size for size in sizes if isinstance(size, int) and size > 1)


def _derived(config: Any, doubled: dict[str, Any]) -> dict[str, Any]:
    """What the config's constructor computes from other fields, where it is still what the constructor made it."""
    parameters = inspect.signature(type(config)).parameters
    takes = [name for name in parameters if name in vars(config)]
    left_out = {name for name in takes if parameters[name].default in (None, "auto") and _is_size(vars(config)[name])}
    try:
        given = {name: value for name, value in vars(config).items() if name not in left_out}
        computed = {name for name, value in vars(_built(config, takes, given)).items() if value == vars(config).get(name)}
        takes = [name for name in takes if name not in left_out & computed]
        before, after = (_built(config, takes, of) for of in (vars(config), vars(config) | doubled))
    except Exception:  # whatever a config validator raises
        return {}
    made = {name: value for name, value in vars(after).items() if name not in takes and isinstance(value, (int, float, list, tuple, dict))}
    return {name: value for name, value in made.items() if vars(before).get(name) == vars(config).get(name) != value}


def _is_size(value: Any) -> bool:
    return all(isinstance(item, (int, float)) for item in (value if isinstance(value, (list, tuple)) else [value]))


def _built(config: Any, takes: list[str], fields: dict[str, Any]) -> Any:
    """A config of these fields; copies, as a constructor writes into the sub-configs it is given."""
    return type(config)(**copy.deepcopy({name: fields[name] for name in takes if name in fields}))


# what its forward takes


def calls(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword inputs by the names of the forward's parameters and the config's sizes, the fullest call first."""
    main, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if main is None or config is None:
        return
    sizes, names = _Sizes(config), inspect.signature(model.forward).parameters
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    documented = {name: _as_documented(name, *said, sizes) for name, said in _documented(model).items()}
    required = {name: value for name, value in documented.items() if names[name].default is inspect.Parameter.empty}
    asked = {name: value for name, value in documented.items() if name == main}
    for guess in (*_fullest_first(main, list(names), sizes), asked):
        if call := required | guess:
            yield call | more


def _fullest_first(main: str, names: list[str], sizes: _Sizes) -> Iterator[dict[str, Tensor]]:
    decoder = {"decoder_input_ids": sizes.ids(LENGTH - 1)} if "decoder_input_ids" in names else {}
    for group in (calls for function in GROUPS for calls in [list(function(names, sizes))] if calls):
        for call in group:
            yield {"input_ids": sizes.ids()} | call if main == "input_ids" and "input_ids" in names else call
    present = [name for name in MODALITIES if name in names]
    main = main if main in present else next(iter(present), main)
    cross = sizes.cross_attention and "encoder_hidden_states" in names and not decoder
    encoded = {"encoder_hidden_states": torch.zeros(BATCH, LENGTH + 1, sizes.hidden)} if cross else {}
    sounds = [name for name in ("input_values", "input_features") if main == "inputs" and name in present]  # of whichever encoder it is
    for name in (main, *sounds):
        for value in MODALITIES[name](sizes) if name in MODALITIES else ():
            for others in (*_beside(name, names, sizes), {}):
                for extra in (others | encoded, others) if encoded else (others,):
                    for tokens in (decoder, {}):
                        yield {name: value, **extra, **tokens}


def _beside(main: str, names: list[str], sizes: _Sizes) -> Iterator[dict[str, Tensor]]:
    """The other modalities that the forward takes, one kind of sound after the other."""
    others = {name: next(MODALITIES[name](sizes)) for name in ("input_ids", "pixel_values") if name in names and name != main}
    if "bbox" in names:
        others["bbox"] = torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)
    if "input_features" in names and main != "input_features":
        for features in islice(_spectra(sizes), 2):
            frames = torch.ones(BATCH, 3000 if 3000 in features.shape else 100, dtype=torch.long)
            masks = {name: frames for name in ("input_features_mask", "feature_attention_mask") if name in names}
            yield others | {"input_features": features} | masks
    if "input_values" in names and main == "input_ids":
        yield from (others | {"input_values": wave} for wave in islice(_waves(sizes), 2))
    yield others
    if "pixel_values" in others:
        for images in islice(_images(sizes), 1, None):
            yield others | {"pixel_values": images}


@dataclass(frozen=True)
class _Sizes:
    """The config's sizes, looked for in its sub-configs too."""

    config: Any

    def first(self, names: str, default: Any) -> Any:
        """The first of these fields that is set, here or below."""
        found = (value for config in _configs(self.config) for name in names.split() if (value := getattr(config, name, None)) is not None)
        return next((value for value in found if not hasattr(value, "to_dict")), default)

    def number(self, names: str, default: int) -> int:
        """The same of a size, the last of several."""
        size = self.first(names, default)
        return size if isinstance(size, int) else next(iter(reversed(size)), default) if isinstance(size, (list, tuple)) else default

    def ids(self, length: int = LENGTH) -> Tensor:
        """Token ids, small and different."""
        return (torch.arange(BATCH * length) % 3 + 1).reshape(BATCH, length)

    @property
    def hidden(self) -> int:
        """The width of the stream."""
        return self.number("hidden_size d_model n_embd dim embed_dim", 64)

    @property
    def cross_attention(self) -> bool:
        """Whether it is a decoder that reads an encoder's output."""
        return bool(self.first("add_cross_attention", default=False) or self.first("is_decoder", default=False))

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.number("num_channels in_chans in_channels", 3)

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of an image."""
        size = self.first("image_size img_size input_size max_img_size", 224)
        height, width = tuple(size)[-2:] if isinstance(size, (tuple, list)) else (size, size)
        return height, width

    @property
    def mels(self) -> tuple[int, ...]:
        """Features of a frame of sound, the likeliest first."""
        own = self.first("num_mel_bins feature_projection_input_dim input_feat_per_channel n_mels input_dim", 80)
        return tuple(dict.fromkeys((own, 80, 128, 160))) if isinstance(own, int) else (80, 128, 160)


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        below = getattr(config, name, None)
        if hasattr(below, "to_dict"):
            yield from _configs(below)


def _texts(sizes: _Sizes) -> Iterator[Tensor]:
    yield sizes.ids()
    codes = sizes.first("num_codebooks num_quantizers", None)  # of a sound, with or without the text's
    if isinstance(codes, int):
        yield from (sizes.ids().unsqueeze(-1).repeat(1, 1, n) for n in (codes, codes + 1))


def _images(sizes: _Sizes) -> Iterator[Tensor]:
    for height, width in dict.fromkeys((sizes.image, (224, 224), (64, 64), (672, 672))):
        yield torch.zeros(BATCH, sizes.channels, height, width)
    height, width = sizes.image
    frames = sizes.first("num_frames frames_per_clip", 8)
    yield torch.zeros(BATCH, frames, sizes.channels, height, width)
    yield torch.zeros(BATCH, sizes.channels, frames, height, width)
    yield torch.zeros(BATCH, 2, sizes.channels, height, width)
    yield torch.zeros(BATCH, 2, 1, 224, 224)


def _videos(sizes: _Sizes) -> Iterator[Tensor]:
    height, width = sizes.image
    for frames, size in ((sizes.first("num_frames frames_per_clip", 8), (height, width)), (sizes.first("frames_per_clip", 16), (256, 256))):
        yield torch.zeros(1, frames, sizes.channels, *size)


def _waves(sizes: _Sizes) -> Iterator[Tensor]:
    yield torch.zeros(BATCH, 16000)
    yield torch.zeros(BATCH, 1, 16000)
    yield torch.zeros(BATCH, sizes.first("max_length", 1024), sizes.mels[0])
    yield torch.zeros(BATCH, 1, 24000)


def _spectra(sizes: _Sizes) -> Iterator[Tensor]:
    for mels in sizes.mels:
        yield torch.zeros(BATCH, mels, 3000)
        yield torch.zeros(BATCH, 100, mels)
    yield torch.zeros(BATCH, sizes.mels[0], 100)
    yield torch.zeros(BATCH, 1, 1001, 64)


def _series(sizes: _Sizes) -> Iterator[Tensor]:
    length, channels = sizes.first("context_length", 32), sizes.first("num_input_channels input_size", 1)
    yield torch.zeros(BATCH, length, channels)
    yield torch.zeros(BATCH, length)


def _embeddings(sizes: _Sizes) -> Iterator[Tensor]:
    yield torch.zeros(BATCH, LENGTH, sizes.hidden)
    for name in ("input_size", "vae_hidden_size", "codebook_dim", "latent_size"):
        size = sizes.first(name, None)
        if isinstance(size, int):
            yield torch.zeros(BATCH, LENGTH, size)


def _any(sizes: _Sizes) -> Iterator[Tensor]:
    yield sizes.ids()
    yield from _embeddings(sizes)


MODALITIES: dict[str, Callable[[_Sizes], Iterator[Tensor]]] = {
    "input_ids": _texts,
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "input_values": _waves,
    "input_features": _spectra,
    "audio_values": lambda sizes: iter((torch.zeros(BATCH, 1, 128, 128),)),
    "spectrogram": lambda sizes: iter((torch.zeros(BATCH, 50, sizes.first("model_in_dim", sizes.mels[0])),)),
    "past_values": _series,
    "inputs": _any,
    "inputs_embeds": _embeddings,
    "hidden_states": _embeddings,
    "query_embeds": _embeddings,
    "flattened_patches": lambda sizes: iter((torch.zeros(BATCH, 64, 2 + sizes.channels * sizes.number("patch_size", 16) ** 2),)),
}
"""What inputs of these names are in Hugging Face's models, in the order of preference where a model does not say which is the main one."""


def _packed_patches(names: list[str], sizes: _Sizes) -> Iterator[dict[str, Tensor]]:
    """Patches of images of any size in one row, and the grids they come from."""
    grid = next((name for name in ("grid_thw", "image_grid_thw", "grid_hw", "image_grid_hws") if name in names), None)
    values = next((name for name in ("pixel_values", "hidden_states") if name in names), None)
    if grid is None or values is None:
        return
    patch, frames = sizes.number("patch_size", 14), sizes.number("temporal_patch_size", 2)
    for area in dict.fromkeys((sizes.channels * patch**2 * frames, sizes.channels * patch**2)):
        for of in ((1, 8, 8), (8, 8)):
            yield {values: torch.zeros(BATCH * 64, area), grid: torch.tensor([of] * BATCH)}
    yield {values: torch.zeros(BATCH * 64, sizes.channels, patch, patch), grid: torch.tensor([[8, 8]] * BATCH)}
    yield {values: torch.zeros(BATCH, 64, sizes.channels * patch**2 * frames), grid: torch.tensor([[1, 8, 8]] * BATCH)}
    side = patch * sizes.number("spatial_merge_size", 2)
    yield {values: torch.zeros(BATCH * 64, side, side, sizes.channels), grid: torch.tensor([[1, 8, 8]] * BATCH)}


def _padded_patches(names: list[str], sizes: _Sizes) -> Iterator[dict[str, Tensor]]:
    """Patches of images, padded to one length."""
    if {"pixel_values", "spatial_shapes"} <= set(names):
        patches = torch.zeros(1, 64, sizes.channels * sizes.number("patch_size", 16) ** 2)
        for mask in (name for name in ("pixel_attention_mask", "attention_mask") if name in names):
            yield {"pixel_values": patches, "spatial_shapes": torch.tensor([[8, 8]]), mask: torch.ones(1, 64, dtype=torch.long)}


def _placed_patches(names: list[str], sizes: _Sizes) -> Iterator[dict[str, Tensor]]:
    """Patches of images in one row, and where in the image each is, or how many there are of either side."""
    patch = sizes.number("patch_size", 16)
    at = torch.arange(144)
    for places in (name for name in ("pixel_position_ids", "image_position_ids") if name in names and "pixel_values" in names):
        yield {"pixel_values": torch.zeros(1, 144, 3 * patch**2), places: torch.stack([at % 12, at // 12], -1).unsqueeze(0)}
    if {"pixel_values", "target_sizes"} <= set(names):
        yield {"pixel_values": torch.zeros(1, sizes.channels, patch, 64 * patch), "target_sizes": torch.tensor([[8, 8]])}


def _images_in_text(names: list[str], sizes: _Sizes) -> Iterator[dict[str, Tensor]]:
    """A text with places for the features of an image, of which there are always as many."""
    values = next((name for name in ("pixel_values", "flattened_patches") if name in names), None)
    if values is not None and {"input_ids", "image_embeds_position_mask"} <= set(names):
        latents = sizes.first("latent_query_num", 64)
        ids = sizes.ids(latents + LENGTH)
        places = (torch.arange(latents + LENGTH) < latents).long().expand(BATCH, -1)
        yield {values: next(MODALITIES[values](sizes)), "input_ids": ids, "image_embeds_position_mask": places}


def _prompted(names: list[str], sizes: _Sizes) -> Iterator[dict[str, Tensor]]:
    """An image below another one, of which the mask is given: together as high as the model's image."""
    if {"prompt_pixel_values", "prompt_masks"} <= set(names):
        height, width = sizes.image
        yield dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks"), torch.zeros(BATCH, sizes.channels, height // 2, width))


def _regions(names: list[str], sizes: _Sizes) -> Iterator[dict[str, Tensor]]:
    """Features of regions of an image, with their boxes."""
    if {"visual_feats", "visual_pos"} <= set(names):
        feats, boxes = sizes.first("visual_feat_dim", 2048), sizes.first("visual_pos_dim", 4)
        yield {"visual_feats": torch.zeros(BATCH, 10, feats), "visual_pos": torch.zeros(BATCH, 10, boxes)}


def _entities(names: list[str], sizes: _Sizes) -> Iterator[dict[str, Tensor]]:
    """Spans of the text that name an entity."""
    del sizes
    if "entity_ids" in names:
        ids, places = torch.ones(BATCH, 4, dtype=torch.long), torch.zeros(BATCH, 4, 5, dtype=torch.long)
        yield {"entity_ids": ids, "entity_position_ids": places, "entity_attention_mask": ids, "entity_token_type_ids": 0 * ids}


def _trajectory(names: list[str], sizes: _Sizes) -> Iterator[dict[str, Tensor]]:
    """States, actions and rewards."""
    if {"states", "actions", "returns_to_go"} <= set(names):
        widths = {"states": sizes.first("state_dim", 17), "actions": sizes.first("act_dim", 4), "rewards": 1, "returns_to_go": 1}
        steps = {"timesteps": torch.zeros(BATCH, 5, dtype=torch.long), "attention_mask": torch.ones(BATCH, 5)}
        yield {name: torch.zeros(BATCH, 5, width) for name, width in widths.items()} | steps


def _forecast(names: list[str], sizes: _Sizes) -> Iterator[dict[str, Tensor]]:
    """A past with its covariates, and the future that training knows."""
    if "freq" in names:
        yield {"past_values": torch.zeros(BATCH, 512), "freq": torch.zeros(BATCH, 1, dtype=torch.long)}
    if not {"past_values", "past_time_features"} <= set(names):
        return
    length = sizes.first("context_length prediction_length", 32) + max(sizes.first("lags_sequence", None) or [0])
    ahead, channels = sizes.first("prediction_length", 8), sizes.first("input_size", 1)
    for features in (sizes.first("num_time_features", 0), sizes.first("num_time_features", 0) + 1):
        past, future = ((BATCH, n) if channels == 1 else (BATCH, n, channels) for n in (length, ahead))
        yield {
            "past_values": torch.zeros(past),
            "past_time_features": torch.zeros(BATCH, length, features),
            "past_observed_mask": torch.ones(past),
            "future_values": torch.zeros(future),
            "future_time_features": torch.zeros(BATCH, ahead, features),
        }


GROUPS = (_packed_patches, _padded_patches, _placed_patches, _images_in_text, _prompted, _regions, _entities, _trajectory, _forecast)
"""Inputs that go together."""


# what its docstring says

DOCUMENTED = re.compile(r"^\s*(\w+) \((`[^\n]*?) of shape `?\(([^`()\n]*)\)", re.MULTILINE)
"""`patches (torch.Tensor of shape (batch_size, num_patches, 2))`, in the form that transformers checks in its docstrings."""
ALTERNATIVES = re.compile(r".*(labels|inputs_embeds|attention_mask|head_mask|encoder_outputs|cache|grid_\w+|(?<!pixel_)position_ids)")
"""Inputs that a forward makes itself where they are left out, or takes in place of others; and grids, which must fit their patches."""


def _documented(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The type and the shape that the docstring gives for an input."""
    names = inspect.signature(model.forward).parameters
    found = {name: (kind, shape) for name, kind, shape in reversed(DOCUMENTED.findall(inspect.getdoc(model.forward) or ""))}
    return {name: found[name] for name in names if name in found}


def _as_documented(name: str, kind: str, shape: str, sizes: _Sizes) -> Tensor:
    """A tensor of that shape: its words are the config's fields, or a batch, or some length."""
    words = [word for word in re.split(", *", shape) if word]
    dims = [_length(word, last=at == len(words) - 1, sizes=sizes) for at, word in enumerate(words)]
    if "channels" not in shape and "mask" in name:
        return torch.ones(dims, dtype=torch.bool if "Bool" in kind else torch.long)
    if name.endswith("image_sizes"):
        return torch.tensor(sizes.image).expand(dims)
    if name.endswith("input_ids"):
        return (torch.arange(torch.Size(dims).numel()) % 3 + 1).reshape(dims)
    integer = re.search("Long|Int", kind) or re.search("_(ids|idx|sizes|lengths|lens)$", name)
    return torch.zeros(dims, dtype=torch.bool if "Bool" in kind else torch.long if integer else torch.float32)


def _length(words: str, *, last: bool, sizes: _Sizes) -> int:
    return sum(math.prod(_size(word.strip(), last=last, sizes=sizes) for word in re.split(r"\*| x ", term)) for term in words.split("+"))


def _size(word: str, *, last: bool, sizes: _Sizes) -> int:
    word = word.removeprefix("config.")
    if word.isdigit():
        return int(word)
    if re.match("batch|num_(images|videos|audios)", word):
        return BATCH
    if word in {"height", "width", "image_size", "frame_size"}:
        return sizes.image[last]
    own = sizes.first("patch_size" if word in {"patch_height", "patch_width"} else word, None)
    own = sizes.hidden if word == "hidden_size" else sizes.channels if word.endswith("channels") else own
    return own if isinstance(own, int) else LENGTH


def completed(model: nn.Module, call: dict[str, Any], failure: Exception, said: str) -> dict[str, Any] | None:
    """The call with what its failure asks for; None if that is not known.

    It asks by the name of an argument in its words, by an argument that is None where it failed, or for placeholders.
    """
    more = _with_placeholders(model, call, said) or _one_row(call, said) or _in_patches(call, said)
    if more is not None:
        return more
    documented = _documented(model)
    open_ = [name for name in documented if name not in call and not ALTERNATIVES.fullmatch(name)]
    named = [name for name in open_ if re.search(rf"\b{name}\b", said)]
    if not named and "None" in said:
        named = _unset(failure.__cause__, open_)
    sizes = _Sizes(model.config)
    return call | {name: _as_documented(name, *documented[name], sizes) for name in named} if named else None


def _one_row(call: dict[str, Any], said: str) -> dict[str, Any] | None:
    """The first row alone, for a forward that gives the shape of the batch to a value of which there is one."""
    found = re.search(r"shape '\[([\d, ]+)\]' is invalid for input of size (\d+)", said)
    if found is None or math.prod(map(int, found[1].split(","))) != BATCH * int(found[2]):
        return None
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in call.items()}


def _in_patches(call: dict[str, Any], said: str) -> dict[str, Any] | None:
    """Every image as the patches that it is taken to be in."""
    found = re.search(r"got split_sizes=\[(\d+), \1\]", said)
    images = call.get("pixel_values")
    if found is None or images is None or images.dim() != 4:
        return None
    return call | {"pixel_values": images.unsqueeze(1).repeat(1, int(found[1]), 1, 1, 1)}


def _unset(error: BaseException | None, names: list[str]) -> list[str]:
    """The argument that the innermost call which has any of them was left without."""
    calls: list[tuple[dict[str, Any], str]] = []
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        frame = trace.tb_frame
        calls.append((frame.f_locals, linecache.getline(frame.f_code.co_filename, trace.tb_lineno)))
        trace = trace.tb_next
    for values, line in reversed(calls):
        unset = [name for name in names if name in values and values[name] is None]
        if unset:
            return [name for name in unset if re.search(rf"\b{name}\b", line)][:1] or unset[:1]
    return []


def _with_placeholders(model: nn.Module, call: dict[str, Any], said: str) -> dict[str, Any] | None:
    """The call with as many placeholder tokens as the error asks for, or their types; None if it asks for none.

    Where an image or a sound goes, the text has one token for each of its features: "Image features and image tokens do not match, tokens:
    0, features: 128".
    """
    config: Any = getattr(model, "config", None)
    if config is None or "input_ids" not in call:
        return None
    sizes = _Sizes(config)
    if "`mm_token_type_ids` is missing" in said:
        places = call["input_ids"] == sizes.first("image_token_id image_token_index", -1)
        return call | {"mm_token_type_ids": places.to(torch.int64)}
    missing = re.search(r"at least one (\w+) token", said)
    token = sizes.first(f"{missing[1].lower()}_token_id", None) if missing else None
    if token is not None and not (call["input_ids"] == token).any():
        return call | {"input_ids": torch.cat([torch.full((BATCH, 1), token), call["input_ids"]], 1)}
    found = re.search(r"(\w+) features and .* do not match\D*tokens: *(\d+)\D*features:? *(\d+)", said.replace("Multimodal", "Image"))
    if found is None:
        return None
    token = sizes.first("{0}_token_id {0}_token_index".format(found[1].lower()), None)
    now, wanted = int(found[2]), int(found[3])
    if now == wanted:  # some count every entry of a feature
        wanted //= _Sizes(config.get_text_config()).hidden
    if token is None or wanted in {0, now} or wanted % BATCH:
        return None
    places = torch.full((BATCH, wanted // BATCH), token)
    return call | {"input_ids": torch.cat([places, call["input_ids"][:, -LENGTH:]], 1)}
