"""A folder is to every stage the model that transformers reads in it; what belongs to the model travels."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import CheckpointError
from emloc_llm.example import write_example, write_model

NAME = "model.layers.1.mlp.up_proj.weight"
KINDS = ("single", "shards", "variant", "pickle", "named")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """One model saved in several ways, each time with other weights."""
    root = tmp_path_factory.mktemp("sets")
    sizes = {"shards": "60KB", "named": "60KB"}
    made = {
        kind: write_model(root / kind, seed=i, max_shard_size=sizes.get(kind, "1GB"))
        for i, kind in enumerate(KINDS)
    }
    torch.save(
        load_file(made["pickle"] / "model.safetensors"), made["pickle"] / "pytorch_model.bin"
    )
    return made


def put(kind: str, source: Path, folder: Path) -> None:
    if kind == "single":
        shutil.copy(source / "model.safetensors", folder)
    if kind == "shards":
        for file in source.glob("model*.safetensors*"):
            shutil.copy(file, folder)
    if kind == "variant":
        shutil.copy(source / "model.safetensors", folder / "model.fp16.safetensors")
    if kind == "pickle":
        shutil.copy(source / "pytorch_model.bin", folder)
    if kind == "named":
        for file in source.glob("model-*.safetensors"):
            shutil.copy(file, folder / f"mine-{file.name}")
        index = json.loads((source / "model.safetensors.index.json").read_text())
        index["weight_map"] = {k: f"mine-{v}" for k, v in index["weight_map"].items()}
        (folder / "mine.safetensors.index.json").write_text(json.dumps(index))
        config = json.loads((folder / "config.json").read_text())
        config["transformers_weights"] = "mine.safetensors.index.json"
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "kinds", [c for n in (1, 2, 3) for c in itertools.combinations(KINDS, n)], ids="+".join
)
def test_weights_are_those_that_transformers_reads(sets, tmp_path, kinds):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(sets["single"] / "config.json", folder)
    for kind in kinds:
        put(kind, sets[kind], folder)
    readable = {"single", "shards", "named"} & set(kinds)
    if not readable:
        with pytest.raises(CheckpointError, match="holds no safetensors weights"):
            Checkpoint.open(folder)
        return
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    opened = Checkpoint.open(folder)
    assert torch.equal(opened.read(NAME), stock.state_dict()[NAME])


def test_a_tensor_in_two_shards_is_the_one_that_transformers_reads(sets, tmp_path):
    folder = Path(shutil.copytree(sets["shards"], tmp_path / "model"))
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for other in sorted(set(weight_map.values()) - {weight_map[NAME]}):
        tensors = load_file(folder / other)
        tensors[NAME] = torch.full((80, 48), float(other[6:11]))
        save_file(tensors, folder / other, metadata={"format": "pt"})
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(Checkpoint.open(folder).read(NAME), stock.state_dict()[NAME])


def test_a_merged_model_has_no_index_of_other_weights(tiny, sets, tmp_path):
    folder = Path(shutil.copytree(tiny.base, tmp_path / "model"))
    put("shards", sets["shards"], folder)
    merged = emloc.merge(
        adapter=str(tiny.corrected), model_name_or_path=str(folder), output_dir=tmp_path / "merged"
    )
    assert sorted(f.name for f in merged.glob("model*")) == ["model.safetensors"]


def test_weights_that_the_config_names_are_found_in_what_is_made_of_them(sets, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sets["single"] / name, folder)
    put("named", sets["named"], folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "some words to compress with"}) + "\n")
    emulator = emloc.compress(
        model_name_or_path=str(folder), output_dir=tmp_path / "emulator", dataset=str(rows)
    )
    made = AutoModelForCausalLM.from_pretrained(emulator, dtype=torch.float32)
    norm = "model.norm.weight"
    assert torch.equal(made.state_dict()[norm], Checkpoint.open(sets["named"]).read(norm))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors"])
def test_weights_that_the_config_names_elsewhere_are_refused(sets, tmp_path, name):
    folder = Path(shutil.copytree(sets["single"], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    with pytest.raises(CheckpointError, match="outside"):
        Checkpoint.open(folder)


def test_a_model_beside_an_adapter_is_refused(sets, tmp_path):
    # transformers would load the model that the adapter names.
    folder = Path(shutil.copytree(sets["single"], tmp_path / "model"))
    config = {"base_model_name_or_path": str(sets["pickle"]), "peft_type": "LORA", "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="holds an adapter"):
        Checkpoint.open(folder)


def test_a_part_of_a_distributed_checkpoint_is_refused(sets, tmp_path):
    folder = Path(shutil.copytree(sets["single"], tmp_path / "model"))
    (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="distributed checkpoint"):
        Checkpoint.open(folder)


def test_templates_and_settings_travel(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny.base, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ tools }}" + plain}
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    others = (
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
        "tokenizer.model.v3", "spiece.model", "bpe.codes", "merges.txt", "source.spm", "my.tiktoken",
    )  # fmt: skip
    for name in others:
        (folder / name).write_text("{}")
    emulator = emloc.compress(
        model_name_or_path=str(folder), output_dir=tmp_path / "emulator", format="low_rank", keep_ratio=0.5,
        dataset=str(tiny.data), max_length=96,
    )  # fmt: skip
    merged = emloc.merge(
        adapter=str(tiny.corrected), model_name_or_path=str(folder), output_dir=tmp_path / "merged"
    )
    for made in (emulator, merged):
        assert AutoTokenizer.from_pretrained(made).chat_template == tokenizer.chat_template
        for name in ("generation_config.json", *others):
            assert (made / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_companion_that_is_a_link_to_a_secret_is_refused(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny.base, tmp_path / "model"))
    (tmp_path / "secret").write_text("HF_TOKEN=hf_x")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"vocab.txt is a link that leads out of"):
        emloc.compress(
            model_name_or_path=str(folder), output_dir=tmp_path / "out", dataset=str(tiny.data)
        )
    with pytest.raises(CheckpointError, match=r"vocab.txt is a link that leads out of"):
        emloc.merge(
            adapter=str(tiny.corrected), model_name_or_path=str(folder), output_dir=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_shards_of_a_link_are_refused(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny.base, tmp_path / "model"))
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a link that leads out of"):
        Checkpoint.open(folder)


def test_an_adapter_with_a_template_of_its_own_is_named(tiny, tmp_path, capfd):
    adapter = Path(shutil.copytree(tiny.corrected, tmp_path / "adapter"))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (adapter / name).unlink(missing_ok=True)
    emloc.merge(adapter=str(adapter), output_dir=tmp_path / "plain")
    assert "chat template" not in capfd.readouterr().err
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    emloc.merge(adapter=str(adapter), output_dir=tmp_path / "merged")
    assert "holds another chat template" in " ".join(capfd.readouterr().err.split())


def test_a_config_of_a_hundred_thousand_blocks_is_refused_before_it_is_built(tmp_path):
    """Building them empty takes minutes."""
    options = write_example(tmp_path, seed=0)
    path = Path(options["model_name_or_path"]) / "config.json"
    config = json.loads(path.read_text())
    for change in ({"num_hidden_layers": 10**5}, {"text_config": {"num_hidden_layers": 10**5}}):
        path.write_text(json.dumps({**config, **change}))
        for stage in (emloc.compress, emloc.plan):
            with pytest.raises(CheckpointError, match="num_hidden_layers = 100000 asks for more"):
                stage(
                    **options, **({"output_dir": tmp_path / "e"} if stage is emloc.compress else {})
                )
    assert not (tmp_path / "e").exists()
