"""The loss that training learns from is that of the model's own logits, whatever its head is."""

import json

import pytest
import torch
from tiny_models import MODEL_TYPES, byte_tokenizer, tiny_config
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

import emloc
from emloc.integrations.transformers.lively_model import lively_model
from emloc.integrations.transformers.loss import next_token_loss
from emloc.planning.training import STEPS
from emloc_llm import training
from emloc_llm.example import write_rows
from emloc_llm.heads import HEADS_OF_THEIR_OWN

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
    told = "own logits, so it is taken from whole logits" in capfd.readouterr().err
    assert told == (kind != "llama")
    assert torch.isfinite(torch.tensor(loss))


def test_experts_that_trl_cannot_balance_are_told(tmp_path, monkeypatch, capfd):
    """TRL reads their number under a name that this config has not."""
    monkeypatch.setattr(training.Trainer, "_fits_a_tile", lambda self, labels: False)
    config = tiny_config("granitemoe")
    config.output_router_logits = True
    lively_model(AutoModelForCausalLM, config, 0).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    adapter = emloc.train(
        model_name_or_path=str(tmp_path / "base"), dataset=str(write_rows(tmp_path / "t.jsonl", 4, seed=1)),
        max_length=64, device="cpu", output_dir=tmp_path / "a", max_steps=1, lora_r=2,
    )  # fmt: skip
    told = capfd.readouterr().err
    assert "TRL cannot balance the experts' routers of GraniteMoeForCausalLM" in told
    assert "own logits, so it is taken from whole logits" not in told
    assert (adapter / "adapter_model.safetensors").is_file()


def test_half_precision_is_no_other_head(tmp_path, monkeypatch, capfd):
    """Gemma 2 bounds its logits in its own dtype, and TRL in float32."""
    monkeypatch.setattr(training.Trainer, "_fits_a_tile", lambda self, labels: False)
    for seed in range(4):
        base = tmp_path / f"base{seed}"
        model = lively_model(AutoModelForCausalLM, tiny_config("gemma2"), seed)
        model.to(torch.bfloat16).save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
        emloc.train(
            model_name_or_path=str(base), dataset=str(write_rows(tmp_path / "t.jsonl", 4, seed=1)),
            max_length=64, device="cpu", output_dir=tmp_path / f"a{seed}", max_steps=1, lora_r=2,
        )  # fmt: skip
    assert "own logits, so it is taken from whole logits" not in capfd.readouterr().err


def test_a_plan_counts_the_logits_of_such_a_head(tmp_path, monkeypatch):
    config = tiny_config("modernbert-decoder")
    config.vocab_size = 200_000
    lively_model(AutoModelForCausalLM, config, 0).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")

    def planned(samples):
        made = emloc.plan(
            model_name_or_path=str(tmp_path / "base"), max_length=512, device="cpu",
            per_device_train_batch_size=samples,
        )  # fmt: skip
        return made["ways"][0]["device_bytes"]

    own = planned(8) - planned(4)
    assert own > 2 * 4 * 512 * 200_000 * 4  # logits and their gradient, at least
    monkeypatch.setattr("emloc_llm.family.HEADS_OF_THEIR_OWN", frozenset())
    STEPS._answers.clear()
    assert own > 2 * (planned(8) - planned(4))


@pytest.mark.parametrize("kind", sorted(HEADS_OF_THEIR_OWN & set(MODEL_TYPES)))
def test_a_listed_head_is_not_what_trl_computes(kind):
    config = tiny_config(kind)
    config.is_decoder = True
    model, ids = lively_model(AutoModelForCausalLM, config, 0).eval(), torch.arange(3, 19)[None]
    given = {"input_ids": ids, "labels": ids}
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    with torch.no_grad():
        own, count = next_token_loss(model, given)
        try:
            fused = -model(**given, use_cache=False, fused_lm_head=True).log_probs.sum()
        except (AttributeError, RuntimeError):  # its sizes or names are others
            return
    assert abs(float(own - fused)) > 1e-4 * count
