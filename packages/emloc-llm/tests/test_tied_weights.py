"""Adapters of models whose head is their embeddings: merged, corrected and scored as stock PEFT runs them."""

import json

import pytest
import torch
from llm_reference import load, logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import MismatchError
from emloc.integrations.transformers import untying
from emloc_llm.example import write_model
from emloc_llm.family import LLMFamily

TRAINED = {
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on the head": {"target_modules": ["v_proj", "lm_head"]},
    "lora on the head, embeddings": {
        "target_modules": ["v_proj", "lm_head"], "modules_to_save": ["embed_tokens"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tied") / "base", tie_word_embeddings=True)


def trained(base, folder, batch, **options):
    """What stock PEFT saves, and the logits of the model that it saved."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj"], "init_lora_weights": False}
    model = get_peft_model(load(base), LoraConfig(**{**config, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return str(folder), logits(model, batch)


def merged(base, adapter, folder):
    return emloc.merge(adapter=adapter, model_name_or_path=str(base), output_dir=folder)


def tying(folder):
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("kind", TRAINED)
def test_what_comes_apart_is_stored_apart(tied, tmp_path, batch, kind):
    adapter, expected = trained(tied, tmp_path / "a", batch, **TRAINED[kind])
    assert emloc.verify(path=adapter, model_name_or_path=str(tied))["base_model"] == str(tied)
    folder = merged(tied, adapter, tmp_path / "m")
    torch.testing.assert_close(logits(load(folder), batch), expected, rtol=1e-5, atol=1e-5)
    assert emloc.verify(path=folder)["tensors"] == len(Checkpoint.open(tied).tensors) + 1
    assert not tying(folder)
    if "lora" not in kind:  # which PEFT's own merging puts on the embeddings as well
        stock = PeftModel.from_pretrained(load(tied), adapter).merge_and_unload().state_dict()
        for name, tensor in load(folder).state_dict().items():
            assert torch.equal(tensor, stock[name]), name


def test_what_peft_keeps_tied_stays_tied(tied, tmp_path, batch):
    adapter, expected = trained(
        tied, tmp_path / "a", batch, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    folder = merged(tied, adapter, tmp_path / "m")
    torch.testing.assert_close(logits(load(folder), batch), expected, rtol=1e-5, atol=1e-5)
    assert Checkpoint.open(folder).tensors == Checkpoint.open(tied).tensors
    assert tying(folder)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bart", "bert", "gemma3_text", "mamba"])
def test_whatever_the_parameters_are_called(tmp_path, batch, model_type):
    """Without the base model's prefix, in other places, with a bias that is tied as well."""
    base = tmp_path / "base"
    write_tiny(base, model_type)
    model = load(base)
    names = {id(module): name for name, module in model.named_modules()}
    head = names[id(model.get_output_embeddings())]
    embeddings = names[id(model.get_input_embeddings())]
    target = next(
        name for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != head
    )  # fmt: skip
    for index, module in enumerate((head, embeddings)):
        adapter, expected = trained(
            base, tmp_path / f"a{index}", batch, target_modules=[target], modules_to_save=[module]
        )
        folder = merged(base, adapter, tmp_path / f"m{index}")
        torch.testing.assert_close(logits(load(folder), batch), expected, rtol=1e-4, atol=1e-4)


def test_shards_and_index_hold_what_was_added(tmp_path, batch):
    base = write_model(tmp_path / "base", max_shard_size="40KB", tie_word_embeddings=True)
    adapter, expected = trained(base, tmp_path / "a", batch, modules_to_save=["lm_head"])
    folder = merged(base, adapter, tmp_path / "m")
    torch.testing.assert_close(logits(load(folder), batch), expected, rtol=1e-5, atol=1e-5)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = Checkpoint.open(folder).tensors
    assert index["weight_map"] == {name: info.file for name, info in held.items()}
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in held.values())
    assert held["lm_head.weight"].file == held["model.embed_tokens.weight"].file


def test_both_stored_though_tied(tied, tmp_path, batch):
    """Some files hold the head once more; it is not to win over what was trained."""
    base = tmp_path / "base"
    base.mkdir()
    for path in tied.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for kind in ("head", "embeddings", "lora on the head"):
        adapter, expected = trained(base, tmp_path / kind / "a", batch, **TRAINED[kind])
        folder = merged(base, adapter, tmp_path / kind / "m")
        torch.testing.assert_close(logits(load(folder), batch), expected, rtol=1e-5, atol=1e-5)
        assert not tying(folder)


def test_what_cannot_be_stored_apart_is_refused(tied, tmp_path, batch, monkeypatch):
    adapter, _ = trained(tied, tmp_path / "a", batch, modules_to_save=["lm_head"])
    said = r"changes lm_head\.weight, whose weight is tied to model\.embed_tokens\.weight"
    monkeypatch.setattr(untying, "OPTION", "another_option")  # a config that still ties them
    with pytest.raises(MismatchError, match=said):
        merged(tied, adapter, tmp_path / "m")
    monkeypatch.setattr(LLMFamily, "untied_config", lambda *_: None)
    with pytest.raises(MismatchError, match=said):
        merged(tied, adapter, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_forward_that_asks_for_the_option_cannot_do_without():
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    config = UMT5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=40,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = UMT5ForConditionalGeneration(config)
    assert untying.untied_config(Checkpoint("x", None, config.to_dict(), {}), model) is None


@pytest.mark.parametrize("modules", ["embed_tokens", "lm_head", "embed_tokens,lm_head"])
def test_the_limit_is_chosen_by_the_loss_that_stock_peft_has(tied, tiny, tmp_path, modules, batch):
    data = {"dataset": str(tiny.data), "max_length": 96}
    emulator = emloc.compress(
        model_name_or_path=str(tied),
        output_dir=tmp_path / "e",
        format="low_rank",
        keep_ratio=0.5,
        **data,
    )
    adapter = emloc.train(
        emulator=str(emulator), output_dir=tmp_path / "a", max_steps=3, lora_r=3,
        learning_rate=1e-2, lora_modules_to_save=modules, **data,
    )  # fmt: skip
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(emulator), output_dir=tmp_path / "c",
        limit_candidates="0.0,none", num_calibration_samples=24, **data,
    )  # fmt: skip
    summary = Manifest.read(corrected).summary
    folder = emloc.merge(adapter=str(corrected), output_dir=tmp_path / "m")
    adapted = PeftModel.from_pretrained(load(tied), corrected).eval()
    torch.testing.assert_close(
        logits(load(folder), batch), logits(adapted, batch), rtol=1e-4, atol=1e-4
    )
    for options in ({"model_name_or_path": str(tied), "adapter": str(corrected)},
                    {"model_name_or_path": str(folder)}):  # fmt: skip
        scores = emloc.evaluate(max_new_tokens=0, **options, **data)
        assert scores["loss"] == pytest.approx(
            summary["calibration_loss"][summary["limit"]], rel=1e-4
        )
