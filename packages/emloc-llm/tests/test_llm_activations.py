"""A training step in closed form against the same step counted, on real and on fake tensors."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from emloc.compression.groups import Group, group_shape
from emloc.config import TrainConfig
from emloc.extend.plugin_options import with_plugin_options
from emloc.formats.low_rank import low_rank
from emloc.planning.blocks import by_block
from emloc.planning.described import describe
from emloc.planning.family import traced_loss
from emloc.planning.layers import layer_shapes, planned_layers
from emloc.planning.step import Precision, StepOptions
from emloc.planning.trace import Depths, count_step, extrapolate, materialise, trace_step
from emloc_llm.example import write_model

SIZES = {"hidden_size": 96, "intermediate_size": 272, "num_attention_heads": 6, "head_dim": 16,
         "num_key_value_heads": 2, "num_hidden_layers": 3}  # fmt: skip
ITEM = {"float32": 4, "bfloat16": 2}
SETTINGS = list(itertools.product(ITEM, (False, True), (False, True)))


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """Models of every kind with a closed form, by their configs alone."""
    made = {}
    for kind in ("llama", "qwen2", "qwen3", "mistral"):
        folder = write_model(tmp_path_factory.mktemp(kind), kind, **SIZES)
        (folder / "model.safetensors").unlink()
        made[kind] = describe(str(folder))[:2]
    return made


def emulated(model):
    """Groups as compress makes them, with ranks that differ."""
    ranks = itertools.cycle((31, 17, 40, 23))
    shape_of = layer_shapes(model).__getitem__
    return [
        Group(
            group_shape([f"model.layers.{i}.{name}" for name in names], shape_of),
            low_rank(next(ranks) + i),
        )
        for i in range(len(model.model.layers))
        for names in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        )
    ]


def options(dtype, twice, batch=2, **more):
    return with_plugin_options(TrainConfig)(
        output_dir="unused", dtype=dtype, gradient_checkpointing=twice, max_length=57, lora_r=5,
        per_device_train_batch_size=batch, **more,
    )  # fmt: skip


def both(checkpoint, family, config, compressed, autocast=False):
    """The step in closed form, and what it takes to run it."""
    skeleton = family.skeleton(checkpoint, torch.float32)
    groups = emulated(skeleton) if compressed else []
    batch = family.planned_batch(checkpoint, config, config.per_device_train_batch_size)
    adapted = family.adapted_layers(skeleton, config)
    layers = planned_layers(skeleton, layer_shapes(skeleton), groups, adapted, config)
    step = StepOptions(
        Precision(ITEM[config.dtype], autocast=autocast), config.gradient_checkpointing
    )
    planned = family.step_sizes(skeleton, layers, batch, step)
    model = family.trainable(checkpoint, groups, config)
    return planned, SimpleNamespace(model=model, batch=batch, loss=traced_loss(family))


def real(run, autocast=False):
    """The step on real tensors, all of them zeros or whatever memory holds; some tokens are padding."""
    materialise(run.model)
    batch = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in run.batch.items()}
    if "attention_mask" in batch:
        batch["attention_mask"][:, :40] = 1
    return count_step(run.model, batch, run.loss, autocast)


PAIRS = [SETTINGS[index] for index in (0, 3, 5, 6)]
"""Every pair of values."""

OTHERS = [(kind, *PAIRS[2 + i % 2]) for i, kind in enumerate(("qwen2", "qwen3", "mistral"))]


@pytest.mark.parametrize(
    ("kind", "dtype", "twice", "compressed"), [*(("llama", *s) for s in SETTINGS), *OTHERS]
)
def test_closed_form_is_the_real_step(described, kind, dtype, twice, compressed):
    planned, run = both(*described[kind], options(dtype, twice), compressed)
    assert planned.largest.total == pytest.approx(real(run).largest.total, rel=0.02)


@pytest.mark.parametrize(("dtype", "twice", "compressed"), PAIRS)
def test_a_block_keeps_to_the_byte_what_the_closed_form_says(described, dtype, twice, compressed):
    """The difference between models of three and of four blocks, the loss left out."""
    checkpoint, family = described["llama"]
    kept = []
    for blocks in (3, 4):
        deeper = family.shallow(checkpoint, [blocks])
        planned, run = both(deeper, family, options(dtype, twice), compressed)
        kept.append((planned.phases["loss"].kept, real(run).phases["backward"].kept))
    (planned, counted), (deeper, deeper_counted) = kept
    rng = torch.get_rng_state().numel() if twice else 0  # checkpoint keeps the generator's state
    assert deeper - planned > 0
    assert deeper_counted - counted == pytest.approx(deeper - planned, abs=rng)


@pytest.mark.parametrize("twice", [False, True])
def test_one_sample_needs_no_mask(described, twice):
    checkpoint, family = described["llama"]
    one, run = both(checkpoint, family, options("float32", twice, batch=1), True)
    assert "attention_mask" not in run.batch
    assert one.largest.total == pytest.approx(real(run).largest.total, rel=0.02)
    _, run = both(checkpoint, family, options("float32", twice, packing=True), True)
    assert "attention_mask" not in run.batch


@pytest.mark.parametrize(("twice", "compressed"), itertools.product((False, True), repeat=2))
def test_autocast_as_on_a_gpu(described, twice, compressed):
    """Half-precision weights, a LoRA in float32, products in bfloat16: LoRAs on factors run fused."""
    config = options("bfloat16", twice)
    planned, run = both(*described["llama"], config, compressed, autocast=True)
    assert planned.largest.total == pytest.approx(real(run, autocast=True).largest.total, rel=0.04)


def test_fake_tensors_count_as_real_ones(described):
    """All but what depends on values: real samples without padding would need no mask."""
    _, run = both(*described["qwen3"], options("bfloat16", True), True)
    traced = trace_step(run.model, run.batch, run.loss, autocast=False)
    _, run = both(*described["qwen3"], options("bfloat16", True), True)
    counted = real(run)
    assert traced.largest.total == pytest.approx(counted.largest.total, rel=0.005)


def test_a_trace_of_two_and_three_blocks_tells_of_more(described):
    checkpoint, family = described["llama"]
    config = options("float32", False)
    batch = family.planned_batch(checkpoint, config, 2)
    counted = []

    def count(blocks):
        counted.append(list(blocks))
        model = family.trainable(family.shallow(checkpoint, blocks), [], config)
        return trace_step(model, batch, traced_loss(family), autocast=False)

    assert family.stacks(checkpoint) == [3]
    deep = extrapolate(Depths([7], count))
    assert counted == [[2], [3]]
    assert deep == count([7])


def test_layers_of_a_block_that_differ_are_counted_each(described):
    """One block left dense: the stack is no longer one run of equal blocks."""
    checkpoint, family = described["llama"]
    skeleton = family.skeleton(checkpoint, torch.float32)
    config = options("float32", False)
    groups = [group for group in emulated(skeleton) if ".1." not in group.owner]
    adapted = family.adapted_layers(skeleton, config)
    layers = planned_layers(skeleton, layer_shapes(skeleton), groups, adapted, config)
    blocks = by_block(layers, family.blocks(skeleton))
    assert blocks[0] != blocks[1]
    assert blocks[0].keys() == blocks[1].keys()
    assert blocks[0]["self_attn.k_proj"].group == "self_attn.q_proj"
    batch = family.planned_batch(checkpoint, config, 2)
    planned = family.step_sizes(skeleton, layers, batch, StepOptions(Precision(4)))
    run = SimpleNamespace(
        model=family.trainable(checkpoint, groups, config), batch=batch, loss=traced_loss(family)
    )
    assert planned.largest.total == pytest.approx(real(run).largest.total, rel=0.02)


def test_other_architectures_have_no_closed_form(tmp_path):
    folder = write_model(tmp_path / "model", "gpt2", num_hidden_layers=2)
    checkpoint, family = describe(str(folder))[:2]
    skeleton = family.skeleton(checkpoint, torch.float32)
    config = options("float32", False)
    batch = family.planned_batch(checkpoint, config, 2)
    assert family.step_sizes(skeleton, {}, batch, StepOptions(Precision(4))) is None
    assert family.stacks(checkpoint) == [2]
    shallow = family.skeleton(family.shallow(checkpoint, [1]), torch.float32)
    assert len(family.blocks(shallow)) == 1
