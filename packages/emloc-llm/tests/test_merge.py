"""Merging against stock PEFT, bit for bit, and every key accounted for."""

import json
import shutil

import pytest
import torch
from llm_reference import load, logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import MismatchError
from emloc_llm.example import write_model

ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "dora": {"use_dora": True},
}
BASES = {
    "llama": {},
    "sharded-tied": {"max_shard_size": "40KB", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
}


def random_adapter(base, folder, **options):
    model = get_peft_model(
        load(base), LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", **options)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("base_kind", BASES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_equals_merge_and_unload_bit_for_bit(kind, base_kind, tmp_path, batch):
    base = write_model(tmp_path / "base", **BASES[base_kind])
    adapter = random_adapter(base, tmp_path / "a", **ADAPTERS[kind])
    folder = emloc.merge(model_name_or_path=str(base), adapter=adapter, output_dir=tmp_path / "m")
    stock = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    ours, theirs = load(folder).state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert not torch.equal(logits(load(folder), batch), logits(load(base), batch))


def test_layout_is_the_bases_own(tmp_path):
    base = write_model(tmp_path / "base", max_shard_size="40KB", tie_word_embeddings=True)
    adapter = random_adapter(base, tmp_path / "a")
    folder = emloc.merge(model_name_or_path=str(base), adapter=adapter, output_dir=tmp_path / "m")
    before, after = Checkpoint.open(base), Checkpoint.open(folder)
    assert before.tensors == after.tensors  # files, shapes, dtypes; the tied head is not stored
    assert "lm_head.weight" not in after.tensors
    assert (base / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(tmp_path, dtype):
    base = write_model(tmp_path / "base", dtype=dtype)
    adapter = random_adapter(base, tmp_path / "a")
    folder = emloc.merge(model_name_or_path=str(base), adapter=adapter, output_dir=tmp_path / "m")
    lora = load_file(f"{adapter}/adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    weight = Checkpoint.open(base).read(f"{name}.weight")
    merged = Checkpoint.open(folder).read(f"{name}.weight")
    assert merged.dtype == dtype
    exact = weight.double() + (7 / 4) * b @ a
    assert (merged.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps


def test_every_key_must_find_its_weight(tiny, tmp_path):
    adapter = random_adapter(tiny.base, tmp_path / "a")
    path = f"{adapter}/adapter_model.safetensors"
    tensors = load_file(path)
    renamed = {key.replace("layers.2", "layers.7"): value for key, value in tensors.items()}
    save_file(renamed, path)
    with pytest.raises(MismatchError, match=r"7 of 21 layers have no weight.*layers\.7\.mlp"):
        emloc.merge(model_name_or_path=str(tiny.base), adapter=adapter, output_dir=tmp_path / "m")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(1)}, path)
    with pytest.raises(MismatchError, match="lm_head.weight, which belongs neither to a LoRA"):
        emloc.merge(model_name_or_path=str(tiny.base), adapter=adapter, output_dir=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_refusals(tiny, tmp_path):
    with pytest.raises(MismatchError, match="not corrected; run emloc correct"):
        emloc.merge(adapter=str(tiny.adapter), output_dir=tmp_path / "m")
    other = write_model(tmp_path / "other", seed=9)
    with pytest.raises(MismatchError, match="the weights of .* are different"):
        emloc.merge(
            adapter=str(tiny.corrected), model_name_or_path=str(other), output_dir=tmp_path / "m"
        )
    wide = write_model(tmp_path / "wide", intermediate_size=72)
    foreign = random_adapter(tiny.base, tmp_path / "a")
    with pytest.raises(MismatchError, match="48x80, but in .* it is 48x72"):
        emloc.merge(adapter=foreign, model_name_or_path=str(wide), output_dir=tmp_path / "m")


def test_corrected_adapter_merges_and_verifies(tiny, tmp_path, batch):
    folder = emloc.merge(adapter=str(tiny.corrected), output_dir=tmp_path / "m")
    adapted = PeftModel.from_pretrained(load(tiny.base), tiny.corrected).eval()
    torch.testing.assert_close(
        logits(load(folder), batch), logits(adapted, batch), rtol=1e-4, atol=1e-4
    )
    assert emloc.verify(path=folder)["kind"] == "merged_model"
    again = emloc.merge(adapter=str(tiny.corrected), output_dir=tmp_path / "m2")
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_verify_finds_what_is_wrong(tiny, tmp_path):
    from emloc.errors import CheckpointError, NumericalError
    from emloc.testing.resealed import resealed

    assert emloc.verify(path=tiny.emulator)["kind"] == "emulator"
    assert emloc.verify(path=tiny.corrected)["layers"] == 21
    flipped = shutil.copytree(tiny.emulator, tmp_path / "flipped")
    shard = sorted(flipped.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="not what was written"):
        emloc.verify(path=flipped)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        edited = shutil.copytree(tiny.emulator, tmp_path / name)
        text = (edited / name).read_text()
        (edited / name).write_text(text.replace("true", "false", 1) + " ")
        with pytest.raises(CheckpointError, match=f"{name} is not what was written"):
            emloc.verify(path=edited)
    bent = shutil.copytree(tiny.emulator, tmp_path / "bent")
    manifest = json.loads((bent / "emloc.json").read_text())
    first = next(iter(manifest["layers"].values()))
    first["rank"] += 1
    (bent / "emloc.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="its seal differs"):
        emloc.verify(path=bent)
    with pytest.raises(CheckpointError, match="should be"):
        emloc.verify(path=resealed(bent))
    broken = shutil.copytree(tiny.base, tmp_path / "nan")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(NumericalError, match=r"model\.norm\.weight"):
        emloc.verify(path=broken)
    with pytest.raises(MismatchError, match="other weights"):
        emloc.verify(
            path=tiny.corrected, model_name_or_path=str(write_model(tmp_path / "o", seed=5))
        )
