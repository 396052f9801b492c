"""What no later stage could go on with is refused before the first step; what all can, goes through."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import emloc
from emloc.errors import ConfigError
from emloc_llm.example import write_model, write_rows


def test_a_lora_on_an_embedding(tmp_path):
    write_model(tmp_path / "base")
    with pytest.raises(ConfigError, match="embed_tokens is an embedding"):
        emloc.train(
            model_name_or_path=str(tmp_path / "base"), dataset=str(write_rows(tmp_path / "t.jsonl", 4, 1)),
            output_dir=tmp_path / "a", lora_target_modules="q_proj,embed_tokens", max_steps=1, device="cpu",
        )  # fmt: skip
    assert not list(tmp_path.glob("a*"))


def adapted(folder, model, base, **options):
    """Stock PEFT's adapter with random numbers."""
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options))
    peft.save_pretrained(folder, save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(base)})
    )
    return folder


def test_a_head_beside_an_embedding_in_few_bits_is_corrected_by_data(tmp_path):
    """The head reads labelled tokens alone, which are no padding, however many samples there are."""
    base, data = (
        write_model(tmp_path / "base", tie_word_embeddings=True),
        write_rows(tmp_path / "t.jsonl", 8, 1),
    )
    more = {"dataset": str(data), "max_length": 64, "num_calibration_samples": 8, "device": "cpu"}
    emulator = emloc.compress(
        model_name_or_path=str(base), output_dir=tmp_path / "e", format="quantized", bits=3, embedding_bits=4,
        **more,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(emulator)
    adapter = adapted(tmp_path / "a", model, emulator, target_modules=["q_proj", "lm_head"])
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(emulator), output_dir=tmp_path / "c",
        calibration_batch_size=4, **more,
    )  # fmt: skip
    assert "lm_head" in json.loads((corrected / "emloc.json").read_text())["layers"]


def test_a_base_in_float8_takes_a_lora(tmp_path):
    """Added in float32, and rounded once."""
    base = write_model(tmp_path / "base", dtype=torch.bfloat16)
    exact = load_file(base / "model.safetensors")
    kept = {k: v.to(torch.float8_e4m3fn) if "proj" in k else v for k, v in exact.items()}
    save_file(kept, base / "model.safetensors", {"format": "pt"})
    other = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "other"))
    adapter = adapted(tmp_path / "a", other, base, target_modules=["q_proj"])
    merged = load_file(
        emloc.merge(adapter=str(adapter), output_dir=tmp_path / "m") / "model.safetensors"
    )
    lora, stem = load_file(adapter / "adapter_model.safetensors"), "model.layers.0.self_attn.q_proj"
    a, b = (lora[f"base_model.model.{stem}.lora_{part}.weight"] for part in "AB")
    expected = kept[f"{stem}.weight"].float() + 2 * b @ a
    assert torch.equal(merged[f"{stem}.weight"].float(), expected.to(torch.float8_e4m3fn).float())
