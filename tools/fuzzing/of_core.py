"""Parsers of core: run files, options, manifests, indices, adapters, headers, notes of interrupted runs."""

import json
import math
import os
from pathlib import Path

import yaml
from safetensors import safe_open

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.layout import components
from emloc.artefacts.manifest import Manifest
from emloc.artefacts.stage_folder import stage_folder
from emloc.artefacts.weight_files import weight_files
from emloc.errors import NumericalError
from emloc.options.overrides import read_overrides
from emloc.options.yaml_file import read_yaml
from emloc.stages.frame import Figures
from emloc.stages.registry import all_stages, run_stages
from emloc.stages.run import plan_stages
from fuzzing.examples import Examples, document
from fuzzing.parser import Parser


def parsers(examples: Examples) -> list[Parser]:
    """All of them."""
    return [
        _run_file(examples), _overrides(examples), _options(examples), _manifest(examples),
        _index(examples), _adapter(examples), _adapter_tensors(examples), _header(examples),
        _pipeline(examples), _settings(examples), _figures(examples),
    ]  # fmt: skip


def finite(value) -> bool:
    """Return whether no number in a value is NaN."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _run_file(examples):
    run = {
        "model_name_or_path": "a/b", "dataset": ["train.jsonl", "more.csv"], "output_dir": "out", "seed": 3,
        "max_length": 96, "column_map": {"question": "prompt"}, "memory": "24GiB",
        "compress": {"keep_ratio": 0.4, "keep_ratio_pattern": {"down_proj": 0.6}, "include": ["lm_head"]},
        "train": {"max_steps": 5, "learning_rate": 1e-4, "lora_r": 3, "lora_target_modules": ["q_proj"]},
        "correct": {"limit": "none"}, "merge": {}, "evaluate": {"dataset": "test.jsonl", "num_samples": 5},
    }  # fmt: skip

    def read(folder):
        plans = plan_stages(read_yaml(folder / "run.yaml"), "run.yaml")
        stages = run_stages()
        return {name: stages[name].checked(given, name) for name, given in plans.items()}

    def means(folder, configs):
        written = yaml.load((folder / "run.yaml").read_text("utf-8"), yaml.BaseLoader)
        assert configs.keys() == written.keys() & run_stages().keys()
        for name, config in configs.items():
            assert finite(config.model_dump(exclude={"limit"})), name
            for key in ("seed", "max_length", "keep_ratio", "max_steps", "learning_rate", "lora_r"):
                section = written[name] if isinstance(written[name], dict) else {}
                text = section.get(key, written.get(key))
                if hasattr(config, key) and text not in (None, "", "~", "null"):
                    assert getattr(config, key) == float(text), (name, key)

    return Parser("run file", examples.empty("run"), "run.yaml", "yaml", [run], read, means, 4)


def _overrides(examples):
    seeds = [
        "train.max_steps=3\nseed=1\nmerge=\ncompress={keep_ratio: 0.3}\noutput_dir=x\nmemory=8GiB",
        'dataset=[a, b]\ncolumn_map={a: b}\nprompt="a, b"',
    ]

    def read(folder):
        lines = (folder / "overrides.txt").read_bytes().decode("utf-8", "surrogateescape")
        return read_overrides(lines.split("\n"), ["compress", "train", "merge"])

    def means(folder, overrides):
        text = (folder / "overrides.txt").read_bytes().decode("utf-8", "surrogateescape")
        for key in overrides.everywhere:
            assert f"{key}=" in text

    return Parser(
        "overrides", examples.empty("overrides"), "overrides.txt", "text", seeds, read, means
    )


def _options(examples):
    seeds = [
        ["compress", {"model_name_or_path": "m", "output_dir": "o", "keep_ratio": "0.3", "bits": "3",
                      "rank_pattern": "q_proj=3,.*mlp.*=4", "memory": "24GiB", "device": "cpu"}],
        ["train", {"emulator": "e", "output_dir": "o", "dataset": "d", "learning_rate": "1e-3",
                   "lora_target_modules": "a,b", "num_train_epochs": "3", "warmup_ratio": "0.1"}],
        ["correct", {"adapter": "a", "emulator": "e", "output_dir": "o", "limit": "3", "strength": "0.5",
                     "strength_candidates": "[0, 0.5]"}],
    ]  # fmt: skip

    def read(folder):
        try:
            name, given = document(folder / "options.json")
            stage, given = all_stages()[name], {str(key): one for key, one in given.items()}
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
            return None  # no options at all
        return stage.checked(given, name)

    def means(folder, config):
        if config is not None:
            assert finite(config.model_dump())

    return Parser(
        "options", examples.empty("options"), "options.json", "json", seeds, read, means, 2
    )


def _manifest(examples):
    folder = examples.empty("manifest")
    seed = document(examples.root / "llm/emulator/emloc.json")

    def means(folder, manifest):
        again = Manifest.model_validate_json(manifest.model_dump_json())
        assert again.files == manifest.files
        assert again.base_model == manifest.base_model
        assert all(size >= 0 for size in manifest.sizes.values())
        for name, digest in manifest.files.items():
            assert not os.path.isabs(name)
            assert ".." not in Path(name).parts
            assert len(digest) == 64

    return Parser("manifest", folder, "emloc.json", "json", [seed], Manifest.read, means)


def _index(examples):
    folder = examples.copy(examples.root / "llm/emulator", "index")
    name = "model.safetensors.index.json"

    def read(folder):
        checkpoint = Checkpoint.open(folder)
        return checkpoint, weight_files(folder, checkpoint.layout, checkpoint.config)

    def means(folder, result):
        checkpoint, files = result
        named = document(folder / name)["weight_map"]
        assert set(named.values()) == files.keys()
        assert named.keys() <= checkpoint.tensors.keys()
        for tensor, file in named.items():
            assert (folder / file).resolve().parent == folder.resolve()
            with safe_open(folder / file, "pt") as shard:
                assert tensor in shard.keys()  # noqa: SIM118 (not a mapping)

    return Parser("index", folder, name, "json", [document(folder / name)], read, means, 3)


def _adapter(examples):
    folder = examples.copy(examples.root / "llm/adapter", "adapter")
    name = "adapter_config.json"

    def means(folder, adapter):
        from peft.utils.other import get_pattern_key

        config = document(folder / name)
        for layer in adapter.layers:
            patterns = config.get("rank_pattern") or {}
            key = get_pattern_key(patterns.keys(), layer.name)
            assert layer.rank == patterns.get(key, config.get("r"))
            alphas = config.get("alpha_pattern") or {}
            key = get_pattern_key(alphas.keys(), layer.name)
            alpha = alphas.get(key, config.get("lora_alpha", 8))
            root = math.sqrt(layer.rank) if config.get("use_rslora") else layer.rank
            assert math.isclose(layer.scaling, alpha / root)

    seed = document(folder / name)
    seed["alpha_pattern"] = {**seed["alpha_pattern"], ".*mlp.*down_proj": 5}
    return Parser("adapter", folder, name, "json", [seed], lambda f: Adapter.open(str(f)), means, 4)


def _adapter_tensors(examples):
    """The tensors of an adapter, which belong to its configuration or do not."""
    folder = examples.copy(examples.root / "llm/adapter", "adapter tensors")
    name = "adapter_model.safetensors"
    content = (folder / name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    size = len(content) - 8 - length

    def means(folder, adapter):
        with safe_open(folder / name, "pt") as file:
            for layer in adapter.layers:
                down, up = file.get_tensor(layer.down_key), file.get_tensor(layer.up_key)
                assert layer.rank == down.shape[0] == up.shape[1]
            held = {layer.down_key for layer in adapter.layers} | {
                key for layer in adapter.layers for key in layer.changed_keys
            }
            held |= set(adapter.saved.values()) | set(adapter.copies.values())
            assert held <= set(file.keys())

    def read(folder):
        adapter = Adapter.open(str(folder))
        adapter.require_finite(lambda key: NumericalError(key))
        return adapter

    seeds = [{"header": header, "data": size}]
    return Parser("adapter tensors", folder, name, "safetensors", seeds, read, means, 4)


def _header(examples):
    folder = examples.empty("header")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]},
        "b.weight": {"dtype": "BF16", "shape": [3], "data_offsets": [96, 102]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [102, 110]},
    }

    def read(folder):
        checkpoint = Checkpoint.open(folder)
        checkpoint.prefetch(checkpoint.tensors)
        return checkpoint, checkpoint.digest()

    def means(folder, result):
        checkpoint, _ = result
        with safe_open(folder / "model.safetensors", "pt") as shard:
            assert set(shard.keys()) == set(checkpoint.tensors)
            for name, info in checkpoint.tensors.items():
                tensor = shard.get_tensor(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)
        assert sum(info.nbytes for info in checkpoint.tensors.values()) <= 110

    seeds = [{"header": header, "data": 110}]
    return Parser(
        "safetensors header", folder, "model.safetensors", "safetensors", seeds, read, means, 1
    )


def _pipeline(examples):
    folder = examples.copy(examples.model("diffusion"), "pipeline")

    def means(folder, kinds):
        listed = document(folder / "model_index.json")
        for name in kinds:
            assert name in listed
            assert (folder / name).resolve().parent == folder.resolve()

    seeds = [document(folder / "model_index.json")]
    return Parser("pipeline index", folder, "model_index.json", "json", seeds, components, means)


def _settings(examples):
    """The settings of an interrupted run, in whose folder the same run would go on."""
    folder = examples.empty("settings")
    settings = {"keep_ratio": 0.4, "family": "llm", "digest": "ab" * 32, "names": ["a", "b"]}
    work = folder / "out.partial"
    work.mkdir()
    (work / "begun.json").write_text("{}")

    def read(folder):
        try:
            with stage_folder(folder / "out", settings):
                raise InterruptedError
        except InterruptedError:
            return True

    def means(folder, result):
        recorded = document(work / "stage_settings.json")
        assert {key: recorded.get(key) for key in ("keep_ratio", "digest", "names")} == {
            key: settings[key] for key in ("keep_ratio", "digest", "names")
        }

    path = "out.partial/stage_settings.json"
    return Parser("settings", folder, path, "json", [settings], read, means, 2)


def _figures(examples):
    folder = examples.empty("figures")
    settings = {"model_digest": "ab" * 32, "num_samples": 5}
    seed = {"loss": 1.5, "samples": 5, "scores": {"exact_match": 0.5}, "settings": settings}

    def read(folder):
        def work():
            raise AssertionError("figures that are there were not taken, nor refused")

        return Figures("evaluate", folder / "evaluation.json", settings).write(work)

    def means(folder, figures):
        recorded = document(folder / "evaluation.json")
        assert recorded == {**figures, "seal": recorded["seal"]}
        json.dumps(figures)

    return Parser("figures", folder, "evaluation.json", "sealed", [seed], read, means)
