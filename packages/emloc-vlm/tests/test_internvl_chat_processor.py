"""Processors of original InternVL checkpoints: tiles, image tokens, chats and tokenizers."""

import io
import json
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig

from emloc.errors import CheckpointError, DependencyError
from emloc_vlm.internvl_chat import native_config, native_processor

IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>"]
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
SIZE, SEQUENCE = 28, 4
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def special(tokens):
    return {
        str(index): {"content": token, "special": True, "normalized": False, "lstrip": False,
                     "rstrip": False, "single_word": False}
        for token, index in tokens.items()
    }  # fmt: skip


def write_config(folder, language, **more):
    config = {
        "model_type": "internvl_chat", "ps_version": "v2", "force_image_size": SIZE,
        "downsample_ratio": 0.5, "dynamic_image_size": True, "use_thumbnail": True,
        "max_dynamic_patch": 6, "auto_map": {"AutoConfig": "configuration_internvl_chat.Config"},
        "vision_config": {"image_size": SIZE, "patch_size": 7},
        "llm_config": {"model_type": language, "hidden_size": 8, "num_attention_heads": 2},
        **more,
    }  # fmt: skip
    write_json(folder / "config.json", config)


@pytest.fixture
def qwen(tmp_path):
    """The files of an original checkpoint with Qwen2's tokenizer, which knows bytes alone."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    first = len(vocabulary)
    tokens = {t: first + n for n, t in enumerate(["<|endoftext|>", *CHAT_TOKENS, *IMAGE_TOKENS])}
    write_config(tmp_path, "qwen2")
    write_json(tmp_path / "vocab.json", vocabulary)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    write_json(tmp_path / "added_tokens.json", tokens)
    write_json(
        tmp_path / "tokenizer_config.json",
        {"added_tokens_decoder": special(tokens), "tokenizer_class": "Qwen2Tokenizer",
         "additional_special_tokens": [*CHAT_TOKENS, *IMAGE_TOKENS], "bos_token": None,
         "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 12288},
    )  # fmt: skip
    write_json(
        tmp_path / "preprocessor_config.json",
        {"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": MEAN, "image_std": STD},
    )
    return tmp_path


def picture(width, height):
    values = numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(values)


def tiles_of(image, columns, rows):
    """OpenGVLab's preprocessing: resize, cut, thumbnail last, normalise."""
    whole = image.resize((columns * SIZE, rows * SIZE), Image.Resampling.BICUBIC)
    parts = []
    for n in range(columns * rows):
        left, top = n % columns * SIZE, n // columns * SIZE
        parts.append(whole.crop((left, top, left + SIZE, top + SIZE)))
    if len(parts) > 1:
        parts.append(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    pixels = torch.tensor(numpy.stack([numpy.asarray(part) for part in parts])) / 255
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [(30, 30, (1, 1)), (60, 60, (2, 2)), (90, 30, (3, 1)), (20, 40, (1, 2)), (150, 100, (3, 2))],
)
def test_tiles_and_image_tokens(qwen, width, height, grid):
    processor = native_processor(qwen)
    image = picture(width, height)
    inputs = processor(images=[image], text=["<IMG_CONTEXT>\nWhat?"], return_tensors="pt")
    expected = tiles_of(image, *grid)
    torch.testing.assert_close(inputs["pixel_values"], expected, atol=1e-5, rtol=0)
    tokenizer = processor.tokenizer
    begin, end, place = tokenizer.convert_tokens_to_ids(IMAGE_TOKENS)
    ids = inputs["input_ids"][0].tolist()
    image_ids = [begin] + [place] * SEQUENCE * len(expected) + [end]
    assert ids == image_ids + tokenizer("\nWhat?")["input_ids"]
    assert "torchvision" not in sys.modules


def test_images_of_one_sample_share_its_tiles(qwen):
    """`max(1, max_dynamic_patch // count)` each, as OpenGVLab's training code cuts them."""
    processor = native_processor(qwen)
    image = picture(150, 100)
    text = ["<IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT>", "<IMG_CONTEXT>"]
    made = processor(images=[[image] * 3, [image]], text=text, padding=True, return_tensors="pt")
    expected = torch.cat([tiles_of(image, 2, 1)] * 3 + [tiles_of(image, 3, 2)])
    torch.testing.assert_close(made["pixel_values"], expected, atol=1e-5, rtol=0)
    place = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert (made["input_ids"] == place).sum(1).tolist() == [9 * SEQUENCE, 7 * SEQUENCE]
    alone = processor(images=[image], text=["<IMG_CONTEXT>"], return_tensors="pt")
    assert len(alone["pixel_values"]) == 7
    assert "shared_by" not in processor.image_processor.to_dict()
    image.save(qwen / "a.png")
    named = processor(images=[str(qwen / "a.png")], text=["<IMG_CONTEXT>"], return_tensors="pt")
    assert len(named["pixel_values"]) == 7


@pytest.mark.parametrize("name", ["Hermes-2", "internlm2-chat", "internvl2_5", "unknown"])
def test_messages_end_as_the_template_of_the_config_has_it(qwen, capfd, name):
    write_config(qwen, "qwen2", template=name)
    end = "<|im_end|>" if name in ("Hermes-2", "internlm2-chat") else "<|im_end|>\n"
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    chat = native_processor(qwen).apply_chat_template(messages)
    assert chat == f"<|im_start|>user\nA{end}<|im_start|>assistant\nB{end}"
    assert ("which is not known here" in capfd.readouterr().err) == (name == "unknown")


