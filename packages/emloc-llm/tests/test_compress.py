"""Compression of checkpoints on disk, against dense float64 computations on the whole model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from llm_reference import best_error, layer_inputs, load, logits
from safetensors.torch import load_file, save_file

import emloc
import emloc_llm
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig
from emloc.errors import CheckpointError, ConfigError, DataError, NumericalError, OutputError
from emloc.extend.plugin_options import with_plugin_options
from emloc_llm.example import write_model, write_rows
from emloc_llm.family import LLMFamily

VARIANTS = {
    "llama": {},
    "llama-sharded": {"max_shard_size": "40KB"},
    "llama-bf16": {"dtype": torch.bfloat16},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-bf16-sharded": {
        "model_type": "qwen2", "dtype": torch.bfloat16, "max_shard_size": "40KB",
    },
}  # fmt: skip


def compress(base, data, output, **options):
    """In low rank: what these tests look at besides is the same for every format."""
    return emloc.compress(
        model_name_or_path=str(base), dataset=str(data), output_dir=output, max_length=96,
        format="low_rank", **options,
    )  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base = write_model(root / "base", **VARIANTS[request.param])
    return base, write_rows(root / "train.jsonl", 24, seed=1)


@pytest.mark.parametrize("share_factors", [True, False])
def test_every_layer_is_the_dense_optimum(variant, tmp_path, share_factors):
    base, data = variant
    folder = compress(base, data, tmp_path / "e", keep_ratio=0.5, share_factors=share_factors)
    manifest = Manifest.read(folder)
    model, emulator = load(base), load(folder)
    config = with_plugin_options(CompressConfig)(
        model_name_or_path=str(base), output_dir="x", dataset=str(data), max_length=96
    )
    batches = LLMFamily().calibration_batches(Checkpoint.open(base), config)
    inputs = layer_inputs(model, batches, manifest.layers)
    groups = {len(entry["layers"]) for entry in manifest.layers.values()}
    assert groups == ({1, 2, 3} if share_factors else {1})
    # Rounding the factors to the base's dtype is part of the emulator, not of the optimum.
    slack = 1e-4 if "bf16" not in str(base) else 0.02
    for owner, entry in manifest.layers.items():
        weight = torch.cat([model.get_submodule(n).weight for n in entry["layers"]]).double()
        compressed = torch.cat([emulator.get_submodule(n).weight for n in entry["layers"]]).double()
        x = inputs[owner]
        total = (weight @ x.T).norm()
        best = best_error(weight, x, entry["rank"])
        error = ((weight - compressed) @ x.T).norm()
        assert best * (1 - 1e-4) <= error + 1e-6 * total
        assert error <= best * (1 + slack) + slack * total * 0.1
        assert entry["relative_error"] == pytest.approx(float(best / total), abs=2e-4)
        assert entry["tokens"] == x.shape[0]  # padding was not counted


def test_full_rank_equals_the_base(variant, tmp_path, batch):
    base, data = variant
    folder = compress(base, data, tmp_path / "e", rank_pattern={".*": 10_000})
    tolerance = 1e-4 if "bf16" not in str(base) else 0.25
    torch.testing.assert_close(
        logits(load(folder), batch), logits(load(base), batch), rtol=0, atol=tolerance
    )


def test_what_is_not_compressed_is_the_base_bit_for_bit(variant, tmp_path, capfd):
    base, data = variant
    folder = compress(base, data, tmp_path / "e", exclude=["q_proj", r"0\.mlp\..*"])
    assert "6 weights stay dense (excluded): model.layers.0" in " ".join(
        capfd.readouterr().err.split()
    )
    manifest = Manifest.read(folder)
    assert manifest.kept_dense["model.layers.1.self_attn.q_proj"] == "excluded"
    assert not any(n.startswith("model.layers.0.mlp") for n in manifest.layers)
    before, after = Checkpoint.open(base), Checkpoint.open(folder)
    factored = {f"{n}.weight" for e in manifest.layers.values() for n in e["layers"]}
    for name in before.tensors:
        assert (name in after.tensors) == (name not in factored)
        if name in after.tensors:
            assert torch.equal(before.read(name), after.read(name))
            assert before.tensors[name].dtype == after.tensors[name].dtype


def test_parameters_kept_and_bytes_are_as_said(tiny):
    manifest = Manifest.read(tiny.emulator)
    for entry in manifest.layers.values():
        dense = sum(entry["d_out"]) * entry["d_in"]
        assert entry["rank"] * (sum(entry["d_out"]) + entry["d_in"]) <= 0.5 * dense
    held = sum(p.numel() * p.element_size() for p in load(tiny.emulator).parameters())
    assert manifest.summary["emulator_bytes"] == held
    assert held < manifest.summary["base_bytes"]
    assert manifest.measured["seconds"] > 0
    assert manifest.measured["peak_bytes"] > 0
    assert manifest.base_model.name_or_path == str(tiny.base)


def test_ratios_and_ranks_per_layer(tiny, tmp_path):
    folder = compress(
        tiny.base, tiny.data, tmp_path / "e", keep_ratio=0.5,
        keep_ratio_pattern={"down_proj": 0.2}, rank_pattern={"v_proj": 3},
    )  # fmt: skip
    layers = Manifest.read(folder).layers
    assert layers["model.layers.0.mlp.down_proj"]["rank"] == int(0.2 * 48 * 80 / 128)
    # v_proj has a rank of its own, so it leaves the group of q and k.
    assert layers["model.layers.0.self_attn.v_proj"]["rank"] == 3
    assert [n[-6:] for n in layers["model.layers.0.self_attn.q_proj"]["layers"]] == [
        "q_proj",
        "k_proj",
    ]


def test_dtype_of_the_emulator(tiny, tmp_path):
    folder = compress(tiny.base, tiny.data, tmp_path / "e", dtype="bfloat16")
    assert {i.dtype for i in Checkpoint.open(folder).tensors.values()} == {torch.bfloat16}
    assert {p.dtype for p in load(folder, dtype="auto").parameters()} == {torch.bfloat16}


def test_padding_and_batching_do_not_matter(tiny, tmp_path):
    one = compress(tiny.base, tiny.data, tmp_path / "1", calibration_batch_size=1)
    many = compress(tiny.base, tiny.data, tmp_path / "24", calibration_batch_size=24)
    for (name, a), b in zip(Manifest.read(one).layers.items(), Manifest.read(many).layers.values()):
        assert a["tokens"] == b["tokens"], name
        assert a["relative_error"] == pytest.approx(b["relative_error"], rel=1e-4)


def tree(folder):
    """Bytes of every file; what was measured (time, memory) may differ between runs."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name == "emloc.json":
            content = json.loads(path.read_text())
            content.pop("measured")
            content.pop("seal")  # of what was measured as well
            found[path.name] = content
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_two_runs_are_byte_identical(tiny, tmp_path):
    again = compress(tiny.base, tiny.data, tmp_path / "e", keep_ratio=0.5)
    assert tree(again) == tree(tiny.emulator)


