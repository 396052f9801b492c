"""A tower whose states are read in the middle is trained block by block as it is in memory."""

import pytest
import torch
from safetensors.torch import load_file
from test_vlm_architectures import llava
from transformers import AutoModelForImageTextToText

import emloc
from emloc.integrations.transformers.lively_model import lively_model
from emloc_vlm.example import write_rows


@pytest.mark.parametrize("held_back", [0, 2])
def test_later_steps_train_the_tower_too(tmp_path, held_back):
    """transformers begins to record states in the first forward, whichever that is, and goes on for good."""
    config, processor = llava()
    lively_model(AutoModelForImageTextToText, config, 0).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    data = write_rows(tmp_path / "train.jsonl", 8, seed=1)

    def trained(stream):
        folder = emloc.train(
            model_name_or_path=str(tmp_path / "base"), dataset=str(data), output_dir=tmp_path / f"{stream}",
            max_length=300, max_steps=3, per_device_train_batch_size=2, learning_rate=1.0, optim="sgd",
            warmup_ratio=0, device="cpu", lora_r=4, freeze_vision_tower=False, stream=stream,
            num_held_back_samples=held_back,
        )  # fmt: skip
        return load_file(folder / "adapter_model.safetensors")

    streamed, expected = trained(True), trained(False)
    assert any("vision_tower" in name for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(streamed[name], value, rtol=1e-4, atol=1e-5, msg=name)
