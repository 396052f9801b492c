"""Models of an encoder and a decoder: blocks in two stacks, which read sequences of two lengths."""

import json
from pathlib import Path

import pytest
import torch
from own_families import installed

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.compression.sensitivity import BlockProbe
from emloc.config import CompressConfig, TrainConfig
from emloc.errors import ConfigError, DataError, PluginError
from emloc.extend.capabilities import token_mask_of
from emloc.extend.losses import loss_sum, summed
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import of_family, with_plugin_options
from emloc.extend.plugins import family_named
from emloc.planning.family import traced_loss
from emloc.planning.subject import Subject
from emloc.planning.trace import Depths, extrapolate, trace_step
from emloc.planning.training import planned_step, shallow_model
from emloc.plugin import LengthOptions, TransformersFamily
from emloc.streaming.real_rows import real_rows
from emloc.testing.contract.block_laws import BlockLaws
from emloc.testing.contract.family_laws import FamilyLaws
from emloc.testing.contract.loss_laws import LossLaws
from emloc.testing.contract.stage_laws import StageLaws
from emloc.testing.contract.token_laws import TokenLaws
from emloc.testing.contract.weight_laws import WeightLaws

NAMES = ["text-to-text", "text-to-text-bart"]
CALIBRATED = {"num_calibration_samples": 6, "device": "cpu"}


class TestT5(FamilyLaws, LossLaws, BlockLaws, TokenLaws, WeightLaws, StageLaws):
    """Laws of the model; those of training and of files pass on Whisper (`test_example_plugins.py`)."""

    family = "text-to-text"
    plugin = "seq2seq_family"


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    with installed(request.param):
        yield family_named(request.param)


@pytest.fixture(scope="module")
def example(family, tmp_path_factory):
    return {**family.write_example(tmp_path_factory.mktemp(family.name), seed=0), "max_length": 20}


def batches_of(family, example, **options):
    given = {"output_dir": "unused", **example, **options}
    config = of_family(with_plugin_options(CompressConfig)(**given), family)
    return family.calibration_batches(Checkpoint.open(example["model_name_or_path"]), config)


def changed(example, folder, **sizes):
    """The example's model with another config, and no weights."""
    path = Path(example["model_name_or_path"]) / "config.json"
    (folder / "config.json").write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    return str(folder)


def test_blocks_of_both_stacks_and_what_they_share(family, example):
    """Keys and values of a decoder read what all of its blocks read, and are groups of their own."""
    base, _ = open_model(example["model_name_or_path"])
    model = family.skeleton(base, torch.float32)
    blocks = family.blocks(model)
    assert [name.rpartition(".")[0].rpartition(".")[0].rpartition(".")[2] for name in blocks] == [
        *["encoder"] * 2, *["decoder"] * 3
    ]  # fmt: skip
    groups = [list(group) for group in family.layer_groups(model)]
    attentions = [group for group in groups if len(group) == 3]
    assert len(attentions) == len(blocks)
    assert all(any(group[0].startswith(f"{block}.") for group in attentions) for block in blocks)
    second = ("EncDecAttention", "encoder_attn")
    pairs = [g for g in groups if len(g) == 2 and g[0].split(".")[-2] in second]
    assert len(pairs) == 3  # keys and values of each decoder block's second attention
    assert all(pair[0].rpartition(".")[0] == pair[1].rpartition(".")[0] for pair in pairs)


@pytest.mark.parametrize("size", [1, 6], ids=["no padding", "padded"])
def test_a_layers_effect_is_on_the_rows_that_its_block_writes(
    family, example, size, tmp_path, monkeypatch
):
    """Against each block run in float64 on what it is given by the first micro-batch; positions' biases,
    which T5's blocks hand on, are no hidden states.
    """
    seen = []
    measured = BlockProbe.sensitivity

    def noted(probe, layers, weights):
        made = measured(probe, layers, weights)
        seen.append((probe._name, list(layers), [w.double() for w in weights], made))
        return made

    monkeypatch.setattr(BlockProbe, "sensitivity", noted)
    options = {**example, **CALIBRATED, "calibration_batch_size": size}
    emloc.compress(
        output_dir=tmp_path / "e", format="low_rank", keep_ratio=0.4,
        keep_ratio_allocation="error", **options,
    )  # fmt: skip
    batch = batches_of(family, example, **CALIBRATED, calibration_batch_size=size)[0]
    base, _ = open_model(example["model_name_or_path"])
    model = family.load(base, "float64", "cpu")
    given = {}
    for name in family.blocks(model):

        def keep(_, inputs, named, name=name):
            given[name] = inputs, {**named, "past_key_values": None}

        model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        family.loss(model, batch)

        def written(name):
            inputs, named = given[name]
            output = model.get_submodule(name)(*inputs, **named)
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            return real_rows(hidden, token_mask_of(family, batch, name), name)

        assert {name.split(".")[-3] for name, *_ in seen} == {"encoder", "decoder"}
        for name, layers, weights, made in seen:
            before = written(name)
            held = [model.get_submodule(layer).weight.data for layer in layers]
            for layer, weight in zip(layers, weights):
                model.get_submodule(layer).weight.data = weight
            after = written(name)
            for layer, weight in zip(layers, held):
                model.get_submodule(layer).weight.data = weight
            expected = ((after - before).square().sum(1) / before.square().sum(1)).mean()
            assert made == pytest.approx(float(expected), rel=1e-3), layers


