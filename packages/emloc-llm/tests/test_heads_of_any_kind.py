"""The loss that training learns from is that of the model's own logits, whatever its head is."""

import json

import pytest
import torch
from tiny_models import byte_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

import emloc
from emloc.integrations.transformers.lively_model import lively_model
from emloc_llm import training
from emloc_llm.example import write_rows

KINDS = {
    "llama": "its head is a weight, and TRL's way is taken",
    "modernbert-decoder": "a layer and a norm before the weight",
    "recurrent_gemma": "logits are bounded behind it, under a name of its own",
    "roberta": "a layer and a norm before the weight",
}


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_evaluate_see_one_loss(tmp_path, monkeypatch, capfd, kind):
    """Also where TRL would take the loss itself, as on GPUs and for many tokens."""
    monkeypatch.setattr(training.Trainer, "_fits_a_tile", lambda self, labels: False)
    config = tiny_config(kind)
    config.is_decoder, config.hidden_dropout_prob, config.attention_probs_dropout_prob = (
        True,
        0.0,
        0.0,
    )
    lively_model(AutoModelForCausalLM, config, 0).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    data = str(write_rows(tmp_path / "train.jsonl", 4, seed=1))
    options = {"model_name_or_path": str(tmp_path / "base"), "max_length": 64, "device": "cpu"}
    adapter = emloc.train(
        output_dir=tmp_path / "a", dataset=data, max_steps=1, per_device_train_batch_size=4,
        learning_rate=1e-12, logging_steps=1, lora_r=2, **options,
    )  # fmt: skip
    log = (adapter / "trainer_log.jsonl").read_text().splitlines()
    [loss] = [entry["loss"] for entry in map(json.loads, log) if "loss" in entry]
    scored = emloc.evaluate(dataset=data, num_samples=4, max_new_tokens=0, **options)["loss"]
    assert loss == pytest.approx(scored, rel=1e-4)
    told = "is more than a weight" in capfd.readouterr().err
    assert told == (kind != "llama")
    assert torch.isfinite(torch.tensor(loss))