def test_a_complete_emulator_is_not_made_again_nor_overwritten(tiny, capfd):
    before = tree(tiny.emulator)
    assert compress(tiny.base, tiny.data, tiny.emulator, keep_ratio=0.5) == tiny.emulator
    assert "complete already" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(OutputError, match="nothing is ever overwritten"):
        compress(tiny.base, tiny.data, tiny.emulator, keep_ratio=0.4)
    assert tree(tiny.emulator) == before


def test_nothing_to_compress(tiny, tmp_path):
    with pytest.raises(ConfigError, match="keep_ratio 1"):
        compress(tiny.base, tiny.data, tmp_path / "e", keep_ratio=1)
    with pytest.raises(ConfigError, match="excluded"):
        compress(tiny.base, tiny.data, tmp_path / "e", exclude=[".*"])
    assert not (tmp_path / "e").exists()


def broken_copy(base, target, change):
    shutil.copytree(base, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_nan_weight_names_the_layer(tiny, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")

    base = broken_copy(tiny.base, tmp_path / "base", change)
    with pytest.raises(NumericalError, match=r"Layer model\.layers\.1\.mlp\.down_proj"):
        compress(base, tiny.data, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_nan_activation_names_the_layer(tiny, tmp_path):
    def change(tensors):
        tensors["model.layers.2.input_layernorm.weight"][0] = float("inf")

    base = broken_copy(tiny.base, tmp_path / "base", change)
    with pytest.raises(
        NumericalError, match=r"Layer model\.layers\.2\.self_attn\.q_proj: its inputs"
    ):
        compress(base, tiny.data, tmp_path / "e")


def test_shards_that_do_not_fit_the_config(tiny, tmp_path):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 48)

    base = broken_copy(tiny.base, tmp_path / "shape", change)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight of .* is \(3, 48\)"):
        compress(base, tiny.data, tmp_path / "e")
    base = broken_copy(tiny.base, tmp_path / "gone", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"holds no tensor for model\.norm\.weight"):
        emloc.verify(path=base)


def test_an_emulator_is_not_compressed_again(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="already quantised or an emulator"):
        compress(tiny.emulator, tiny.data, tmp_path / "e")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "is empty"),
        ("broken.jsonl", '{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("columns.jsonl", '{"question": "a"}\n', "column_map"),
        ("data.xyz", "a", "ending in"),
    ],
)
def test_bad_data(tiny, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        compress(tiny.base, tmp_path / name, tmp_path / "e")
    with pytest.raises(DataError, match="No data set"):
        compress(tiny.base, tmp_path / "nowhere.jsonl", tmp_path / "e")
    with pytest.raises(DataError, match="No data set nowhere.jsonl"):  # not taken for a hub id
        compress(tiny.base, "nowhere.jsonl", tmp_path / "e")


def test_emulator_loads_as_an_ordinary_checkpoint(tiny):
    assert emloc_llm.quantizer.METHOD == "emloc"
    config = json.loads((tiny.emulator / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "emloc"
    model = load(tiny.emulator)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.is_quantized


def test_layers_too_small_to_shrink_stay_dense_and_are_named(tmp_path, capfd):
    base = write_model(tmp_path / "base", num_attention_heads=1, num_key_value_heads=1, head_dim=1)
    data = write_rows(tmp_path / "train.jsonl", 8, seed=0)
    folder = compress(base, data, tmp_path / "e", keep_ratio=0.5, share_factors=False)
    reason = Manifest.read(folder).kept_dense["model.layers.1.self_attn.k_proj"]
    assert reason == "factors of rank 1 would not be smaller than 1x48"
    assert f"({reason})" in " ".join(capfd.readouterr().err.split())


def test_samples_longer_than_max_length_are_counted(tiny, tmp_path, capfd):
    emloc.compress(
        model_name_or_path=str(tiny.base), dataset=str(tiny.data), output_dir=tmp_path / "e",
        max_length=40,
    )  # fmt: skip
    said = " ".join(capfd.readouterr().err.split())
    assert "calibration samples" in said
    assert "longer than max_length=40 and were truncated" in said


def test_patterns_that_match_nothing_are_refused(tiny, tmp_path):
    for options in (
        {"exclude": ["q_prj"]},
        {"rank_pattern": {"up": 3}},
        {"exclude": r'["x{1,2}"]'},
    ):
        with pytest.raises(ConfigError, match="matches no layer"):
            compress(tiny.base, tiny.data, tmp_path / "e", **options)
    with pytest.raises(DataError, match="has no split 'test'"):
        compress(tiny.base, tiny.data, tmp_path / "e", dataset_split="test")


def test_a_changed_tokenizer_or_config_is_another_input(tiny, tmp_path):
    base = shutil.copytree(tiny.base, tmp_path / "base")
    folder = compress(base, tiny.data, tmp_path / "e")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(OutputError, match="nothing is ever overwritten"):
        compress(base, tiny.data, folder)
