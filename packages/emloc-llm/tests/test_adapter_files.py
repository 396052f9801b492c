"""What may be in an adapter's folder: all of it is used as stock PEFT uses it, or refused by name."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from llm_reference import load, logits
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import emloc
from emloc.artefacts.adapter import Adapter
from emloc.errors import CheckpointError, ConfigError, MismatchError, NumericalError
from emloc.testing.resealed import resealed
from emloc_llm.example import write_model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
COPY = "base_model.model.lm_head.base_layer.weight"


def saved(base, folder, save=None, **options):
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(load(base), LoraConfig(**{**config, **options}))
    model.save_pretrained(folder, **(save or {}))
    return folder


def change(folder, tensors=None, **options):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **options}))
    if tensors is not None:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def stages(base, adapter, out, tiny):
    """Every stage that reads an adapter of the base."""
    where = {"adapter": str(adapter), "model_name_or_path": str(base)}
    return [
        lambda: emloc.merge(output_dir=out, **where),
        lambda: emloc.verify(path=str(adapter), model_name_or_path=str(base)),
        lambda: emloc.evaluate(dataset=str(tiny.data), max_new_tokens=0, max_length=96, **where),
    ]


def all_refuse(error, match, base, adapter, out, tiny):
    for stage in stages(base, adapter, out, tiny):
        with pytest.raises(error, match=match):
            stage()
    assert not out.exists()


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj"]])
def test_frozen_copies_are_those_of_the_base(tiny, tmp_path, batch, targets):
    """PEFT saves them beside a LoRA on the head, or where it is asked to."""
    save = {} if "lm_head" in targets else {"save_embedding_layers": True}
    adapter = saved(tiny.base, tmp_path / "a", save, target_modules=targets)
    tensors = load_file(adapter / WEIGHTS)
    copies = [key for key in tensors if ".lora_" not in key]
    assert copies == ([COPY] if "lm_head" in targets else copies)
    assert copies
    merge, verify, evaluate = stages(tiny.base, adapter, tmp_path / "m", tiny)
    adapted = PeftModel.from_pretrained(load(tiny.base), adapter).eval()
    torch.testing.assert_close(
        logits(load(merge()), batch), logits(adapted, batch), rtol=1e-5, atol=1e-5
    )
    assert verify()["base_model"] == str(tiny.base)
    loss = emloc.evaluate(
        model_name_or_path=str(tmp_path / "m"), dataset=str(tiny.data), max_new_tokens=0,
        max_length=96,
    )["loss"]  # fmt: skip
    assert evaluate()["loss"] == pytest.approx(loss, rel=1e-4)
    change(adapter, {**tensors, copies[0]: tensors[copies[0]].bfloat16()})
    verify()  # the base was loaded in bfloat16
    tensors[copies[0]][3, 5] += 0.5
    change(adapter, tensors)
    said = f"holds {copies[0]}, which belongs neither to a LoRA nor to modules_to_save"
    all_refuse(MismatchError, said, tiny.base, adapter, tmp_path / "m2", tiny)


def test_what_peft_saves_with_the_embeddings_is_accounted_for(tiny, tmp_path, batch):
    """Trained copies a second time, and the modules that they stand for."""
    modules = ["embed_tokens", "lm_head"]
    save = {"save_embedding_layers": True}
    adapter = saved(tiny.base, tmp_path / "a", save, modules_to_save=modules)
    tensors = load_file(adapter / WEIGHTS)
    stem = "base_model.model.lm_head"
    assert {
        f"{stem}.weight",
        f"{stem}.original_module.weight",
        f"{stem}.modules_to_save.weight",
    } < (tensors.keys())
    merge, verify, evaluate = stages(tiny.base, adapter, tmp_path / "m", tiny)
    adapted = PeftModel.from_pretrained(load(tiny.base), adapter).eval()
    torch.testing.assert_close(
        logits(load(merge()), batch), logits(adapted, batch), rtol=1e-5, atol=1e-5
    )
    verify()
    assert evaluate()["loss"] > 0
    twice = f"{stem}.modules_to_save.weight"
    change(adapter, {**tensors, twice: tensors[twice] + 1})
    said = r"lm_head\.modules_to_save\.weight, which differs from"
    all_refuse(MismatchError, said, tiny.base, adapter, tmp_path / "m2", tiny)


def test_a_copy_of_an_emulators_weight_does_not_travel(tiny, tmp_path):
    adapter = saved(tiny.emulator, tmp_path / "a", target_modules=["v_proj", "lm_head"])
    assert COPY in load_file(adapter / WEIGHTS)
    options = {"emulator": str(tiny.emulator), "limit": "none"}
    corrected = emloc.correct(adapter=str(adapter), output_dir=tmp_path / "c", **options)
    assert COPY not in load_file(corrected / WEIGHTS)
    scores = emloc.evaluate(
        model_name_or_path=str(tiny.emulator), adapter=str(adapter), dataset=str(tiny.data),
        max_new_tokens=0, max_length=96,
    )  # fmt: skip
    assert scores["loss"] > 0
    tensors = load_file(adapter / WEIGHTS)
    change(adapter, {**tensors, COPY: tensors[COPY] + 1})
    with pytest.raises(MismatchError, match="neither to a LoRA nor to modules_to_save"):
        emloc.correct(adapter=str(adapter), output_dir=tmp_path / "d", **options)
    with pytest.raises(MismatchError, match="neither to a LoRA nor to modules_to_save"):
        emloc.evaluate(
            model_name_or_path=str(tiny.emulator), adapter=str(adapter), dataset=str(tiny.data),
            max_new_tokens=0, max_length=96,
        )  # fmt: skip


def test_a_head_that_the_base_lacks_is_refused_by_name(tiny, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny.base, num_labels=3)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["q_proj"])
    get_peft_model(classifier, config).save_pretrained(tmp_path / "a")
    said = r"trained score\.weight whole, which .* does not have; a new head"
    all_refuse(MismatchError, said, tiny.base, tmp_path / "a", tmp_path / "m", tiny)


def test_a_vocabulary_that_was_resized_is_refused(tiny, tmp_path):
    model = load(tiny.base)
    model.resize_token_embeddings(model.config.vocab_size + 5)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, config).save_pretrained(tmp_path / "a")
    said = "its vocabulary was resized"
    all_refuse(MismatchError, said, tiny.base, tmp_path / "a", tmp_path / "m", tiny)


def test_other_kinds_are_refused(tiny, tmp_path):
    adapter = saved(tiny.base, tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    said = "lora_embedding_A, a LoRA on an embedding"
    all_refuse(MismatchError, said, tiny.base, adapter, tmp_path / "m", tiny)
    dora = saved(tiny.base, tmp_path / "dora", use_dora=True)
    tensors = load_file(dora / WEIGHTS)
    without = {key: value for key, value in tensors.items() if "layers.1" not in key}
    magnitudes = {key: value for key, value in tensors.items() if "magnitude" not in key}
    change(dora, {**without, **magnitudes})
    all_refuse(CheckpointError, "no .*lora_magnitude_vector", tiny.base, dora, tmp_path / "m", tiny)
    change(dora, tensors, use_dora=False)
    said = "lora_magnitude_vector, which is not LoRA according to its"
    all_refuse(MismatchError, said, tiny.base, dora, tmp_path / "m", tiny)
    for option in ("kasa_config", "use_bdlora", "monteclora_config"):
        plain = saved(tiny.base, tmp_path / option)
        change(plain, **{option: {"x": 1}})
        with pytest.raises(MismatchError, match=f"uses {option}"):
            Adapter.open(str(plain))


@pytest.mark.parametrize("options", [
    {"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")},
    {"lora_alpha": None}, {"alpha_pattern": {"q_proj": 0}},
])  # fmt: skip
def test_an_alpha_that_no_lora_is_trained_with_is_refused(tiny, tmp_path, options):
    adapter = saved(tiny.base, tmp_path / "a")
    change(adapter, **options)
    said = r"gives model\.layers\.0\.self_attn\.q_proj the alpha"
    all_refuse(CheckpointError, said, tiny.base, adapter, tmp_path / "m", tiny)
    change(adapter, lora_alpha=-2, alpha_pattern={})  # takes off what was learnt
    assert Adapter.open(str(adapter)).layers[0].scaling == -0.5


@pytest.mark.parametrize(("options", "said"), [
    ({"lora_alpha": "8"}, "lora_alpha is '8': input should be a valid number"),
    ({"r": True}, "r is True: input should be a valid integer"),
    ({"rank_pattern": "("}, "rank_pattern is '(': input should be a valid dictionary"),
    ({"rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj is -1: input should be greater"),
    ({"modules_to_save": [None]}, "modules_to_save.0 is None: input should be a valid string"),
    ({"alpha_pattern": {"(": 1}}, "Pattern '(' is not a regular expression"),
    ({"rank_pattern": {".*" * 30 + "!": 3}}, "could match"),
])  # fmt: skip
def test_values_of_another_kind_are_refused_by_their_place(tiny, tmp_path, options, said):
    adapter = saved(tiny.base, tmp_path / "a")
    change(adapter, **options)
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        Adapter.open(str(adapter))
    assert str(adapter / "adapter_config.json") in str(caught.value)


def test_nan_is_never_written(tiny, tmp_path):
    """Not even where a stage only copies it."""
    broken = shutil.copytree(tiny.base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    data = {"dataset": str(tiny.data), "max_length": 96}
    said = r"model\.norm\.weight of .*broken.* is NaN or infinite in float32"
    with pytest.raises(NumericalError, match=said):
        emloc.compress(
            model_name_or_path=str(broken),
            output_dir=tmp_path / "e",
            format="low_rank",
            keep_ratio=0.5,
            **data,
        )
    adapter = saved(tiny.base, tmp_path / "a", modules_to_save=["lm_head"])
    with pytest.raises(NumericalError, match=said):
        emloc.merge(adapter=str(adapter), model_name_or_path=str(broken), output_dir=tmp_path / "m")
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.lm_head.weight"][2, 3] = float("inf")
    change(adapter, tensors)
    with pytest.raises(NumericalError, match=r"lm_head\.weight of .* is NaN or infinite"):
        emloc.merge(
            adapter=str(adapter), model_name_or_path=str(tiny.base), output_dir=tmp_path / "m"
        )
    assert not (tmp_path / "e").exists()
    assert not (tmp_path / "m").exists()


def test_what_float16_cannot_hold_is_not_written(tiny, tmp_path):
    narrow = write_model(tmp_path / "half", dtype=torch.float16)
    adapter = saved(narrow, tmp_path / "a")
    tensors = load_file(adapter / WEIGHTS)
    change(adapter, {key: value * 1e4 for key, value in tensors.items()})
    with pytest.raises(NumericalError, match="is NaN or infinite in float16"):
        emloc.merge(adapter=str(adapter), model_name_or_path=str(narrow), output_dir=tmp_path / "m")
    learnt = shutil.copytree(tiny.adapter, tmp_path / "learnt")
    (learnt / "emloc.json").unlink()
    tensors = load_file(learnt / WEIGHTS)
    tiny_a = {k: (v * 1e-3 if "lora_A" in k else v).half() for k, v in tensors.items()}
    change(learnt, tiny_a, lora_alpha=1e-3)
    with pytest.raises(NumericalError, match="does not fit float16"):
        emloc.correct(
            adapter=str(learnt), emulator=str(tiny.emulator), output_dir=tmp_path / "c",
            limit="none",
        )  # fmt: skip
    assert not (tmp_path / "c").exists()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working folder with models in it that are not the base, under names of the base's kind."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_training_names_its_base_for_every_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.root)
    adapter = emloc.train(
        model_name_or_path="base", dataset=str(tiny.data), output_dir=tmp_path / "a", max_steps=2,
        save_steps=1, max_length=96, lora_r=2,
    )  # fmt: skip
    for folder in (adapter, adapter / "checkpoint-1"):
        named = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
        assert named == str(tiny.base)
    assert emloc.verify(path=adapter)["base_model"] == str(tiny.base)


def test_a_relative_base_is_the_one_that_the_manifest_recorded(tiny, tmp_path, elsewhere):
    adapter = emloc.train(
        model_name_or_path=str(tiny.base), dataset=str(tiny.data), output_dir=tmp_path / "a",
        max_steps=1, max_length=96, lora_r=2,
    )  # fmt: skip
    change(adapter, base_model_name_or_path="base")
    write_model(elsewhere / "base", intermediate_size=72)
    with pytest.raises(CheckpointError, match="not what was written"):
        emloc.verify(path=adapter)
    folder = emloc.merge(adapter=str(adapter), output_dir=tmp_path / "m")
    expected = PeftModel.from_pretrained(load(tiny.base), adapter).merge_and_unload().state_dict()
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])
    change(adapter, base_model_name_or_path=str(elsewhere / "base"))  # it has moved, says somebody
    with pytest.raises(CheckpointError, match="No folder /gone"):
        emloc.merge(adapter=str(moved(adapter, tmp_path / "b", "base")), output_dir=tmp_path / "m2")
    with pytest.raises(MismatchError, match="the weights of .*elsewhere/base are different"):
        named = moved(adapter, tmp_path / "d", str(elsewhere / "base"))
        emloc.merge(adapter=str(named), output_dir=tmp_path / "m2")


def moved(adapter, folder, name):
    """The adapter with a manifest whose base is gone, and another name in PEFT's config."""
    shutil.copytree(adapter, folder)
    change(folder, base_model_name_or_path=name)
    manifest = json.loads((folder / "emloc.json").read_text())
    manifest["base_model"]["name_or_path"] = "/gone/base"
    (folder / "emloc.json").write_text(json.dumps(manifest))
    return resealed(folder)


