"""A LoRA that is trained block by block is the one that is trained in memory, whatever the model stores."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny
from transformers import AutoModelForCausalLM

import emloc
from emloc.extend.opening import open_model
from emloc.streaming.stream import UnitStream
from emloc_llm.example import write_rows


def both(tmp_path, base, **options):
    """The adapters' tensors, streamed and in memory, after three steps."""
    data = write_rows(tmp_path / "train.jsonl", 8, seed=1)

    def trained(stream):
        folder = emloc.train(
            model_name_or_path=str(base), dataset=str(data), output_dir=tmp_path / f"stream-{stream}",
            max_length=64, max_steps=3, per_device_train_batch_size=4, learning_rate=1.0, optim="sgd",
            warmup_ratio=0, device="cpu", stream=stream, **options,
        )  # fmt: skip
        return load_file(folder / "adapter_model.safetensors")

    return trained(True), trained(False)


def assert_equal(streamed, expected, tolerance):
    assert streamed.keys() == expected.keys()
    for name, value in expected.items():
        assert streamed[name].dtype == value.dtype, name
        torch.testing.assert_close(streamed[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", ["hy_v3", "minimax_m2", "nemotron_h"])
def test_buffers_under_older_names(tmp_path, kind):
    """By which routers choose experts."""
    write_tiny(tmp_path / "base", kind)
    assert_equal(*both(tmp_path, tmp_path / "base"), 1e-4)


@pytest.mark.parametrize("kind", ["glm4_moe", "ernie4_5_moe", "gemma2", "nemotron_h"])
def test_what_from_pretrained_keeps_in_float32_beside_bfloat16(tmp_path, kind):
    """A router's bias around 8, of which bfloat16 would keep few bits, and its weight."""
    base = tmp_path / "base"
    write_tiny(base, kind, torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    precise = [n for n in tensors if n.endswith(("correction_bias", "gate.weight", "layer_scalar"))]
    assert precise or kind == "gemma2"
    draw = torch.Generator().manual_seed(0)
    for name in precise:
        tensors[name] = tensors[name] + 8 + 0.05 * torch.rand(tensors[name].shape, generator=draw)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    checkpoint, family = open_model(base)
    stream, seen = UnitStream(family, checkpoint, dtype=torch.bfloat16), set()
    for unit in stream.units:
        with stream.filled(unit):
            for name, tensor in (
                stream.model.get_submodule(unit).state_dict(prefix=f"{unit}.").items()
            ):
                if not tensor.is_meta:
                    assert tensor.dtype == expected[name].dtype, name
                    assert torch.equal(tensor, expected[name]), name
                    seen.add(name)
    assert {n for n in expected if "layers." in n} <= seen


def test_a_router_that_is_trained_whole_beside_its_buffer(tmp_path):
    write_tiny(tmp_path / "base", "glm4_moe")
    whole = {"lora_modules_to_save": "gate", "lora_target_modules": "q_proj"}
    streamed, expected = both(tmp_path, tmp_path / "base", **whole)
    assert any(name.endswith("e_score_correction_bias") for name in expected)
    assert_equal(streamed, expected, 1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_an_embedding_that_is_trained_whole_in_another_precision(tmp_path, kind):
    write_tiny(tmp_path / "base", kind, torch.bfloat16)
    whole = {"lora_modules_to_save": "embed_tokens", "lora_target_modules": "q_proj,v_proj"}
    streamed, expected = both(tmp_path, tmp_path / "base", dtype="float32", **whole)
    assert any("embed_tokens" in name for name in expected)
    assert_equal(streamed, expected, 1e-4)


def test_dora_on_transposed_weights(tmp_path):
    write_tiny(tmp_path / "base", "gpt2")
    assert_equal(*both(tmp_path, tmp_path / "base", use_dora=True), 1e-4)
