"""Emulators whose embeddings and head are held in few bits, as a user has them."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.compression import emulator_folder
from emloc.errors import CheckpointError, ConfigError, NumericalError
from emloc.extend.plugins import family_named
from emloc.layers.coded_table import CodedEmbedding, CodedHead, TiedHead
from emloc_llm.example import write_model, write_rows

SIZES = {"format": "quantized", "bits": 8}
IDS = torch.arange(20)[None] + 40


@pytest.fixture(scope="module", params=["apart", "tied"])
def example(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    return llm(root, tie_word_embeddings=request.param == "tied")


def llm(root, **overrides):
    model = write_model(root / "model", **overrides)
    data = write_rows(root / "train.jsonl", 24, 0)
    return {"model_name_or_path": str(model), "dataset": str(data), "max_length": 96}


@pytest.fixture(scope="module")
def emulator(example, tmp_path_factory):
    return emloc.compress(
        output_dir=tmp_path_factory.mktemp("e") / "e", embedding_bits=8, **SIZES, **example
    )


def nbytes(folder):
    return sum(info.nbytes for info in Checkpoint.open(str(folder)).tensors.values())


def test_plans_know_the_bytes_on_disk_and_held(example, emulator):
    options = {k: v for k, v in example.items() if k != "dataset"}
    plan = emloc.plan(embedding_bits=8, **SIZES, **options)
    held = AutoModelForCausalLM.from_pretrained(emulator)
    assert plan["stages"]["compress"]["disk_bytes"]["lines"]["emulator"] == nbytes(emulator)
    assert plan["stages"]["train"]["device_bytes"]["lines"]["weights"] == nbytes(emulator)
    assert sum(p.numel() * p.element_size() for p in held.parameters()) == nbytes(emulator)
    assert Manifest.read(emulator).summary["emulator_bytes"] == nbytes(emulator)
    without = emloc.plan(**SIZES, **options)
    assert plan["bits_per_weight"] == without["bits_per_weight"]  # of the layers alone
    assert plan["emulator_bytes"] == nbytes(emulator) < without["emulator_bytes"]
    if not held.config.tie_word_embeddings:
        return  # once is enough of what takes long
    traced = emloc.plan(embedding_bits=8, use_dora=True, **SIZES, **options)
    assert traced["activations"] == "trace"
    assert traced["stages"]["train"]["device_bytes"]["lines"]["weights"] == nbytes(emulator)


def test_it_is_near_the_base_and_loads_with_stock_transformers(example, emulator, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(example["model_name_or_path"])
    held = AutoModelForCausalLM.from_pretrained(emulator)
    assert isinstance(held.get_input_embeddings(), CodedEmbedding)
    kind = TiedHead if base.config.tie_word_embeddings else CodedHead
    assert type(held.get_output_embeddings()) is kind
    for part in ("get_input_embeddings", "get_output_embeddings"):
        weight = getattr(base, part)().weight.detach()
        assert (getattr(held, part)().weight - weight).norm() < 0.03 * weight.norm()
    with torch.no_grad():
        near, logits = held(IDS).logits, base(IDS).logits
        assert (near - logits).norm() < 0.1 * logits.norm()
        held.tie_weights()
        held.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
        assert again(IDS).logits.dtype == torch.bfloat16
        assert torch.equal(again.to(torch.float32)(IDS).logits, near) or held.dtype != torch.float32
    entry = json.loads((emulator / "config.json").read_text())["quantization_config"]
    assert [table["bits"] for table in entry["tables"]] == [8] * (1 if kind is TiedHead else 2)


def test_all_stages(example, emulator, tmp_path):
    data = {k: v for k, v in example.items() if k != "model_name_or_path"}
    assert emloc.verify(path=emulator)["kind"] == "emulator"
    adapter = emloc.train(
        emulator=str(emulator), output_dir=tmp_path / "a", max_steps=2, lora_r=3,
        learning_rate=1e-2, memory="2GiB", **data,
    )  # fmt: skip
    assert Manifest.read(adapter).summary["train_weight_bytes"] > nbytes(emulator)
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(emulator), output_dir=tmp_path / "c", limit="none",
        **data,
    )  # fmt: skip
    merged = emloc.merge(adapter=str(corrected), output_dir=tmp_path / "m")
    assert emloc.verify(path=merged)["kind"] == "merged_model"
    scores = emloc.evaluate(
        model_name_or_path=str(emulator), adapter=str(adapter), dataset=data["dataset"],
        num_samples=2, num_answers=1,
    )  # fmt: skip
    assert scores["loss"] > 0
    for module in ("lm_head", "embed_tokens"):
        with pytest.raises(ConfigError, match=f"{module} is compressed in the emulator"):
            emloc.train(emulator=str(emulator), output_dir=tmp_path / "b", max_steps=1,
                        lora_modules_to_save=[module], **data)  # fmt: skip


def test_a_lora_on_the_head_is_corrected(example, emulator, tmp_path):
    """By stock PEFT, which saves codes beside it: the corrected sum is the emulator's where A reads."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(emulator), config)
    model(IDS, labels=IDS).loss.backward()
    assert model.get_submodule("base_model.model.lm_head.lora_B.default").weight.grad is not None
    model.save_pretrained(tmp_path / "a")
    data = {k: v for k, v in example.items() if k != "model_name_or_path"}
    emloc.correct(adapter=str(tmp_path / "a"), emulator=str(emulator), limit="none",
                  output_dir=tmp_path / "c", **data)  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(example["model_name_or_path"])
    tuned = PeftModel.from_pretrained(base, tmp_path / "c")
    for name in ("lm_head", "model.layers.0.self_attn.q_proj"):
        trained, now = (m.get_submodule(f"base_model.model.{name}") for m in (model, tuned))
        read = trained.lora_A["default"].weight.detach().T
        sums = [
            (m.base_layer.weight + 0) @ read + m.get_delta_weight("default") @ read
            for m in (trained, now)
        ]
        torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-4)


