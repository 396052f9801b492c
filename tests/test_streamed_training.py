"""A LoRA trained on the original block by block, against one trained on the model in memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from own_families import installed
from safetensors.torch import load_file

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import ConfigError
from emloc.extend.plugins import family_named
from emloc.streaming.stream import UnitStream


@pytest.fixture(scope="module", params=["llm", "vlm", "diffusion", "text-to-text"])
def family(request):
    with installed(request.param):
        yield family_named(request.param)


@pytest.fixture(scope="module")
def options(family, tmp_path_factory):
    example = family.write_example(tmp_path_factory.mktemp(family.name), seed=0)
    return {
        **example, "max_steps": 3, "logging_steps": 1, "save_steps": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lora_r": 3,
        "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def in_memory(options, tmp_path_factory):
    return emloc.train(output_dir=tmp_path_factory.mktemp("whole") / "adapter", **options)


def losses(folder):
    lines = (folder / "trainer_log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def assert_same(folder, other, tolerance=1e-4):
    assert losses(folder) == pytest.approx(losses(other), rel=1e-5)
    held, expected = (load_file(f / "adapter_model.safetensors") for f in (folder, other))
    assert held.keys() == expected.keys()
    for name, tensor in held.items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance)
        assert tensor.any()


@pytest.mark.parametrize("place", ["disk", "ram"])
def test_adapters_and_losses_are_those_of_training_in_memory(options, in_memory, place, tmp_path):
    streamed = emloc.train(
        output_dir=tmp_path / "adapter",
        stream=True,
        stream_from=place,
        stream_inputs=place,
        **options,
    )
    assert_same(streamed, in_memory)
    assert (streamed / "adapter_config.json").read_bytes() == (
        in_memory / "adapter_config.json"
    ).read_bytes()


@pytest.mark.parametrize("name", ["llm", "vlm", "text-to-text"])
def test_weights_are_as_they_are_stored_whatever_the_config_names(name, tmp_path):
    """Streams read what is stored, and so does who loads the whole model."""
    with installed(name):
        family = family_named(name)
        folder = Path(family.write_example(tmp_path, seed=0)["model_name_or_path"])
        config = json.loads((folder / "config.json").read_text())
        named = {**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(named))
        checkpoint = Checkpoint.open(str(folder))
        model = family.load(checkpoint, "auto", "cpu")
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    first, stored = next(iter(checkpoint.tensors.items()))
    assert stored.dtype == checkpoint.main_dtype == torch.float32
    assert any(torch.equal(checkpoint.read(first), each) for each in model.parameters())


def test_a_vocabulary_that_is_more_than_a_tile(options, family, tmp_path, monkeypatch):
    """Every real model has one, and its trainer in memory multiplies by the head's weight itself."""
    if family.name == "llm":
        monkeypatch.setattr("emloc_llm.training.TILE_ROWS", 1)
    streamed = emloc.train(
        output_dir=tmp_path / "adapter", stream=True, num_held_back_samples=2, **options
    )
    kept = emloc.train(output_dir=tmp_path / "kept", num_held_back_samples=2, **options)
    assert_same(streamed, kept)
    held = [
        json.loads((folder / "emloc.json").read_text())["summary"] for folder in (streamed, kept)
    ]
    assert held[0]["held_back_loss"] == pytest.approx(held[1]["held_back_loss"], rel=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_that_wait_in_few_bits_are_those_of_a_rounded_model(family, options, bits, tmp_path):
    """Trained in memory on a copy of the model whose blocks hold what the grid gives back."""
    from emloc.artefacts.checkpoint import Checkpoint
    from emloc.linalg.row_rounding import rounded_parts
    from emloc.streaming.coded_blocks import as_rows

    base = Path(options["model_name_or_path"])
    copy = tmp_path / "rounded"
    shutil.copytree(base, copy)
    checkpoint = Checkpoint.open(base)
    model = family.load(checkpoint, "auto", "cpu")
    for block in family.blocks(model):
        for parameter in model.get_submodule(block).parameters():
            if parameter.dim() > 1:
                rows = as_rows(parameter.data)
                made = [grid.values(codes) for grid, codes in rounded_parts(rows, bits, 64)]
                assert not torch.equal(torch.cat(made), rows)
                parameter.data.copy_(torch.cat(made).view(parameter.shape))
    model.save_pretrained(copy / checkpoint.layout.folder)
    whole = emloc.train(
        output_dir=tmp_path / "whole", **{**options, "model_name_or_path": str(copy)}
    )
    streamed = emloc.train(
        output_dir=tmp_path / "streamed",
        stream=True,
        stream_from="ram",
        stream_bits=bits,
        **options,
    )
    assert_same(streamed, whole)
    assert json.loads((streamed / "emloc.json").read_text())["settings"]["stream_bits"] == bits


def test_few_bits_wait_in_memory_alone(options, tmp_path):
    with pytest.raises(ConfigError, match="pass stream=true and stream_from=ram"):
        emloc.train(output_dir=tmp_path / "adapter", stream=True, stream_bits=4, **options)


@pytest.mark.parametrize("name", ["llm", "vlm"])  # diffusion draws pictures instead
def test_it_is_evaluated_as_in_memory(name, tmp_path):
    example = family_named(name).write_example(tmp_path / "example", seed=0)
    options = {
        **example, "eval_dataset": example["dataset"], "eval_steps": 1, "max_steps": 1,
        "per_device_train_batch_size": 8, "lora_r": 3, "device": "cpu",
    }  # fmt: skip

    def evaluated(stream):
        folder = emloc.train(output_dir=tmp_path / str(stream), stream=stream, **options)
        lines = (folder / "trainer_log.jsonl").read_text().splitlines()
        return [entry["eval_loss"] for entry in map(json.loads, lines) if "eval_loss" in entry]

    streamed = evaluated(stream=True)
    assert streamed
    assert streamed == pytest.approx(evaluated(stream=False), rel=1e-5)


def test_every_block_is_read_twice_a_step(family, options, tmp_path, monkeypatch):
    read = []
    holding = UnitStream.holding

    def noted(stream, unit, values):
        read.append((unit, unit in stream.blocks))
        return holding(stream, unit, values)

    monkeypatch.setattr(UnitStream, "holding", noted)
    emloc.train(output_dir=tmp_path / "adapter", stream=True, **{**options, "max_steps": 1})
    blocks = [unit for unit, is_block in read if is_block]
    assert blocks
    assert all(blocks.count(unit) <= 2 for unit in blocks)


def test_an_interrupted_run_goes_on_exactly(options, in_memory, tmp_path, monkeypatch):
    from emloc.integrations.transformers.streamed_training import StreamedSteps

    step, taken = StreamedSteps.training_step, []

    def killed(trainer, *given):
        taken.append(trainer.state.global_step)
        if taken[-1] == 2:
            raise KeyboardInterrupt
        return step(trainer, *given)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedSteps, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            emloc.train(output_dir=tmp_path / "adapter", stream=True, **options)
    again = emloc.train(output_dir=tmp_path / "adapter", stream=True, **options)
    assert_same(again, in_memory)


def test_magnitudes_and_dropout(options, tmp_path):
    """DoRA's magnitudes begin with norms of weights that are not there; dropout draws its numbers once."""
    dora = {**options, "use_dora": True, "max_steps": 2}
    whole = emloc.train(output_dir=tmp_path / "whole", **dora)
    assert_same(emloc.train(output_dir=tmp_path / "dora", stream=True, **dora), whole, 1e-3)
    dropped = {**options, "lora_dropout": 0.5, "max_steps": 1}
    first = emloc.train(output_dir=tmp_path / "first", stream=True, **dropped)
    again = emloc.train(output_dir=tmp_path / "again", stream=True, **dropped)
    assert losses(first) == losses(again)


def test_text_encoders_are_trained_along_in_memory(tmp_path):
    example = family_named("diffusion").write_example(tmp_path / "example", seed=0)
    options = {
        **example, "train_text_encoder": True, "max_steps": 2, "learning_rate": 1e-2, "lora_r": 3,
        "device": "cpu", "logging_steps": 1,
    }  # fmt: skip
    whole = emloc.train(output_dir=tmp_path / "whole", **options)
    streamed = emloc.train(output_dir=tmp_path / "streamed", stream=True, **options)
    assert_same(streamed, whole)
    part = "text_encoder/adapter_model.safetensors"
    held, expected = load_file(streamed / part), load_file(whole / part)
    assert held.keys() == expected.keys()
    for name, tensor in held.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_dropout_draws_the_same_numbers_when_a_block_runs_again():
    """A loss that is linear in what is dropped: its gradient shows what was drawn in the forward."""
    from emloc.streaming.kept_inputs import Random

    torch.manual_seed(3)
    state = Random.now(torch.device("cpu"))
    first = torch.nn.functional.dropout(torch.ones(50), 0.5)
    after = torch.rand(3)
    with state.again():
        assert torch.equal(torch.nn.functional.dropout(torch.ones(50), 0.5), first)
    torch.manual_seed(3)
    torch.nn.functional.dropout(torch.ones(50), 0.5)
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"lora_init": "pissa"}, "lora_init=pissa looks at all weights"),
        ({"gradient_checkpointing": True}, "stream=true excludes gradient_checkpointing"),
    ],
)
def test_what_cannot_be_streamed_is_refused(options, given, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        emloc.train(output_dir=tmp_path / "adapter", stream=True, **options, **given)
