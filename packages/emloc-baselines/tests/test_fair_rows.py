"""What makes the rows of a bench comparable: no choice by test data, equal bytes, and a gain that is one."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import emloc_diffusion.example
from emloc.errors import ConfigError
from emloc.extend.methods import Task
from emloc_baselines.bench.cells import prepare_data
from emloc_baselines.bench.config import read_config
from emloc_baselines.bench.tables import gains_recovered
from emloc_baselines.offsite import OffsiteTuning
from emloc_baselines.thinning import thinned_config, with_derived
from emloc_llm.example import write_model, write_rows


def test_no_rate_is_chosen_by_test_data(tmp_path):
    base, data = (
        write_model(tmp_path / "base"),
        str(write_rows(tmp_path / "train.jsonl", 8, seed=1)),
    )
    given = {
        "model_name_or_path": str(base), "output_dir": str(tmp_path / "bench"), "methods": ["lora"],
        "train": {"learning_rate": [1e-3, 1e-2]}, "validation_samples": 0,
        "datasets": {"words": {"dataset": data}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no data to choose them by except those of the test"):
        prepare_data(read_config(given), "words")
    assert prepare_data(read_config({**given, "validation_samples": 2}), "words").validation
    one = read_config({**given, "train": {"learning_rate": 1e-3}})
    assert prepare_data(one, "words").validation is None


def test_pictures_under_another_name_are_no_way_around_it(tmp_path):
    example = emloc_diffusion.example.write_example(tmp_path / "pipe", 0)
    given = {
        "model_name_or_path": str(example["model_name_or_path"]), "output_dir": str(tmp_path / "bench"),
        "methods": ["lora"], "train": {"learning_rate": [1e-3, 1e-2]},
        "datasets": {"dog": {"instance_data_dir": str(example["dataset"])}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no data to choose them by"):
        prepare_data(read_config(given), "dog")


@pytest.mark.parametrize(("lora", "gain"), [(0.5, 0.8), (1.0, None), (1.05, None)])
def test_there_is_a_gain_only_where_lora_gains(lora, gain):
    rows = [("base", None, 1.0), ("lora", "lora", lora), ("emloc", "emloc", 0.6)]
    records = [
        {"label": label, "method": method, "dataset": "d", "seed": 0, "loss": loss}
        for label, method, loss in rows
    ]
    gains = {record["label"]: record["gain"] for record in gains_recovered(records)}
    assert gains.get("emloc") == (None if gain is None else pytest.approx(gain))


def test_a_budget_of_embeddings_in_few_bits_is_refused(tmp_path):
    base, data = (
        write_model(tmp_path / "base", num_hidden_layers=5),
        write_rows(tmp_path / "t.jsonl", 4, 1),
    )
    common = {"dataset": str(data), "max_length": 64}
    compress = {**common, "format": "low_rank", "embedding_bits": 8}
    with pytest.raises(ConfigError, match="embedding_bits=8 would make EMLoC's emulator smaller"):
        OffsiteTuning().build(
            Task(str(base), 0.7, 0, compress, common, {}, {"trained_blocks": 1}), tmp_path / "l"
        )


@pytest.mark.parametrize("kind", ["gemma3_text", "cohere2"])
def test_blocks_stay_of_their_kind_where_a_config_gives_a_pattern(kind):
    """Google's and Cohere's configs say that every sixth or fourth block sees all; the rest is derived."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "num_hidden_layers": 12, "vocab_size": 64, "sliding_window_pattern": 6,
    }  # fmt: skip
    raw = {"model_type": kind, **sizes}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    before = model.config.layer_types
    assert len(set(before)) == 2
    kept = [0, 1, 3, 5, 8, 10, 11]
    light = thinned_config(with_derived(raw, model, 12), 12, kept)
    after = AutoConfig.for_model(**json.loads(json.dumps(light))).layer_types
    assert after == [before[index] for index in kept]