def test_a_limit_is_chosen_by_the_loss_of_the_whole_model(family, example, tmp_path):
    """The loss of the LoRA as it came, in float64 and with stock PEFT."""
    peft = pytest.importorskip("peft")
    data = {key: value for key, value in example.items() if key != "model_name_or_path"}
    emulator = emloc.compress(
        output_dir=tmp_path / "e", format="low_rank", keep_ratio=0.5, **example, **CALIBRATED
    )
    adapter = emloc.train(
        output_dir=tmp_path / "a", emulator=str(emulator), max_steps=2, learning_rate=1e-2, lora_r=3,
        device="cpu", **data,
    )  # fmt: skip
    corrected = emloc.correct(
        output_dir=tmp_path / "c", adapter=str(adapter), emulator=str(emulator), limit="auto",
        **data, **CALIBRATED,
    )  # fmt: skip
    losses = Manifest.read(corrected).summary["calibration_loss"]
    base, _ = open_model(example["model_name_or_path"])
    model = peft.PeftModel.from_pretrained(family.load(base, "float64", "cpu"), str(adapter)).eval()
    batches = batches_of(family, example, **CALIBRATED)
    with torch.no_grad():
        plain = summed([loss_sum(family, model, batch) for batch in batches])
    assert losses["0"] == pytest.approx(plain.mean("They"), rel=1e-5)
    merged = emloc.merge(adapter=str(corrected), output_dir=tmp_path / "m")
    assert emloc.verify(path=merged)["compared"]["tensors"] > 0


def test_sequences_that_the_model_has_no_positions_for_are_refused(family, example, tmp_path):
    """Texts that are read and texts that are written; relative positions have no end."""
    for column in ("source", "target"):
        row = {"source": "short", "target": "short", column: "long " * 9}
        (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
        given = {
            **example,
            "dataset": str(tmp_path / "long.jsonl"),
            "max_length": 100,
            "device": "cpu",
        }
        if family.name == "text-to-text":
            assert emloc.evaluate(**given)["samples"] == 1
            continue
        with pytest.raises(DataError, match="one has 45 tokens, but the model has 32 positions"):
            emloc.evaluate(**given)


def test_a_plan_is_of_both_stacks(family, example, tmp_path):
    """One block more of each is what deeper models have more of; nothing is longer than the model."""
    counts = dict(zip(_counts(family), (5, 4)))
    subject = Subject.of(changed(example, tmp_path, **counts), "auto", family.name)
    planned = subject.planned
    assert planned.stacks(subject.checkpoint) == [5, 4]
    few = planned.shallow(subject.checkpoint, [1, 2])
    names = family.blocks(family.skeleton(few, torch.float32))
    assert [sum(f".{part}." in f".{n}" for n in names) for part in ("encoder", "decoder")] == [1, 2]
    groups = [[*group] for group in family.layer_groups(subject.model)]
    assert [[*group] for group in subject.groups] == groups
    config = with_plugin_options(TrainConfig)(output_dir="o", lora_r=3, **example)
    sizes, _, way = planned_step(subject, [], of_family(config, family))
    batch = planned.planned_batch(subject.checkpoint, config, config.per_device_train_batch_size)

    def count(blocks):
        model = shallow_model(subject, [], config, (), blocks)
        return trace_step(model, batch, traced_loss(family), False)

    whole = count([5, 4])
    assert way == "trace"
    assert sizes == extrapolate(Depths([5, 4], count))
    for phase, instant in whole.phases.items():
        assert sizes.phases[phase].total == pytest.approx(instant.total, rel=0.02)
    longest = planned.planned_batch(subject.checkpoint, LengthOptions(max_length=1024), 2)
    most = 1024 if family.name == "text-to-text" else 32
    assert longest["labels"].shape == (2, most)


def _counts(family):
    two = ("encoder_layers", "decoder_layers")
    return two if family.name == "text-to-text-bart" else ("num_layers", "num_decoder_layers")


def test_a_plan_counts_keys_and_values_of_both_sequences(family, example):
    base, _ = open_model(example["model_name_or_path"])
    model = family.load(base, "float32", "cpu")
    ids = torch.ones(1, 20, dtype=torch.int64)
    with torch.no_grad():
        kept = model(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values
    parts = (kept.self_attention_cache, kept.cross_attention_cache)
    held = sum(one.keys.numel() + one.values.numel() for part in parts for one in part.layers)
    options = LengthOptions(max_length=20)
    assert family.cache_elements(family.skeleton(base, torch.float32), options) == held


def test_the_mask_of_one_sequence_is_refused(family, example, monkeypatch, tmp_path):
    """A family that says nothing of the second would leave out rows by the padding of the first."""
    monkeypatch.setattr(type(family), "token_mask", TransformersFamily.token_mask)
    with pytest.raises(PluginError, match="encoder-decoder models, whose layers read two"):
        emloc.compress(output_dir=tmp_path / "e", **example)


def test_one_table_of_several_modules_stays_as_it_is(family, example, tmp_path):
    with pytest.raises(ConfigError, match="embedding_bits: .*shared of .* shares its weight with"):
        emloc.compress(output_dir=tmp_path / "e", embedding_bits=8, **example)


def test_blocks_in_two_stacks_must_be_named(family, example, tmp_path):
    with pytest.raises(
        ConfigError, match="numbers several stacks of blocks that are adapted; name"
    ):
        emloc.train(output_dir=tmp_path / "a", max_steps=1, lora_layers_to_transform="0", **example)