def test_a_config_of_a_newer_transformers_keeps_its_rope(qwen):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    language = {
        "model_type": "qwen2",
        "hidden_size": 8,
        "num_attention_heads": 2,
        "rope_parameters": rope,
    }
    write_config(qwen, "qwen2", llm_config=language)
    config = native_config(json.loads((qwen / "config.json").read_text()), 5)
    assert AutoConfig.for_model(**config).text_config.rope_parameters == rope


def test_chat(qwen):
    processor = native_processor(qwen)
    question = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": question}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        "<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    question[0]["image"] = picture(30, 30)
    ids = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    assert list(ids).count(processor.image_token_id) == SEQUENCE


def test_what_was_made_of_a_checkpoint_keeps_its_processor(qwen):
    before = native_processor(qwen)
    native = native_config(json.loads((qwen / "config.json").read_text()))
    write_json(qwen / "config.json", native)
    after = native_processor(qwen)
    assert after.image_processor.to_dict() == before.image_processor.to_dict()
    assert after.image_seq_length == before.image_seq_length == SEQUENCE


def test_one_tile_where_images_are_not_cut(qwen):
    write_config(qwen, "qwen2", dynamic_image_size=False)
    inputs = native_processor(qwen)(images=[picture(90, 30)], text=["<IMG_CONTEXT>"])
    assert len(inputs["pixel_values"]) == 1
    write_config(qwen, "qwen2", use_thumbnail=False)
    with pytest.raises(CheckpointError, match="without a thumbnail"):
        native_processor(qwen)


def test_a_tokenizer_that_cannot_be_read_is_one_error(qwen):
    config = json.loads((qwen / "tokenizer_config.json").read_text())
    decoder = config["added_tokens_decoder"]
    last = max(decoder, key=int)
    decoder[str(int(last) + 5)] = decoder.pop(last)
    write_json(qwen / "tokenizer_config.json", config)
    with pytest.raises(CheckpointError, match="gives <IMG_CONTEXT> a different id"):
        native_processor(qwen)
    (qwen / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"tokenizer of {qwen} cannot be read"):
        native_processor(qwen)


def write_internlm2(tmp_path, add_dummy_prefix=False):
    """The files of an original checkpoint with InternLM2's tokenizer, a sentencepiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    text = [line for line in (__doc__ + Path(__file__).read_text()).splitlines() if line]
    model = io.BytesIO()
    unused = [f"[UNUSED_TOKEN_{n}]" for n in range(len(CHAT_TOKENS))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=450, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=add_dummy_prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", user_defined_symbols=unused, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokens = {token: reference.piece_to_id(token) for token in ("<unk>", "<s>", "</s>")}
    # Chat tokens take the place of unused ones, image tokens come behind the vocabulary.
    tokens |= {t: reference.piece_to_id(old) for t, old in zip(CHAT_TOKENS, unused)}
    tokens |= {t: reference.get_piece_size() + n for n, t in enumerate(IMAGE_TOKENS)}
    write_json(
        tmp_path / "tokenizer_config.json",
        {"added_tokens_decoder": special(tokens), "tokenizer_class": "InternLM2Tokenizer",
         "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
         "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"},
    )  # fmt: skip
    write_config(tmp_path, "internlm2")
    return reference, tokens


def test_tokenizer_of_internlm2(tmp_path):
    reference, tokens = write_internlm2(tmp_path)
    processor = native_processor(tmp_path)
    tokenizer = processor.tokenizer
    for text in ("def test(x):\n    return  12", " leading", "你好 🎉\tend"):
        assert tokenizer(text)["input_ids"] == reference.encode(text)
        assert tokenizer.decode(reference.encode(text)) == text
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    rendered = processor.apply_chat_template(chat)
    ids = processor(images=[picture(30, 30)], text=[rendered])["input_ids"][0]
    expected = [tokens["<s>"], tokens["<|im_start|>"], *reference.encode("user\n"), tokens["<img>"]]
    expected += [tokens["<IMG_CONTEXT>"]] * SEQUENCE + [tokens["</img>"]]
    assert ids == [
        *expected,
        *reference.encode("\nhi"),
        tokens["<|im_end|>"],
        *reference.encode("\n"),
    ]
    again = processor.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True)
    assert list(again[0]).count(tokens["<s>"]) == 1


def test_sentencepiece_models_that_are_not_converted_faithfully_are_refused(tmp_path):
    write_internlm2(tmp_path, add_dummy_prefix=True)
    with pytest.raises(CheckpointError, match="beginnings of words"):
        native_processor(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=f"tokenizer of {tmp_path} cannot be read"):
        native_processor(tmp_path)


def test_a_sentencepiece_model_needs_sentencepiece(tmp_path, monkeypatch):
    write_config(tmp_path, "internlm2")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "InternLM2Tokenizer"})
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DependencyError, match=r"emloc-vlm\[sentencepiece\]"):
        native_processor(tmp_path)
