"""Processors that put text of their own into a chat: before it, labels stay where they are; within it, no."""

import json

import pytest
from PIL import Image
from test_vlm_architectures import TEMPLATE
from transformers import Emu3Processor, PaliGemmaProcessor
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from emloc.config import TrainConfig
from emloc.errors import DataError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc_vlm.encode import collate
from emloc_vlm.rows import load_examples

CHAT = TEMPLATE.format(image="<image>")


@pytest.fixture
def example(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    asked = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What colour is it?"}]
    row = {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "It is red."},
        ]
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    options = with_plugin_options(TrainConfig)(output_dir="o", max_length=4000)
    return load_examples(options, str(tmp_path / "d.jsonl")), options


def test_text_before_a_chat_moves_no_label(example):
    tokenizer = byte_tokenizer(
        image_token="<image>", boi_token="<|image start|>", eoi_token="<|image end|>",
        image_wrapper_token="<|image token|>", eol_token="<|extra_200|>", eof_token="<|extra_201|>",
        bos_token="<|extra_203|>",
    )  # fmt: skip
    images = Emu3ImageProcessor(min_pixels=16 * 16, max_pixels=32 * 32)
    processor = Emu3Processor(image_processor=images, tokenizer=tokenizer, chat_template=CHAT)
    examples, options = example
    batch = collate(examples, processor, options)
    learnt = tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0])
    assert learnt == "It is red.<|im_end|>\n"


def test_text_within_a_chat_is_refused(example):
    """PaliGemma's marks all that it is given as a prefix, whose tokens see one another."""
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    tokenizer = byte_tokenizer(image_token="<image>", bos_token="<bos>")
    processor = PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=CHAT)
    examples, options = example
    with pytest.raises(DataError, match="writes something of its own into a chat"):
        collate(examples, processor, options)
