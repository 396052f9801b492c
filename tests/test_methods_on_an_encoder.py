"""The methods that EMLoC is compared with, on a third party's family: encoders that classify texts."""

import json
from dataclasses import replace

import pytest
import torch
from own_families import encoders
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.errors import ConfigError
from emloc.extend.methods import Task
from emloc.extend.plugins import families_for, load_plugins, method_named
from emloc_baselines.bench.cell import run_cell
from emloc_baselines.bench.harness import run_bench
from emloc_baselines.structures import attention_at

PRUNED = ("albert", "bert", "deberta-v2", "distilbert", "electra", "roberta")
OPTIONS = {
    "loram-rand": {"protected_first": 0, "protected_last": 0},
    "loram-stru": {"protected_first": 0, "protected_last": 0},
    "offsite-tuning": {"trained_blocks": 1},
    "upop": {"search_steps": 3},
}
LAYERS = {  # of a block: query, key, value, output, the MLP's first and last
    "albert": ("albert_layers.0.attention", "query", "key", "value", "dense",
               "albert_layers.0.ffn", "albert_layers.0.ffn_output"),
    "distilbert": ("attention", "q_lin", "k_lin", "v_lin", "out_lin", "ffn.lin1", "ffn.lin2"),
    "deberta-v2": ("attention", "self.query_proj", "self.key_proj", "self.value_proj", "output.dense",
                   "intermediate.dense", "output.dense"),
}  # fmt: skip
BERT = (
    "attention",
    "self.query",
    "self.key",
    "self.value",
    "output.dense",
    "intermediate.dense",
    "output.dense",
)


@pytest.fixture(scope="module", autouse=True)
def _discovered():
    with encoders():
        yield


@pytest.fixture
def example(tmp_path, monkeypatch):
    from emloc_encoder import example

    def write(model_type, **sizes):
        monkeypatch.setitem(example.SIZES, model_type, {**example.SIZES[model_type], **sizes})
        return dict(example.write_example(tmp_path / model_type, 0, model_type))

    return write


def task_of(example, method, keep_ratio=0.75, **train):
    base = example.pop("model_name_or_path")
    training = {**example, "max_steps": 3, "per_device_train_batch_size": 4, "lora_r": 3, "lora_alpha": 12,
                "learning_rate": 1e-2, "logging_steps": 1, **train}  # fmt: skip
    compress = {
        **example,
        "format": "low_rank",
        "num_calibration_samples": 8,
        "calibration_batch_size": 3,
    }
    return Task(base, keep_ratio, 0, compress, training, {}, OPTIONS[method])


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(["word", "another one", "x"], padding=True, return_tensors="pt"))


def indices(text):
    runs = (run.partition("-") for run in text.split(","))
    return [i for first, _, last in runs for i in range(int(first), int(last or first) + 1)]


@torch.no_grad()
def without(base, layers, model_type):
    """The base with numbers of zero where the light model has nothing; written by hand for equal heads."""
    attention, query, key, value, output, first, last = LAYERS.get(model_type, BERT)
    for block, entry in layers.items():
        module, kept = base.get_submodule(block), {k: indices(t) for k, t in entry["kept"].items()}
        heads = module.get_submodule(attention)
        size = heads.get_submodule(query).out_features // 4
        rows = {head * size + dim for head in kept["groups"] for dim in kept["dims"]}
        gone = [i for i in range(4 * size) if i not in rows]
        if len(kept["dims"]) == size:
            assert gone, block
        for name in (query, key, value):
            heads.get_submodule(name).weight[gone] = 0
            heads.get_submodule(name).bias[gone] = 0
        heads.get_submodule(output).weight[:, gone] = 0
        neurons = [i for i in range(80) if i not in kept["neurons"]]
        assert neurons, block
        module.get_submodule(first).weight[neurons] = 0
        module.get_submodule(last).weight[:, neurons] = 0
    return base


