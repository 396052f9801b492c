"""Parsers of models: configurations, tokenizers, templates, emulators, notes of what was begun."""

import hashlib
import json
from types import SimpleNamespace

import torch
from safetensors import safe_open

from emloc.artefacts.companions import chat_template
from emloc.artefacts.file_digest import file_sha256
from emloc.artefacts.manifest import Manifest
from emloc.compression.groups import dense_shapes, written_groups
from emloc.extend.opening import open_model
from emloc.formats.vocabulary import tables_of
from emloc.integrations.transformers.chat import render
from emloc.integrations.transformers.checkpoints import last_whole_checkpoint
from emloc.integrations.transformers.data.turns import chat_of
from emloc.integrations.transformers.loading import load_tokenizer
from emloc.planning.described import describe
from fuzzing.examples import Examples, document
from fuzzing.parser import Parser


def parsers(examples: Examples) -> list[Parser]:
    """All of them."""
    return [
        *(_model_config(examples, family) for family in ("llm", "vlm", "diffusion")),
        *(_planned(examples, family) for family in ("llm", "vlm", "diffusion")),
        _emulator_config(examples), _emulator_manifest(examples), _checkpoint_of_training(examples),
        *(_tokenizer(examples, file) for file in ("tokenizer.json", "tokenizer_config.json")),
        _template(examples), _generation(examples),
    ]  # fmt: skip


CONFIGS = {"llm": "config.json", "vlm": "config.json", "diffusion": "unet/config.json"}


def _model_config(examples, family):
    """A configuration with the weights that it describes: accepted, it still describes these."""
    folder = examples.copy(examples.model(family), f"{family} config")

    def read(folder):
        checkpoint, known = open_model(folder)
        model = known.skeleton(checkpoint, torch.float32)
        for name, parameter in model.named_parameters():
            entry = known.stored(model, name, checkpoint)
            if entry is None or entry.plain_name is None:
                continue
            if checkpoint.tensors[entry.plain_name].shape != tuple(parameter.shape):
                return None  # refused by whoever reads it: `streaming.waiting_weights`, `verify`
        known.blocks(model), known.layer_groups(model)
        return checkpoint, model

    def means(folder, result):
        if result is None:
            return
        checkpoint, model = result
        held = {}
        for file in {info.file for info in checkpoint.tensors.values()}:
            with safe_open(folder / file, "pt") as shard:
                names = shard.keys()
                held |= {name: shard.get_slice(name).get_shape() for name in names}
        assert held.keys() >= checkpoint.tensors.keys()
        assert all(parameter.is_meta for parameter in model.parameters())

    seed = document(folder / CONFIGS[family])
    return Parser(f"{family} config", folder, CONFIGS[family], "json", [seed], read, means, 40)


def _planned(examples, family):
    """A configuration alone, by which memory is planned."""
    folder = examples.copy(examples.model(family), f"{family} planned")

    def read(folder):
        return describe(str(folder))

    def means(folder, result):
        described, _, model = result
        assert {name: info.shape for name, info in described.tensors.items()} == {
            name: tuple(value.shape) for name, value in model.named_parameters()
        }
        assert all(info.dtype.is_floating_point for info in described.tensors.values())

    seed = document(folder / CONFIGS[family])
    return Parser(f"{family} planned", folder, CONFIGS[family], "json", [seed], read, means, 40)


def _emulator_config(examples):
    """An emulator's groups; loaded, it computes finite numbers."""
    folder = examples.copy(examples.root / "llm/emulator", "emulator config")

    def read(folder):
        checkpoint, family = open_model(folder)
        return family.load(checkpoint, "auto", "cpu")

    def means(folder, model):
        with torch.no_grad():
            assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()

    name = "config.json"
    return Parser(
        "emulator config", folder, name, "json", [document(folder / name)], read, means, 60
    )


def _emulator_manifest(examples):
    folder = examples.copy(examples.root / "llm/emulator", "emulator manifest")
    checkpoint, family = open_model(folder)
    model = family.skeleton(checkpoint, torch.float32)

    def read(folder):
        manifest = Manifest.read(folder)
        groups = written_groups(manifest.layers, dense_shapes(manifest.layers, model))
        stored = [
            (tensor.name, tensor.shape)
            for group in groups
            for tensor in group.form.format.stored(group.shape, group.form)
        ]
        return groups, stored, tables_of(manifest.tables)

    def means(folder, result):
        groups, stored, tables = result
        for group in groups:
            for layer, shape in zip(group.layers, group.shape.singles()):
                assert model.get_submodule(layer)
                assert shape.numel > 0
        assert all(size > 0 for _, shape in stored for size in shape)
        assert all(table.numel > 0 for table in tables)

    name = "emloc.json"
    return Parser(
        "emulator manifest", folder, name, "json", [document(folder / name)], read, means, 2
    )


def _checkpoint_of_training(examples):
    """The digests of a checkpoint; where they are not right, the one before is taken."""
    folder = examples.empty("training")
    for step in (2, 4):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        for file in ("optimizer.pt", "trainer_state.json"):
            (checkpoint / file).write_text(f"{file} {step}")
        digests = {path.name: file_sha256(path) for path in sorted(checkpoint.iterdir())}
        (checkpoint / "digests.json").write_text(json.dumps(digests))

    def means(folder, found):
        held = document(found / "digests.json")
        files = [path for path in found.iterdir() if path.name != "digests.json"]
        assert held == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    path = "checkpoint-4/digests.json"
    seeds = [document(folder / path)]
    return Parser("training digests", folder, path, "json", seeds, last_whole_checkpoint, means, 1)


TEXT = "Reverse abc."


def _tokenizer(examples, file):
    folder = examples.copy(examples.model("llm"), file)

    def read(folder):
        tokenizer = load_tokenizer(folder)
        return tokenizer, tokenizer(TEXT)["input_ids"]

    def means(folder, result):
        tokenizer, ids = result
        numbers = set(
            tokenizer.get_vocab().values()
        )  # what a model has no rows for it refuses itself
        assert numbers.issuperset(ids)
        assert tokenizer.pad_token_id is not None

    return Parser(file, folder, file, "json", [document(folder / file)], read, means, 8)


def _template(examples):
    folder = examples.copy(examples.model("llm"), "template")
    seed = (folder / "chat_template.jinja").read_text()
    turns = [("system", "Be brief."), ("user", TEXT), ("assistant", "cba")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    tokenizer = load_tokenizer(folder)

    def read(folder):
        tokenizer.chat_template = chat_template(folder)
        return render(chat_of(row, "row"), tokenizer, True, "row")

    def means(folder, rendered):
        assert (
            "cba" in rendered.text[rendered.last :]
        )  # after whatever a template begins answers with
        assert rendered.text.startswith(rendered.prompt)
        assert TEXT in rendered.prompt

    loop = "{% for m in messages %}" + "{{ m['role'] }}: {{ m['content'] }}\n" + "{% endfor %}"
    more = "{% if add_generation_prompt %}assistant: {% endif %}"
    seeds = [seed, loop + more]
    return Parser("chat template", folder, "chat_template.jinja", "text", seeds, read, means, 3)


def _generation(examples):
    folder = examples.copy(examples.model("llm"), "generation")
    checkpoint, family = open_model(folder)
    options = SimpleNamespace(max_new_tokens=2)

    def read(folder):
        checkpoint.companions()
        return family.load(checkpoint, "auto", "cpu"), options

    def means(folder, result):
        model, _ = result
        assert model.generation_config is not None

    name = "generation_config.json"
    seeds = [document(folder / name)]
    return Parser("generation config", folder, name, "json", seeds, read, means, 50)
