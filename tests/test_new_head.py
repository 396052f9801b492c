"""Classifiers made of a masked language model: a head that its checkpoint lacks, through all stages."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import CheckpointError, ConfigError
from emloc.extend.capabilities import native_of
from emloc.extend.losses import loss_sum

own = pytest.mark.parametrize("subject", ["classifier"], indirect=True, scope="session")
HEAD = ["classifier", "pooler"]


@pytest.fixture
def masked(example, tmp_path):
    """The example with the encoder of its model as part of a masked language model, of three classes."""
    folder = tmp_path / "masked"
    source = AutoModelForSequenceClassification.from_pretrained(example["model_name_or_path"])
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(source.config)
    model.bert.load_state_dict(source.bert.state_dict(), strict=False)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{example['model_name_or_path']}/{name}", folder)
    return {**example, "model_name_or_path": str(folder)}


@own
def test_it_goes_through_all_stages(family, masked, tmp_path):
    """Stock transformers and PEFT read what comes of it, without a number that is drawn anew."""
    data = {name: masked[name] for name in ("dataset", "max_length")}
    emulator = emloc.compress(output_dir=tmp_path / "e", **masked)
    assert Manifest.read(emulator).summary["drawn"] == ["bert.pooler", "classifier"]
    adapter = emloc.train(
        emulator=str(emulator), output_dir=tmp_path / "a", max_steps=6, learning_rate=1e-2,
        lora_modules_to_save=HEAD, **data,
    )  # fmt: skip
    corrected = emloc.correct(
        adapter=str(adapter),
        emulator=str(emulator),
        output_dir=tmp_path / "c",
        limit="auto",
        **data,
    )
    merged = emloc.merge(adapter=str(corrected), output_dir=tmp_path / "m")
    for folder in (emulator, adapter, corrected, merged):
        emloc.verify(path=str(folder))
    base, adapted = (
        emloc.evaluate(adapter=one, **masked)["loss"] for one in (None, str(corrected))
    )
    assert adapted < base
    whole = emloc.evaluate(model_name_or_path=str(merged), **data)["loss"]
    assert whole == pytest.approx(adapted, rel=1e-5)

    model, report = AutoModelForSequenceClassification.from_pretrained(
        merged, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert json.loads((merged / "config.json").read_text())["architectures"] == [
        type(model).__name__
    ]
    stock = AutoModelForSequenceClassification.from_pretrained(masked["model_name_or_path"])
    stock = PeftModel.from_pretrained(stock, str(corrected)).eval()
    batch = family.example(model.config, 2, 8)
    batch["input_ids"] += torch.arange(8)
    with torch.no_grad():
        ours, theirs = (loss_sum(family, one, batch).total for one in (model.eval(), stock))
    assert theirs == pytest.approx(ours, rel=1e-4)


@own
def test_every_stage_draws_the_same(family, masked):
    views = [native_of(family, Checkpoint.open(masked["model_name_or_path"])) for _ in range(2)]
    assert views[0].drawn == ("bert.pooler", "classifier")
    torch.manual_seed(7)
    for name in views[0].tensors:
        assert torch.equal(views[0].read(name), views[1].read(name)), name
    weight = views[0].read("classifier.weight")
    assert 0.01 < float(weight.std()) < 0.03  # as transformers draws it
    assert not views[0].read("classifier.bias").any()
    loaded = [family.load(view, "float32", "cpu") for view in views]
    for name, parameter in loaded[0].named_parameters():
        assert torch.equal(parameter, loaded[1].get_parameter(name))


@own
def test_a_head_that_is_not_trained_is_refused(masked, tmp_path):
    data = {name: masked[name] for name in ("dataset", "max_length")}
    emulator = emloc.compress(output_dir=tmp_path / "e", **masked)
    says = "holds no .*, so it is initialised at random and must be trained whole; pass lora_modules_to_save="
    for given in ({"emulator": str(emulator), **data}, masked):
        with pytest.raises(ConfigError, match=says + "classifier,pooler"):
            emloc.train(output_dir=tmp_path / "a", max_steps=1, **given)
        with pytest.raises(ConfigError, match="holds no bert.pooler, so"):
            emloc.train(
                output_dir=tmp_path / "a", max_steps=1, lora_modules_to_save=["classifier"], **given
            )
    assert not (tmp_path / "a").exists()


@own
def test_what_is_asked_for_is_taken_and_gone_on_from(family, masked, tmp_path, monkeypatch):
    """The names that the refusal says, also beside those that PEFT trains unasked; an adapter has its own."""
    data = {name: masked[name] for name in ("dataset", "max_length")}
    monkeypatch.setattr(type(family), "task_type", "SEQ_CLS")
    with pytest.raises(ConfigError, match=r"pass lora_modules_to_save=pooler\."):
        emloc.train(output_dir=tmp_path / "a", max_steps=1, **masked)
    adapter = emloc.train(
        output_dir=tmp_path / "a", max_steps=1, lora_modules_to_save=["pooler"], **masked
    )
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert {"classifier", "pooler"} <= set(written["modules_to_save"])
    more = emloc.train(
        output_dir=tmp_path / "b", adapter=adapter, max_steps=1,
        model_name_or_path=masked["model_name_or_path"], **data,
    )  # fmt: skip
    assert (more / "adapter_model.safetensors").is_file()


@own
def test_a_tensor_of_another_shape_is_refused(family, masked):
    file = Path(masked["model_name_or_path"]) / "model.safetensors"
    tensors = load_file(file)
    name = "bert.encoder.layer.1.output.dense.bias"
    tensors[name] = tensors[name][:1].clone()  # which would be added to all outputs
    save_file(tensors, file, metadata={"format": "pt"})
    view = native_of(family, Checkpoint.open(masked["model_name_or_path"]))
    with pytest.raises(
        CheckpointError, match=rf"tensor {name} is \(1,\), its config.json implies \(48,\)"
    ):
        family.load(view, "float32", "cpu")


@own
def test_a_plan_knows_the_class(masked):
    planned = emloc.plan(model_name_or_path=masked["model_name_or_path"], max_length=32)
    model = AutoModelForSequenceClassification.from_pretrained(masked["model_name_or_path"])
    assert planned["parameters"] == model.num_parameters()


@own
def test_what_else_is_missing_is_refused(family, masked):
    """A block's tensor is no head, whatever class the config names."""
    file = Path(masked["model_name_or_path"]) / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor for bert\.encoder\.layer\.1\.output"):
        native_of(family, Checkpoint.open(masked["model_name_or_path"]))
