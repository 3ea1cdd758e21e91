"""The models: each a function of a width multiple, with inputs that are known to run."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """`build(k)` is the model with its widths multiplied by k; `inputs(model)` are arguments on which it runs.

    `multiples` are the k that there are: (1,) for a model that comes in one width.
    """

    family: str
    name: str
    build: Callable[[int], nn.Module]
    inputs: Callable[[nn.Module], Inputs]
    multiples: tuple[int, ...] = (1, 2, 3)


def all_cases(zoo: Path | None) -> Iterator[Case]:
    """Every model of the survey; those of Hugging Face only with the folder of their builder."""
    yield from handwritten()
    yield from torchvision()
    yield from timm()
    if zoo is not None:
        yield from huggingface(zoo)


def huggingface(zoo: Path) -> Iterator[Case]:
    """The builder's list: shrunk configs, head_dim fixed and heads growing with k."""
    sys.path.insert(0, str(zoo))
    import transformers.generation
    import transformers.modeling_utils  # noqa: F401 - once, not in the process of every model
    import zoo_hf

    for name, entry in json.loads((zoo / "models.json").read_text()).items():
        device = "meta" if entry["big"] else "cpu"
        yield Case(
            f"huggingface/{entry['head'].lower()}",
            name,
            lambda k, name=name, tier=entry["tier"], device=device: zoo_hf.build(name, k, tier, device)[0],
            lambda model, at=entry["cand"]: ((), {**zoo_hf.candidates(model, model.config)[at]}),
            (1,) if entry["tier"] == "depth" else (1, 2, 3),  # a tier that leaves the widths alone
        )


def handwritten() -> Iterator[Case]:
    """The models of `tests.handwritten`."""
    from tests.handwritten import HANDWRITTEN

    for name, model in HANDWRITTEN.items():
        widths = {1: 16, 2: 32, 3: 48}
        # the inputs of the model that is asked about: hand-written ones may depend on the width
        made: dict[int, int] = {}

        def build(k: int, model=model, widths=widths, made=made) -> nn.Module:
            built = model.build(widths[k])
            made[id(built)] = widths[k]
            return built

        yield Case("handwritten", name, build, lambda built, model=model, made=made: (model.inputs(made[id(built)]), model.kwargs(16)))


# torchvision

TORCHVISION_WIDTHS: dict[str, Callable[[int], dict[str, Any]]] = {
    "mobilenet_v2": lambda k: {"width_mult": float(k)},
    "mobilenet_v3_small": lambda k: {"width_mult": float(k)},
    "densenet121": lambda k: {"growth_rate": 32 * k, "num_init_features": 64 * k},
    "resnet50": lambda k: {"width_per_group": 64 * k},
    "swin_t": lambda k: {"embed_dim": 96 * k, "num_heads": [3 * k, 6 * k, 12 * k, 24 * k]},
    "swin_v2_t": lambda k: {"embed_dim": 96 * k, "num_heads": [3 * k, 6 * k, 12 * k, 24 * k]},
    "maxvit_t": lambda k: {"stem_channels": 64 * k, "block_channels": [64 * k, 128 * k, 256 * k, 512 * k]},
}
LARGE = ("128gf", "vit_h", "vit_l", "32gf", "swin_b", "convnext_large")
"""Of more than half a gigabyte: built on the meta device."""


def torchvision() -> Iterator[Case]:
    """Everything that torchvision lists but the quantized models and optical flow."""
    from torchvision import models

    for kind, module in (
        ("classification", models),
        ("segmentation", models.segmentation),
        ("detection", models.detection),
        ("video", models.video),
    ):
        for name in models.list_models(module=module):
            scaled = TORCHVISION_WIDTHS.get(name)
            device = "meta" if any(part in name for part in LARGE) else "cpu"
            yield Case(
                f"torchvision/{kind}",
                name,
                lambda k, name=name, scaled=scaled, device=device: _torchvision(name, device, scaled(k) if scaled and k > 1 else {}),
                lambda model, kind=kind, name=name: _images(kind, name),
                (1, 2, 3) if scaled else (1,),
            )


def _torchvision(name: str, device: str, more: dict[str, Any]) -> nn.Module:
    from torchvision import models

    none = {"weights_backbone": None} if name in _with_backbone() else {}
    build = _patched(models.get_model_builder(name), more)
    with torch.device("cpu" if "regnet" in name else device):  # its constructor computes with tensors
        return build(weights=None, **none).to(device)


def _patched(builder: Callable[..., nn.Module], more: dict[str, Any]) -> Callable[..., nn.Module]:
    """The builder with widths of its private constructor replaced (torchvision's public builders fix them)."""
    if not more:
        return builder

    def build(**kwargs: Any) -> nn.Module:
        import functools
        import inspect

        scope = inspect.unwrap(builder).__globals__
        private = next(n for n in inspect.unwrap(builder).__code__.co_names if n.startswith("_") and callable(scope.get(n)))
        original = scope[private]
        scope[private] = lambda *a, **k: functools.partial(original)(*a, **{**k, **more})
        try:
            return builder(**kwargs)
        finally:
            scope[private] = original

    return build