@pytest.mark.parametrize("name", ["base", "./base", "models/of/mine", "../base"])
def test_a_relative_base_that_nothing_resolves_is_asked_for(tiny, tmp_path, elsewhere, name):
    adapter = saved(tiny.base, tmp_path / "a")
    change(adapter, base_model_name_or_path=name)
    decoy = Path(os.path.normpath(elsewhere / name))
    shutil.copytree(tiny.base, decoy)
    with pytest.raises(ConfigError, match=r"names its base model .*; pass model_name_or_path"):
        emloc.merge(adapter=str(adapter), output_dir=tmp_path / "m")
    assert emloc.verify(path=adapter)["base_model"] is None
    folder = emloc.merge(
        adapter=str(adapter), model_name_or_path=str(tiny.base), output_dir=tmp_path / "m"
    )
    assert emloc.verify(path=folder)["kind"] == "merged_model"


def test_an_absolute_base_is_found_without_a_manifest(tiny, tmp_path):
    adapter = saved(tiny.base, tmp_path / "a")
    change(adapter, base_model_name_or_path=str(tiny.base))
    assert emloc.verify(path=adapter)["base_model"] == str(tiny.base)
    assert emloc.merge(adapter=str(adapter), output_dir=tmp_path / "m").is_dir()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_a_manifest_cannot_name_files_outside_of_its_folder(tiny, tmp_path, name):
    adapter = shutil.copytree(tiny.corrected, tmp_path / "a")
    (tmp_path / "outside").write_text("x")
    manifest = json.loads((adapter / "emloc.json").read_text())
    manifest["files"][name] = "0" * 64
    (adapter / "emloc.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="lies outside|name of a file in the folder"):
        emloc.verify(path=adapter)
    with pytest.raises(CheckpointError, match="lies outside"):
        Adapter.open(str(adapter)).with_parts(["../b"])


def test_an_adapter_of_other_widths_is_refused_on_an_emulator(tiny, tmp_path):
    """An emulator's weights are in other forms, whose shapes nobody can compare with; PEFT's are there."""
    other = write_model(tmp_path / "wide", hidden_size=64)
    adapter = str(saved(other, tmp_path / "a"))
    said = "q_proj is 64x64, but in the model it is 64x48; the adapter was trained for another"
    with pytest.raises(MismatchError, match=said):
        emloc.train(
            emulator=str(tiny.emulator), adapter=adapter, dataset=str(tiny.data), max_steps=1,
            output_dir=tmp_path / "out",
        )  # fmt: skip
    with pytest.raises(MismatchError, match=said):
        emloc.evaluate(
            model_name_or_path=str(tiny.emulator), adapter=adapter, dataset=str(tiny.data),
            max_new_tokens=0, allow_mismatch=True,
        )  # fmt: skip
