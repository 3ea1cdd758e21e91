"""Hugging Face models need no inputs, and their own config says what grows."""

import copy
import importlib

import pytest
import torch

from scaling import derive
from scaling.huggingface import at_twice_the_width

transformers = pytest.importorskip("transformers")


def bros():
    return transformers.BrosModel(
        transformers.BrosConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=1, vocab_size=31)
    )


def test_what_the_config_computes_from_a_width_grows_with_it():
    twin = at_twice_the_width(bros())
    assert twin.config.dim_bbox_sinusoid_emb_2d == 32
    assert twin.bbox_embeddings.bbox_projection.weight.shape == (16, 32)


def test_the_config_of_the_users_model_is_as_it_was():
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config=small | {"vocab_size": 31, "eos_token_id": 2}, vision_config=small | {"image_size": 32}))
    before = copy.deepcopy([vars(config) for config in (model.config, model.config.text_config, model.config.vision_config)])
    at_twice_the_width(model)
    after = [vars(config) for config in (model.config, model.config.text_config, model.config.vision_config)]
    assert [{k: v for k, v in x.items() if "config" not in k} for x in before] == [
        {k: v for k, v in x.items() if "config" not in k} for x in after
    ]


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=31, **small)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, **small)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=30, image_token_index=30))


def test_the_text_of_an_image_and_text_model_gets_a_placeholder_for_every_feature():
    table = derive(llava())
    assert "model.multi_modal_projector.linear_1.weight" in table
    assert not [name for name in table.coverage.unreached if "language_model" in name or "projector" in name or "layers.0" in name]


def test_a_decoder_with_cross_attention_gets_something_to_attend_to():
    from transformers import BartConfig, BartForCausalLM

    config = BartConfig(
        vocab_size=31, d_model=32, decoder_ffn_dim=48, decoder_layers=1, decoder_attention_heads=2, max_position_embeddings=16
    )
    table = derive(BartForCausalLM(config))
    assert not table.coverage.unreached
    assert table["model.decoder.layers.0.encoder_attn.k_proj.weight"].role == "hidden"


def test_what_two_towers_are_projected_to_does_not_grow():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 24}
    table = derive(CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=31, eos_token_id=2, **small)))
    assert table["text_projection.weight"].role == "output"


def test_packed_patches_come_with_their_grid():
    with torch.device("meta"):
        model = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel._from_config(
            transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(depth=1, embed_dim=32, num_heads=2, hidden_size=32)
        )
    assert not derive(model).coverage.unreached


def test_a_config_that_does_not_scale_to_a_model_that_runs_leaves_a_guess_and_says_so(monkeypatch):
    from transformers import BertConfig, BertModel

    class Broken(torch.nn.Module):
        def forward(self, input_ids):
            raise RuntimeError

    model = BertModel(BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=31))
    monkeypatch.setattr(importlib.import_module("scaling.derive"), "at_twice_the_width", lambda model, **_: Broken())
    table = derive(model)
    assert "guessed" in table.notes[0]
    assert not any(c.known for c in table.classes)


def test_one_key_for_all_heads_stays_one():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=31
    )
    assert derive(LlamaForCausalLM(config))["model.layers.0.self_attn.k_proj.weight"].role == "output"


def test_building_the_twin_leaves_the_generator_alone(monkeypatch):
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=31))
    monkeypatch.setattr(BertModel, "post_init", lambda self: torch.rand(3, device="cpu"))
    before = torch.get_rng_state()
    assert at_twice_the_width(model) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_twin_has_the_whole_numbers_that_the_forward_computes_shapes_with():
    """A codec's paddings are buffers, and the meta device keeps no values."""
    from transformers import EncodecConfig, EncodecModel

    table = derive(EncodecModel(EncodecConfig(hidden_size=16, num_filters=4, num_lstm_layers=1, target_bandwidths=[1.5])))
    assert not [note for note in table.notes if "guessed" in note]
    assert all(cls.known for cls in table.classes)


def test_a_twin_is_in_training_where_the_model_is():
    model = bros().eval()
    model.encoder.layer[0].train()
    flags = {name: module.training for name, module in at_twice_the_width(model).named_modules()}
    assert flags == {name: module.training for name, module in model.named_modules()}


def test_a_field_that_its_constructor_fills_in_is_filled_in_again():
    """DAC's codes stay as short as they are said to be; EnCodec's are as long as its hidden states, unless they are said not to be."""
    from transformers import EncodecConfig, EncodecModel

    small = {"hidden_size": 16, "num_filters": 4, "num_lstm_layers": 1, "target_bandwidths": [1.5]}
    assert at_twice_the_width(EncodecModel(EncodecConfig(**small))).config.codebook_dim == 32
    assert at_twice_the_width(EncodecModel(EncodecConfig(codebook_dim=8, **small))).config.codebook_dim == 8


def test_a_size_that_must_be_the_streams_grows_with_it_whatever_its_name():
    """LightGlue's hidden size is its descriptors', and so are its detector's: doubled alone, it does not run."""
    from transformers import LightGlueConfig, LightGlueForKeypointMatching, SuperPointConfig

    detector = SuperPointConfig(descriptor_decoder_dim=64, decoder_hidden_size=48)
    with torch.device("meta"):
        model = LightGlueForKeypointMatching(LightGlueConfig(keypoint_detector_config=detector, descriptor_dim=64, num_hidden_layers=2))
    table = derive(model, kwargs={"pixel_values": torch.zeros(1, 2, 3, 32, 32)})
    assert not [note for note in table.notes if "guessed" in note]
    assert table["transformer_layers.0.self_attention.q_proj.weight"].role == "hidden"


def test_an_encoder_of_sound_is_tried_with_every_form_of_it():
    from transformers import BertConfig, SpeechEncoderDecoderConfig, SpeechEncoderDecoderModel, Wav2Vec2Config

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    sound = Wav2Vec2Config(conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), **positions, **small)
    text = BertConfig(vocab_size=31, is_decoder=True, add_cross_attention=True, **small)
    model = SpeechEncoderDecoderModel(SpeechEncoderDecoderConfig.from_encoder_decoder_configs(sound, text))
    assert not derive(model).coverage.unreached