@pytest.mark.parametrize("model_type", PRUNED)
@pytest.mark.parametrize("method", ["loram-rand", "loram-stru", "upop"])
def test_a_pruned_encoder_is_the_one_whose_parts_are_zero(example, method, model_type, tmp_path):
    given = example(model_type)
    base = given["model_name_or_path"]
    task, built = task_of(given, method), method_named(method).load()
    if (method, model_type) == ("upop", "deberta-v2"):
        with pytest.raises(
            ConfigError, match="divides its scores by a factor that depends on the head size"
        ):
            built.build(task, tmp_path / "light")
        return
    light = built.build(task, tmp_path / "light")
    layers = Manifest.read(light).layers
    assert len(layers) == (1 if model_type == "albert" else 3)
    inputs = inputs_of(base)
    expected = without(load(base), layers, model_type)(**inputs).logits
    logits = load(light)(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert (logits - load(base)(**inputs).logits).abs().max() > 1e-2


@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_an_adapter_comes_back_with_its_head(example, method, tmp_path):
    given = example("roberta", num_hidden_layers=5)
    base = given["model_name_or_path"]
    task = task_of(given, method, lora_modules_to_save=["classifier"])
    built = method_named(method).load()
    light = built.build(task, tmp_path / "light")
    adapter = built.train(task, light, tmp_path / "adapter")
    recovered = built.recover(task, light, adapter, tmp_path / "recovered")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, recovered))
    heads = [name for name in after if ".classifier." in name]
    assert len(heads) == 4
    assert all(torch.equal(before[name], after[name]) for name in heads)
    assert sum(t.square().sum() for t in after.values()) == pytest.approx(
        float(sum(t.square().sum() for t in before.values()))
    )
    adapted = {name.split(".layer.")[1][0] for name in after if ".layer." in name}
    assert adapted == ({"0", "4"} if method == "offsite-tuning" else set("01234"))
    peft = PeftModel.from_pretrained(load(base), recovered).eval()
    inputs = inputs_of(base)
    merged = load(emloc.merge(adapter=str(recovered), output_dir=tmp_path / "merged"))
    with torch.no_grad():
        torch.testing.assert_close(
            peft(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-5
        )


def test_a_thinned_encoder_is_the_one_whose_blocks_are_taken_out(example, tmp_path):
    given = example("bert", num_hidden_layers=5)
    base = given["model_name_or_path"]
    task = task_of(given, "offsite-tuning")
    light = method_named("offsite-tuning").load().build(task, tmp_path / "light")
    kept = [entry["original"] for entry in Manifest.read(light).layers.values()]
    assert 2 < len(kept) < 5
    thinned = load(base)
    thinned.bert.encoder.layer = nn.ModuleList(thinned.get_submodule(name) for name in kept)
    inputs = inputs_of(base)
    with torch.no_grad():
        torch.testing.assert_close(load(light)(**inputs).logits, thinned(**inputs).logits)


@pytest.mark.parametrize("method", ["loram-rand", "offsite-tuning"])
def test_what_is_left_may_be_trained_further(example, method, tmp_path):
    """Alignment, of a model without an output head over words, and distillation."""
    given = example("bert", num_hidden_layers=5)
    data = given["dataset"]
    task, built = task_of(given, method), method_named(method).load()
    plain = load(built.build(task, tmp_path / "plain")).state_dict()
    name = "alignment" if method == "loram-rand" else "distillation"
    further = {name: {"steps": 2, "dataset": data, "batch_size": 2, "max_length": 32}}
    more = replace(task, options={**task.options, **further})
    trained = load(built.build(more, tmp_path / "further")).state_dict()
    changed = {key for key in plain if not torch.equal(plain[key], trained[key])}
    assert any("encoder.layer.1." in key for key in changed)
    outside = {key for key in changed if "encoder.layer" not in key}
    assert bool(outside) == (method == "loram-rand")


def test_what_has_numbers_for_each_head_beside_them_is_no_attention_to_prune():
    """Distances with layers of their own, and sinks."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 30}
    about = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "intermediate_size": 80}
    for shares in (True, False):
        config = AutoConfig.for_model("deberta-v2", **sizes, **about, share_att_key=shares)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        found = attention_at(model, "deberta.encoder.layer.0.attention.self")
        assert (found is not None) == shares
    more = {
        "num_local_experts": 2,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 32,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes, **more))
    assert model.model.layers[0].self_attn.sinks is not None
    assert attention_at(model, "model.layers.0.self_attn") is None
    del model.model.layers[0].self_attn.sinks
    assert attention_at(model, "model.layers.0.self_attn") is not None


@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_what_cannot_be_taken_apart_is_refused_by_name(example, method, tmp_path):
    kind = "albert" if method == "offsite-tuning" else "modernbert"
    sentence = r"Heads and neurons of model.layers.0 \(ModernBertEncoderLayer\) cannot be removed"
    if method == "offsite-tuning":
        sentence = "has no room for 2 trained blocks and one between, of the 1"
    with pytest.raises(ConfigError, match=sentence):
        method_named(method).load().build(task_of(example(kind), method), tmp_path / "light")
    assert not (tmp_path / "light").exists()


def test_all_of_them_stand_in_one_table(example, tmp_path):
    given = example("bert", num_hidden_layers=5)
    data, base = given["dataset"], given["model_name_or_path"]
    names = [
        name for name, entry in load_plugins().methods.items()
        if "encoder" in families_for(entry) and name != "smaller-model"
    ]  # fmt: skip
    assert set(OPTIONS) < set(names)
    out = run_bench(
        {
            "model_name_or_path": base, "output_dir": str(tmp_path / "bench"), "keep_ratio": [0.75],
            "max_length": 32, "train": {"max_steps": 2, "lora_r": 2, "per_device_train_batch_size": 4},
            "compress": {"format": "low_rank", "num_calibration_samples": 4},
            "datasets": {"words": {"dataset": data, "evaluate": {"dataset": data}}},
            "methods": {name: {"method": name, **OPTIONS.get(name, {})} for name in names},
        },
        run=lambda cell, root: run_cell(cell, root),
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {None, *names}
    assert all(0 < row["loss"] < 10 for row in rows)
