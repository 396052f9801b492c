"""Models that share nothing with InternVL but the idea, through the same code."""

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3Processor,
    LlavaConfig,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vlm_reference import best_error, load, logits, outputs_and_inputs

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc.integrations.transformers.lively_model import lively_model
from emloc_vlm import calibration
from emloc_vlm.encode import collate
from emloc_vlm.example import TEXT
from emloc_vlm.family import VLMFamily
from emloc_vlm.image_only import image_only
from emloc_vlm.parts import part_of

TEMPLATE = (
    "{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n"
    "{{% for p in m['content'] %}}{{% if p['type'] == 'image' %}}{image}{{% else %}}{{{{ p['text'] }}}}"
    "{{% endif %}}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
VISION = {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2,
          "num_attention_heads": 5}  # fmt: skip


def text(kind, tokenizer):
    return {"model_type": kind, **TEXT, "vocab_size": len(tokenizer), "pad_token_id": 0,
            "eos_token_id": 2, "bos_token_id": None}  # fmt: skip


def llava():
    tokenizer = byte_tokenizer(image_token="<image>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16},
                                              crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE.format(image="<image>"),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 16,
                       "patch_size": 4, "projection_dim": 24},
        text_config=text("llama", tokenizer), image_token_id=processor.image_token_id,
        image_seq_length=16, tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
    )  # fmt: skip
    return config, processor


def qwen():
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
             "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}  # fmt: skip
    tokenizer = byte_tokenizer(**names)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = image_only(Qwen2_5_VLProcessor)(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2,
            size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
        ),
        tokenizer=tokenizer,
        chat_template=TEMPLATE.format(image=image),
    )  # fmt: skip
    ids = {f"{k}_id": tokenizer.convert_tokens_to_ids(v) for k, v in names.items()}
    config = Qwen2_5_VLConfig(
        vision_config={"hidden_size": 40, "intermediate_size": 72, "depth": 2, "num_heads": 5,
                       "out_hidden_size": 48, "patch_size": 4, "spatial_merge_size": 2,
                       "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config={**text("qwen2_5_vl_text", tokenizer), "head_dim": 12,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2],
                                         "rope_theta": 10000.0}},
        image_token_id=ids["image_token_id"], video_token_id=ids["video_token_id"],
        vision_start_token_id=ids["vision_bos_token_id"],
        vision_end_token_id=ids["vision_eos_token_id"], tie_word_embeddings=False,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )  # fmt: skip
    return config, processor


def idefics():
    tokenizer = byte_tokenizer(image_token="<image>", fake="<fake_token_around_image>",
                               end="<end_of_utterance>", whole="<global-img>")  # fmt: skip
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16},
            do_image_splitting=False,
        ),
        tokenizer=tokenizer, image_seq_len=4, chat_template=TEMPLATE.format(image="<image>"),
    )  # fmt: skip
    config = Idefics3Config(
        vision_config={**VISION, "image_size": 16, "patch_size": 4},
        text_config=text("llama", tokenizer), image_token_id=processor.image_token_id,
        scale_factor=2, tie_word_embeddings=False, pad_token_id=0,
        architectures=["Idefics3ForConditionalGeneration"],
    )  # fmt: skip
    return config, processor


@pytest.mark.parametrize("build", [llava, qwen, idefics])
def test_round_trip(tiny, tmp_path, build):
    config, processor = build()
    base = tmp_path / "base"
    lively_model(AutoModelForImageTextToText, config, 0).save_pretrained(base)
    processor.save_pretrained(base)
    data = {"dataset": str(tiny.data), "max_length": 300}
    options = with_plugin_options(CompressConfig)(
        model_name_or_path=str(base), output_dir="unused", **data
    )
    checkpoint = Checkpoint.open(base)
    batches = VLMFamily().calibration_batches(checkpoint, options)
    inputs = [{k: v for k, v in batch.items() if not k.startswith("emloc")} for batch in batches]
    model = load(base)
    full = emloc.compress(
        model_name_or_path=str(base), output_dir=tmp_path / "full", format="low_rank",
        rank_pattern={".*": 1000},
        **data,
    )  # fmt: skip
    torch.testing.assert_close(
        logits(load(full), inputs[0]), logits(model, inputs[0]), rtol=1e-3, atol=1e-3
    )
    emulator = emloc.compress(
        model_name_or_path=str(base), output_dir=tmp_path / "e", format="low_rank", keep_ratio=0.5,
        share_factors=False, **data,
    )  # fmt: skip
    layers = Manifest.read(emulator).layers
    assert {part_of(name) for name in layers} == {"vision", "language"}
    seen = outputs_and_inputs(model, inputs, layers)
    compressed = load(emulator)
    for name, entry in layers.items():
        assert entry["tokens"] == len(seen[name])
        weight = model.get_submodule(name).weight
        error = ((weight - compressed.get_submodule(name).weight).double() @ seen[name].T).norm()
        scale = (weight.double() @ seen[name].T).norm()
        assert error <= best_error(weight, seen[name], entry["rank"]) * 1.0001 + 1e-4 * scale
    adapter = emloc.train(
        emulator=str(emulator), output_dir=tmp_path / "a", max_steps=2, lora_r=3,
        learning_rate=1e-2, freeze_vision_tower=False, **data,
    )  # fmt: skip
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(emulator), output_dir=tmp_path / "c", limit="none",
        **data,
    )  # fmt: skip
    for entry in Manifest.read(corrected).layers.values():
        assert entry["residual_after"] < 1e-3 * entry["residual_before"]
    merged = emloc.merge(adapter=str(corrected), output_dir=tmp_path / "m")
    tuned = PeftModel.from_pretrained(load(base), corrected)
    torch.testing.assert_close(
        logits(load(merged), inputs[0]), logits(tuned, inputs[0]), rtol=1e-3, atol=1e-3
    )
    scores = emloc.evaluate(
        model_name_or_path=str(merged), dataset=str(tiny.test), max_length=300, max_new_tokens=2
    )
    assert scores["samples"] == 8


def test_padded_patches_are_no_calibration_tokens(tiny, tmp_path, monkeypatch):
    """Where a processor pads images to one size, patches of the border do not count."""
    config, processor = idefics()
    base = tmp_path / "base"
    lively_model(AutoModelForImageTextToText, config, 0).save_pretrained(base)
    processor.save_pretrained(base)

    def with_borders(*args, **options):
        batch = collate(*args, **options)
        batch["pixel_attention_mask"][::2, ..., 7:] = 0  # of four patches in a row, two are left
        batch["pixel_values"][::2, ..., 7:] = 0
        return batch

    monkeypatch.setattr(calibration, "collate", with_borders)
    emulator = emloc.compress(
        model_name_or_path=str(base), output_dir=tmp_path / "e", format="low_rank", keep_ratio=0.5,
        dataset=str(tiny.data), max_length=300, calibration_batch_size=8,
    )  # fmt: skip
    layers = Manifest.read(emulator).layers
    counted = {e["tokens"] for name, e in layers.items() if part_of(name) == "vision"}
    assert counted == {24 // 2 * 16 + 24 // 2 * 8}
