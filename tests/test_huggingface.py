"""Hugging Face models need no inputs, and their own config says what grows."""

import copy
import importlib
import types

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


def made_up_for(model):
    from scaling.inputs import made_up

    return {name: tuple(value.shape) for name, value in made_up(model)[0][1].items() if isinstance(value, torch.Tensor)}


class Documented(torch.nn.Module):
    """A model of a kind that is not known, with the docstring that transformers asks for."""

    main_input_name = "tokens"

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(num_channels=3, hidden_size=8, mark_dim=5)
        self.embed, self.mark, self.row = torch.nn.Embedding(7, 8), torch.nn.Linear(5, 8), torch.nn.Linear(3 * 4 + 2, 8)

    def forward(self, tokens, marks, row_ids, rows=None):
        r"""
        tokens (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            What it reads.
        marks (`torch.FloatTensor` of shape `(batch_size, num_marks, config.mark_dim)`):
            What is marked.
        row_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            In which row.
        rows (`torch.Tensor` of shape `(batch_size, num_rows, 2 + image_channels * 4)`, *optional*):
            The rows.
        """
        return self.embed(tokens + row_ids), self.mark(marks), self.projected(features=rows)

    def projected(self, features):
        return self.row(features[:, :1])


def test_inputs_of_any_name_are_made_as_the_docstring_describes_them():
    """Those without a default at once, the others where the forward stumbles over a None, under whatever name it has there."""
    assert made_up_for(Documented()) == {"tokens": (2, 8), "marks": (2, 8, 5), "row_ids": (2, 8), "rows": (2, 8, 14)}


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
WITH_INPUTS_OF_THEIR_OWN = {
    "patches with their places in front": lambda: transformers.Pix2StructVisionModel(
        transformers.Pix2StructVisionConfig(
            hidden_size=32,
            d_ff=48,
            d_kv=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            patch_embed_hidden_size=48,
            patch_size=4,
            seq_len=64,
        )
    ),
    "patches with their places beside them": lambda: transformers.Gemma4VisionModel(
        transformers.Gemma4VisionConfig(head_dim=16, num_key_value_heads=2, patch_size=4, position_embedding_size=16, **SMALL)
    ),
    "an image below a prompt": lambda: transformers.SegGptModel(
        transformers.SegGptConfig(
            image_size=(64, 32), pretrain_image_size=32, intermediate_hidden_state_indices=[0, 1], merge_index=0, **SMALL
        )
    ),
    "a text with places for an image": lambda: transformers.Kosmos2ForConditionalGeneration(
        transformers.Kosmos2Config(
            text_config={"vocab_size": 31, "embed_dim": 32, "layers": 1, "ffn_dim": 48, "attention_heads": 2},
            vision_config=SMALL | {"image_size": 32, "patch_size": 16},
            latent_query_num=4,
        )
    ),
    "a text with a question": lambda: transformers.SplinterForPreTraining(
        transformers.SplinterConfig(vocab_size=31, question_token_id=30, **SMALL)
    ),
    "an image in patches, of a size": lambda: transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            text_config=transformers.LlamaConfig(vocab_size=31, **SMALL),
            vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=16, **SMALL | {"num_hidden_layers": 1}),
            image_grid_pinpoints=[[32, 64], [64, 32]],
            vision_feature_layer=-1,
            image_token_index=30,
        )
    ),
    "a sound beside a text": lambda: transformers.OmniASRForConditionalGeneration(
        transformers.OmniASRConfig(
            text_config=transformers.LlamaConfig(vocab_size=31, **SMALL),
            audio_config=transformers.OmniASRAudioConfig(conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), **SMALL),
            audio_token_id=30,
        )
    ),
    "frames beside a text": lambda: transformers.XCLIPModel(
        transformers.XCLIPConfig(
            text_config=SMALL | {"vocab_size": 31, "eos_token_id": 2},
            vision_config=SMALL | {"image_size": 32, "patch_size": 16, "num_frames": 3, "mit_hidden_size": 32, "mit_intermediate_size": 48},
            projection_dim=32,
            prompt_num_attention_heads=2,
        )
    ),
}


@pytest.mark.parametrize("kind", WITH_INPUTS_OF_THEIR_OWN)
def test_inputs_are_made_up_for(kind):
    with torch.device("meta"):
        model = WITH_INPUTS_OF_THEIR_OWN[kind]()
    unreached = derive(model).coverage.unreached
    assert not [name for name in unreached if "type_token" not in name and "post_layernorm" not in name]  # which the forward never uses


def test_codes_beside_the_text_have_an_axis_of_their_own():
    small = {"vocab_size": 31, "codebook_vocab_size": 8, "num_codebooks": 3, "ffn_dim": 48, "head_dim": 16, "audio_pad_token_id": 7}
    with torch.device("meta"):
        model = transformers.KyutaiSpeechToTextForConditionalGeneration(transformers.KyutaiSpeechToTextConfig(**small, **SMALL))
    assert made_up_for(model) == {"input_ids": (2, 8, 4)}


def test_the_channels_of_a_stem_grow_but_for_the_images():
    config = transformers.HGNetV2Config(
        embedding_size=16, depths=[1, 1], hidden_sizes=[32, 64], stem_channels=[3, 8, 16], stage_in_channels=[16, 32],
        stage_mid_channels=[8, 8], stage_out_channels=[32, 64], stage_num_blocks=[1, 1], stage_downsample=[False, True],
        stage_downsample_strides=[2, 2], stage_light_block=[False, True], stage_kernel_size=[3, 3], stage_numb_of_layers=[1, 1],
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.HGNetV2ForImageClassification(config)
    assert at_twice_the_width(model).config.stem_channels == [3, 16, 32]
    assert all(cls.known for cls in derive(model).classes)


def test_the_widths_and_heads_of_stages_grow():
    """Also a stem's, which is as long as the first of them (TextNet)."""
    with torch.device("meta"):
        model = transformers.Sam2VisionModel(
            transformers.Sam2VisionConfig(
                backbone_config=transformers.Sam2HieraDetConfig(
                    hidden_size=16, num_attention_heads=1, image_size=[64, 64], blocks_per_stage=[1, 1, 1, 1], global_attention_blocks=[],
                    embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8],
                    window_positional_embedding_background_size=[4, 4], window_size_per_stage=[4, 2, 2, 2],
                ),
                backbone_channel_list=[128, 64, 32, 16], fpn_hidden_size=32, backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            )
        )  # fmt: skip
        other = transformers.TextNetForImageClassification(
            transformers.TextNetConfig(hidden_sizes=[16, 16, 24, 32, 40], stem_out_channels=16)
        )
    for table in (derive(model), derive(other)):
        assert all(cls.known for cls in table.classes)
