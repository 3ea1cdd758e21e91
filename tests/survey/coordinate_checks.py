"""Coordinate check of ten models of ten families as Hugging Face builds them: five steps of Adam and of Muon at four widths.

The ten were written down before any was run. Every activation whose change theory says is flat in the width must be: |slope| ≤ 0.15 of the
change after five steps. Results go to coordinate_checks.json, one model and optimizer at a time; a restart goes on with the rest.

    python -m tests.survey.coordinate_checks            # what is missing, then the table
    python -m tests.survey.coordinate_checks --show     # the table of what is there
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import compiler
from scaling import coordinate_check, derive, flow
from scaling.measured import CoordinateCheck

OUT = Path(__file__).parent / "coordinate_checks.json"
WIDTHS = (64, 128, 192, 256)
SEEDS = (0, 1, 2, 3)
STEPS = 5
RATE = 0.02
"""Nominal: the change per step of what a unit input makes, so that activations move by well over 3 % in five steps (THEORY 6.1)."""
TOLERANCE = 0.15  # THEORY 6.1
HEAD, LABELS, BATCH, TOKENS = 16, 7, 8, 16
VOCAB = 13
"""Far below every width: W₀Δx is √(vocabulary/width) of a change of the logits, a transient that dies out (THEORY 6.5)."""

TEXT: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _config(name: str, d: int) -> Any:
    heads = d // HEAD
    sizes = {"hidden_size": d, "num_hidden_layers": 2, "num_attention_heads": heads}
    make = {
        "llama": lambda: transformers.LlamaConfig(**TEXT, **sizes, intermediate_size=3 * d, num_key_value_heads=heads // 2),
        "gpt2": lambda: transformers.GPT2Config(**TEXT, n_embd=d, n_layer=2, n_head=heads, n_positions=TOKENS),
        "bert": lambda: transformers.BertConfig(**TEXT, **sizes, intermediate_size=4 * d, num_labels=LABELS),
        "vit": lambda: transformers.ViTConfig(**sizes, intermediate_size=4 * d, image_size=32, patch_size=8, num_labels=LABELS),
        "t5": lambda: transformers.T5Config(**TEXT, d_model=d, d_kv=HEAD, d_ff=4 * d, num_layers=2, num_heads=heads,
                                            decoder_start_token_id=0),
        "mamba": lambda: transformers.MambaConfig(**TEXT, hidden_size=d, num_hidden_layers=2, state_size=8),
        "mixtral": lambda: transformers.MixtralConfig(
            **TEXT, **sizes, intermediate_size=2 * d, num_key_value_heads=heads // 2, num_local_experts=4
        ),
        "convnext": lambda: transformers.ConvNextConfig(hidden_sizes=[d // 2, d], depths=[1, 1], num_stages=2, patch_size=4,
                                                            num_labels=LABELS),
        "whisper": lambda: transformers.WhisperConfig(
            **TEXT, d_model=d, encoder_layers=1, decoder_layers=1, encoder_attention_heads=heads, decoder_attention_heads=heads,
            encoder_ffn_dim=4 * d, decoder_ffn_dim=4 * d, num_mel_bins=20, max_source_positions=TOKENS, max_target_positions=TOKENS,
            decoder_start_token_id=1,
        ),
        "resnet": lambda: transformers.ResNetConfig(
            embedding_size=d // 4, hidden_sizes=[d // 2, d], depths=[1, 1], layer_type="basic", num_labels=LABELS
        ),
    }  # fmt: skip
    return make[name]()


MODELS: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForSequenceClassification",
    "vit": "ViTForImageClassification",
    "t5": "T5ForConditionalGeneration",
    "mamba": "MambaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "convnext": "ConvNextForImageClassification",
    "whisper": "WhisperForConditionalGeneration",
    "resnet": "ResNetForImageClassification",
}
"""Chosen before looking: decoder, its tied ancestor, encoder, patches, encoder-decoder, state space, experts, two kinds of convolutions,
and audio with cross attention."""


def build(name: str, d: int) -> nn.Module:
    """The model as Hugging Face makes it, without dropout."""
    config = _config(name, d)
    for field in vars(config):
        if field.endswith(("dropout", "_pdrop", "dropout_prob", "dropout_rate")) and isinstance(getattr(config, field), float):
            setattr(config, field, 0.0)
    return getattr(transformers, MODELS[name])(config)


def batches(name: str) -> list[dict[str, Tensor]]:
    """Five batches that every width sees: random inputs, random labels."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Tensor:
        return torch.randint(3, VOCAB, (BATCH, length), generator=generator)

    def one() -> dict[str, Tensor]:
        labels = torch.randint(0, LABELS, (BATCH,), generator=generator)
        if name in {"vit", "convnext", "resnet"}:
            return {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator), "labels": labels}
        if name == "whisper":
            return {"input_features": torch.randn(BATCH, 20, 2 * TOKENS, generator=generator), "labels": tokens(8)}
        if name == "bert":
            return {"input_ids": tokens(TOKENS), "labels": labels}
        if name == "t5":
            return {"input_ids": tokens(TOKENS), "labels": tokens(8)}
        ids = tokens(TOKENS)
        return {"input_ids": ids, "labels": ids}

    return [one() for _ in range(STEPS)]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own."""
    return model(
        **batch, **({"use_cache": False} if "input_ids" in batch and "config" in vars(model) and hasattr(model.config, "use_cache") else {})
    ).loss


def check(name: str, optimizer: str) -> CoordinateCheck:
    """Five steps at every width with what is derived of the model; predictions by the flow of the same rules."""
    data = batches(name)
    inputs = {key: value for key, value in data[0].items() if key != "labels"}
    if name in {"t5", "whisper"}:
        inputs["decoder_input_ids"] = data[0]["labels"]
    with torch.device("meta"):
        table = derive(lambda d: build(name, d), None, inputs, widths=WIDTHS[:2])

    def trained(d: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        return compiler.compile(build(name, d), table, optimizer, lr=RATE, weight_decay=0.0)

    return coordinate_check(
        trained, data, WIDTHS, steps=(1, STEPS), seeds=SEEDS, loss=loss, flow=flow(table, optimizer), tolerance=TOLERANCE
    )


def summary(result: CoordinateCheck) -> dict[str, Any]:
    """How many changes are predicted flat, the largest slope among them, and those over the tolerance; and what is not predicted flat."""
    changes = [series for series in result.series if series.quantity == "change" and series.step == STEPS]
    flat = {series.name: series.slope for series in changes if series.predicted in {0.0, None} and series.slope is not None}
    other = {series.name: (series.slope, series.predicted) for series in changes if series.predicted not in {0.0, None}}
    return {
        "predicted_flat": len(flat),
        "largest": max((abs(slope) for slope in flat.values()), default=None),
        "over": {name: round(slope, 3) for name, slope in flat.items() if not abs(slope) <= TOLERANCE},
        "not_predicted_flat": {name: [round(s, 3) if s is not None else None, p] for name, (s, p) in other.items()},
        "logits_at_init": next((round(s.slope, 3) for s in result.series if s.name.endswith("[logits]") and s.step == 0 and s.slope), None),
        "seeds": list(result.seeds),
        "widths": list(result.widths),
        "environment": result.environment.model_dump(),
    }


def main(only: list[str], *, show: bool) -> None:
    """Runs what is missing, writes it and prints the table."""
    warnings.filterwarnings("ignore")
    done = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in only or MODELS:
        for optimizer in ("adam", "muon"):
            key = f"{name} {optimizer}"
            if key not in done and not show:
                done[key] = summary(check(name, optimizer))
                OUT.write_text(json.dumps(done, indent=1))
            if key in done:
                r = done[key]
                print(f"{key:14} {r['predicted_flat']:4} flat, largest |slope| {r['largest']:.3f}, over: {r['over'] or '-'}", flush=True)


if __name__ == "__main__":
    run: Callable[..., None] = main
    run([word for word in sys.argv[1:] if not word.startswith("-")], show="--show" in sys.argv)