def test_reruns_and_resumed_runs_give_the_same_bytes(example, emulator, tmp_path, monkeypatch):
    options = {"embedding_bits": 8, **SIZES, **example}
    write = emulator_folder.write_table

    def killed(*given):
        write(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(emulator_folder, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        emloc.compress(output_dir=tmp_path / "again", **options)
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(emulator_folder, "write_table", write)
    again = emloc.compress(output_dir=tmp_path / "again", **options)
    assert Manifest.read(again).files == Manifest.read(emulator).files


def test_damage_is_found(emulator, tmp_path):
    path = next(p for p in sorted(emulator.glob("*.safetensors"))
                if "model.embed_tokens.codes" in load_file(p))  # fmt: skip
    for file in emulator.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path)
    del tensors["model.embed_tokens.scales"]
    save_file(tensors, tmp_path / path.name, metadata={"format": "pt"})
    manifest = json.loads((tmp_path / "emloc.json").read_text())
    manifest |= {"format": 1, "files": {}}  # of before every file was listed and all was sealed
    del manifest["seal"]
    (tmp_path / "emloc.json").write_text(json.dumps(manifest))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.embed_tokens.scales"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="embed_tokens.scales of .* should be .* is missing"):
        emloc.verify(path=tmp_path)
    with pytest.raises(CheckpointError, match="have no model.embed_tokens.scales"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_vision_language_model(tmp_path):
    family = family_named("vlm")
    example = family.write_example(tmp_path, seed=0)
    few = {"embedding_bits": 4, **SIZES}
    folder = emloc.compress(output_dir=tmp_path / "e", num_calibration_samples=4, **few, **example)
    assert emloc.verify(path=folder)["kind"] == "emulator"
    held = family.load(Checkpoint.open(str(folder)), "auto", "cpu")
    assert isinstance(held.get_input_embeddings(), CodedEmbedding)
    assert sum(p.numel() * p.element_size() for p in held.parameters()) == nbytes(folder)
    options = {k: v for k, v in example.items() if k not in ("dataset", "image_folder")}
    plan = emloc.plan(**few, **options)
    assert plan["stages"]["train"]["device_bytes"]["lines"]["weights"] == nbytes(folder)


def test_what_cannot_be_is_one_sentence(tmp_path):
    diffusion = family_named("diffusion").write_example(tmp_path / "d", seed=0)
    with pytest.raises(ConfigError, match="is a model without a vocabulary; leave embedding_bits"):
        emloc.compress(output_dir=tmp_path / "e", embedding_bits=8, **SIZES, **diffusion)
    broken = llm(tmp_path, tie_word_embeddings=False)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][200, 7] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="Layer lm_head: its weight holds NaN"):
        emloc.compress(output_dir=tmp_path / "e", embedding_bits=8, **SIZES, **broken)
    assert not (tmp_path / "e").exists()


def test_on_the_pretended_device(emulator):
    """Lookups, and gradients of what enters the head."""
    from emloc.testing import pretend_device

    def gradient(device):
        held = family_named("llm").load(Checkpoint.open(str(emulator)), "float32", device)
        x = held.get_input_embeddings()(IDS.to(device)).requires_grad_(True)
        held.get_output_embeddings()(x).square().sum().backward()
        return x.grad.cpu()

    with pretend_device():
        on_card = gradient("cuda")
    torch.testing.assert_close(on_card, gradient("cpu"))