def _with_backbone() -> set[str]:
    from torchvision import models

    return {n for module in (models.segmentation, models.detection) for n in models.list_models(module=module)}


def _images(kind: str, name: str) -> Inputs:
    if kind == "detection":
        return ([torch.zeros(3, 320, 320), torch.zeros(3, 320, 320)],), {}
    if kind == "video":
        return (torch.zeros(1, 3, 16, 224, 224),), {}
    if name == "maxvit_t" or name.startswith("swin"):
        return (torch.zeros(1, 3, 224, 224),), {}
    return (torch.zeros(2, 3, 299 if name == "inception_v3" else 224, 299 if name == "inception_v3" else 224),), {}


# timm: the smallest model of every family (a family is one file of timm 1.0)

TIMM = """
beit_base_patch16_224 eca_botnext26ts_256 mobileone_s1 cait_xxs24_224 coat_lite_tiny convit_tiny convmixer_768_32
convnext_atto_rms cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0
efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_s fastvit_s12 focalnet_tiny_srf gcvit_xxtiny
gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_s inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_384_s8 lowformer_b0 test_mambaout coatnet_pico_rw_224
poolformer_s12 mixer_s16_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_siglip
nasnetalarge nest_tiny nextvit_small test_nfnet pit_xs_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002
repghostnet_050 repvit_m1_0 res2net50_14w_8s resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18
sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit
vit_small_r26_s32_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception
xception41p xcit_nano_12_p8_224
"""


def _times(k: int, *sizes: int) -> tuple[int, ...]:
    return tuple(k * size for size in sizes)


TIMM_WIDTHS: dict[str, Callable[[int], dict[str, Any]]] = {
    "convmixer_768_32": lambda k: {"dim": 768 * k},
    "convnext_atto_rms": lambda k: {"dims": _times(k, 40, 80, 160, 320)},
    "davit_tiny": lambda k: {"embed_dims": _times(k, 96, 192, 384, 768), "num_heads": _times(k, 3, 6, 12, 24)},
    "deit_tiny_patch16_224": lambda k: {"embed_dim": 192 * k, "num_heads": 3 * k},
    "edgenext_xx_small": lambda k: {"dims": _times(k, 24, 48, 88, 168), "heads": _times(k, 4, 4, 4, 4)},
    "efficientnet_b0": lambda k: {"channel_multiplier": float(k)},
    "eva02_tiny_patch14_224": lambda k: {"embed_dim": 192 * k, "num_heads": 3 * k},
    "mixer_s16_224": lambda k: {"embed_dim": 512 * k},
    "mobilenetv3_small_050": lambda k: {"channel_multiplier": 0.5 * k},
    "poolformer_s12": lambda k: {"dims": _times(k, 64, 128, 320, 512)},
    "pvt_v2_b0": lambda k: {"embed_dims": _times(k, 32, 64, 160, 256), "num_heads": _times(k, 1, 2, 5, 8)},
    "swin_tiny_patch4_window7_224": lambda k: {"embed_dim": 96 * k, "num_heads": _times(k, 3, 6, 12, 24)},
    "swinv2_tiny_window8_256": lambda k: {"embed_dim": 96 * k, "num_heads": _times(k, 3, 6, 12, 24)},
    "test_vit": lambda k: {"embed_dim": 64 * k, "num_heads": 2 * k},
    "test_resnet": lambda k: {"channels": _times(k, 32, 48, 48, 96), "stem_width": 16 * k},
    "twins_svt_small": lambda k: {"embed_dims": _times(k, 64, 128, 256, 512), "num_heads": _times(k, 2, 4, 8, 16)},
    "xcit_nano_12_p8_224": lambda k: {"embed_dim": 128 * k, "num_heads": 4 * k},
    "test_mambaout": lambda k: {"dims": _times(k, 16, 32, 48, 64)},
    "cait_xxs24_224": lambda k: {"embed_dim": 192 * k, "num_heads": 4 * k},
    "levit_384_s8": lambda k: {"embed_dim": _times(k, 384, 512, 768), "num_heads": _times(k, 6, 9, 12)},
}


def timm() -> Iterator[Case]:
    """One model of every family, the smallest."""
    import timm as library

    for name in TIMM.split():
        scaled = TIMM_WIDTHS.get(name)
        yield Case(
            "timm",
            name,
            lambda k, name=name, scaled=scaled: library.create_model(name, pretrained=False, **(scaled(k) if scaled and k > 1 else {})),
            lambda model: ((torch.zeros(2, *model.default_cfg["input_size"]),), {}),
            (1, 2, 3) if scaled else (1,),
        )
