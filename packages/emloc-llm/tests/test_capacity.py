"""Data that a model has no rows for is refused before any work, and nothing else is."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import emloc
from emloc.errors import CheckpointError, DataError
from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc.integrations.transformers.capacity import capacity_of
from emloc_llm.example import write_model

SMALL = {
    "gpt2": {"n_positions": 20, "n_embd": 16, "n_head": 2, "n_layer": 1},
    "opt": {"max_position_embeddings": 20, "hidden_size": 16, "word_embed_proj_dim": 16,
            "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 18},
    "gptj": {"n_positions": 20, "n_embd": 16, "n_head": 2, "n_layer": 1, "rotary_dim": 4},
    "ctrl": {"n_positions": 20, "n_embd": 16, "n_head": 2, "n_layer": 1, "dff": 18},
    "roberta": {"max_position_embeddings": 20, "hidden_size": 16, "num_attention_heads": 2,
                "num_hidden_layers": 1, "intermediate_size": 18, "is_decoder": True},
    "mpt": {"max_seq_len": 20, "d_model": 16, "n_heads": 2, "n_layers": 1},
    "llama": {"max_position_embeddings": 20, "hidden_size": 16, "num_attention_heads": 2,
              "num_hidden_layers": 1, "intermediate_size": 18},
    "bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(SMALL))
def test_positions_are_those_that_the_model_runs(kind):
    config = AutoConfig.for_model(kind, vocab_size=50, **SMALL[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    found = capacity_of(model)
    assert found.tokens == 50

    def runs(count):
        ids = torch.full((1, count), 7)
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            return False
        return True

    if found.positions is None:
        assert runs(60)
    else:
        assert runs(found.positions)
        assert not runs(found.positions + 1)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return write_model(
        tmp_path_factory.mktemp("short") / "m", "gpt2", n_positions=64, max_position_embeddings=64,
        n_embd=48, n_head=4, n_layer=2, hidden_size=48,
    )  # fmt: skip


def rows(path, *content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def test_samples_beyond_the_positions_are_refused_by_every_stage(short, tmp_path):
    data = {
        "dataset": rows(tmp_path / "d.jsonl", *[{"prompt": "x" * 50, "completion": "y" * 30}] * 4)
    }
    model = {"model_name_or_path": str(short)}
    with pytest.raises(
        DataError, match=r"81 tokens, but the model has 64 positions; pass max_length=64"
    ):
        emloc.compress(output_dir=tmp_path / "e", **model, **data)
    with pytest.raises(DataError, match="81 tokens"):
        emloc.train(output_dir=tmp_path / "t", max_steps=1, **model, **data)
    with pytest.raises(DataError, match="packing fills max_length=1024"):
        emloc.train(output_dir=tmp_path / "t", max_steps=1, packing=True, **model, **data)
    with pytest.raises(DataError, match="81 tokens"):
        emloc.train(output_dir=tmp_path / "t", max_steps=1, streaming=True, **model, **data)
    with pytest.raises(DataError, match=r"20 more to write.* pass max_new_tokens=14"):
        emloc.evaluate(max_length=64, max_new_tokens=20, **model, **data)
    found = emloc.evaluate(max_length=64, max_new_tokens=14, **model, **data)
    assert len(found["answers"]) == 4


def test_added_tokens_without_rows_are_named(tmp_path):
    base = write_model(tmp_path / "m")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(base)
    data = rows(tmp_path / "d.jsonl", *[{"prompt": "a", "completion": "<think>b"}] * 4)
    with pytest.raises(
        CheckpointError, match=r"gives '<think>' the id 259, .* rows for 259 tokens"
    ):
        emloc.compress(model_name_or_path=str(base), dataset=data, output_dir=tmp_path / "e")
    unused = rows(tmp_path / "e.jsonl", *[{"prompt": "a", "completion": "b"}] * 4)
    emloc.compress(model_name_or_path=str(base), dataset=unused, output_dir=tmp_path / "e")


def test_a_tokenizer_without_end_and_padding_is_refused(tmp_path):
    base = write_model(tmp_path / "m")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    data = rows(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(CheckpointError, match="neither pad_token, eos_token nor unk_token"):
        emloc.compress(model_name_or_path=str(base), dataset=data, output_dir=tmp_path / "e")


def test_positions_of_patches_are_no_limit_for_text():
    """GIT decodes text and holds an image encoder of 197 patches."""
    from accelerate import init_empty_weights

    config = AutoConfig.for_model("git")
    config.max_position_embeddings = 333
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    assert capacity_of(model).positions == 333
