"""The loss at labelled tokens alone: the same numbers and gradients, and a head that sees no others."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator
from trl import SFTConfig, SFTTrainer

from emloc.errors import DataError, NumericalError
from emloc.extend.losses import LossSum, loss_sum, summed
from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc.integrations.transformers.loss import (
    IGNORED,
    labelled_logits,
    next_token_loss,
    summed_cross_entropy,
)
from emloc.streaming.call import Call
from emloc.streaming.lockstep import lockstep
from emloc_llm.family import LLMFamily
from emloc_llm.training import Trainer

VOCABULARY = 61


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def batch_of(lengths=((3, 11), (6, 9), (1, 4)), width=12, seed=0):
    """Prompts without labels, then answers, then padding."""
    ids = torch.randint(VOCABULARY, (len(lengths), width), generator=torch.manual_seed(seed))
    labels, mask = ids.clone(), torch.zeros_like(ids)
    for row, (prompt, end) in enumerate(lengths):
        labels[row, :prompt] = labels[row, end:] = IGNORED
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def all_logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def reference(model, batch):
    """transformers' own loss."""
    return model(**batch).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_loss_is_transformers_own(dtype, adapted):
    model, batch = small_model(dtype), batch_of()
    if adapted:
        model = get_peft_model(
            model, LoraConfig(target_modules="all-linear", init_lora_weights=False)
        )
    total, terms = next_token_loss(model, batch)
    assert terms == 8 + 3 + 3
    expected = float(reference(model, batch))
    assert float(total) / terms == pytest.approx(
        expected, rel=1e-2 if dtype == torch.bfloat16 else 1e-6
    )


def test_the_head_sees_labelled_positions_only():
    model, batch, seen = small_model(), batch_of(), []
    model.lm_head.register_forward_hook(lambda _, x, y: seen.append((x[0].shape, y.shape)))
    next_token_loss(model, batch)
    assert seen == [((14, 24), (14, VOCABULARY))]
    all_logits(model, batch)  # and afterwards as before
    assert seen[1:] == [((3, 12, 24), (3, 12, VOCABULARY))]


def test_a_model_without_a_head_of_its_own_gives_the_same(monkeypatch):
    model, batch = small_model(), batch_of()
    expected, _ = next_token_loss(model, batch)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(next_token_loss(model, batch)[0], expected, rtol=1e-6, atol=0)


def test_calls_in_lockstep_see_their_own_labels():
    """All of them hang their hooks on the one head before the first of them gets there."""
    model = small_model()
    batches = [batch_of(seed=1), batch_of(((2, 5), (7, 12)), seed=2)]

    class visit:
        def __init__(self, unit):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *problem):
            pass

    calls = [Call(lambda batch=batch: next_token_loss(model, batch)) for batch in batches]
    found = lockstep(model, ["model.layers.0", "model.layers.1", "lm_head"], calls, visit)
    for result, batch in zip(found, batches, strict=True):
        alone, terms = next_token_loss(model, batch)
        torch.testing.assert_close(result[0], alone, rtol=1e-6, atol=0)
        assert result[1] == terms
    assert not model.lm_head._forward_pre_hooks


@pytest.fixture
def make(tmp_path):
    """Makes a trainer of a class."""

    def trainer(kind):
        model = get_peft_model(small_model(), LoraConfig(target_modules="all-linear"))
        options = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False)
        data = [{name: tensor[0].tolist() for name, tensor in batch_of().items()}]
        return kind(
            model=model, args=options, train_dataset=Dataset.from_list(data),
            data_collator=default_data_collator, processing_class=byte_tokenizer(),
        )  # fmt: skip

    return trainer


@pytest.mark.parametrize("items", [None, 20])
def test_the_trainers_loss_and_gradients_are_trls(make, items):
    batch, found = batch_of(), []
    for kind in (SFTTrainer, Trainer):
        trainer = make(kind)
        count = None if items is None else torch.tensor(items)
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
        loss.backward()
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    (theirs, their_gradients), (ours, our_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-6)


def test_logits_that_would_be_larger_than_a_tile_are_left_to_trl(make, monkeypatch):
    """Otherwise a long text, labelled throughout, would take more memory than with TRL."""
    trainer = make(Trainer)
    expected = trainer.compute_loss(trainer.model, batch_of())
    monkeypatch.setattr("emloc_llm.training.TILE_ROWS", VOCABULARY // 3)
    assert trainer._fused_head_is_own(trainer.model, batch_of())
    monkeypatch.setattr("emloc_llm.training.next_token_loss", None)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch_of()), expected)


def test_a_batch_without_labels_has_no_loss(make):
    trainer, batch = make(Trainer), batch_of()
    batch["labels"][:] = IGNORED
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert float(loss) == 0


def test_gradients_flow_through_labelled_logits_alone():
    model, batch = small_model(torch.float64), batch_of()
    full = all_logits(model, batch)[:, :-1][batch["labels"][:, 1:] != IGNORED]
    rest = {name: tensor for name, tensor in batch.items() if name != "labels"}
    found = labelled_logits(model, batch["labels"], lambda: model(**rest))
    torch.testing.assert_close(found, full)
    summed_cross_entropy(found, batch["labels"]).backward()
    ours = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    (reference(model, batch) * len(found)).backward()
    # transformers' loss is taken in float32.
    torch.testing.assert_close(
        ours, model.model.layers[0].mlp.up_proj.weight.grad, rtol=1e-4, atol=1e-5
    )


def packed(length):
    """Two samples behind one another as one, the first answer's and the second prompt's end inside."""
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.manual_seed(4))
    labels = ids.clone()
    labels[0, :3] = labels[0, 7:10] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def masked():
    """Labels with holes, at the first token (which nothing predicts) and the last one."""
    batch = batch_of(((0, 12), (4, 12), (1, 7)))
    batch["labels"][0, 3:5] = IGNORED
    return batch


@pytest.mark.parametrize(
    "batch", [batch_of(), packed(15), masked()], ids=["padded", "packed", "masked"]
)
def test_ours_trls_and_transformers_losses_are_one(make, batch):
    trainer = make(SFTTrainer)
    model = trainer.model.eval()
    with torch.no_grad():
        ours = loss_sum(LLMFamily(), model, batch).mean("It")
        stock = float(reference(model, batch))
        trls = float(trainer.compute_loss(model, dict(batch)))
        mine = float(make(Trainer).compute_loss(model, dict(batch)))
    assert [ours, trls, mine] == pytest.approx([stock] * 3, rel=1e-6, abs=1e-6)


def test_a_loss_of_nothing_or_of_no_number_is_an_error():
    with pytest.raises(DataError, match="Data set x: no token has a label"):
        LossSum(0.0, 0).mean("Data set x")
    for total in (float("nan"), float("inf")):
        with pytest.raises(NumericalError, match="Data set x: the loss is"):
            summed([LossSum(1.0, 2), LossSum(total, 3)]).mean("Data set x")
    assert summed([LossSum(1.0, 2), LossSum(2.0, 4)]).mean("it") == 0.5
