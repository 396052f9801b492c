"""A training step of a denoiser in closed form against the same step counted."""

import pytest
import torch

from emloc.compression.groups import Group, group_shape
from emloc.config import TrainConfig
from emloc.errors import ConfigError
from emloc.extend.plugin_options import with_plugin_options
from emloc.formats.low_rank import low_rank
from emloc.formats.low_rank_sizes import rank_for
from emloc.planning.described import describe
from emloc.planning.family import traced_loss
from emloc.planning.layers import layer_shapes, planned_layers
from emloc.planning.step import Precision, StepOptions
from emloc.planning.trace import count_step, materialise, trace_step
from emloc_diffusion.example_pipelines import write_pipeline

OPTIONS = with_plugin_options(TrainConfig)
ITEM = {"float32": 4, "bfloat16": 2}
SHAPES = {
    "sd": {"layers_per_block": 1},
    "sdxl": {"layers_per_block": 1},
    "flux": {"num_layers": 2, "num_single_layers": 3},
}
SETTINGS = [("float32", False, False), ("float32", True, True), ("bfloat16", False, True),
            ("bfloat16", True, False)]  # fmt: skip
"""dtype, gradient checkpointing, low-rank: every pair of values occurs."""


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    made = {}
    for kind, more in {**SHAPES, "sd3": {}}.items():
        folder = write_pipeline(tmp_path_factory.mktemp(kind), kind, **more)
        made[kind] = describe(str(folder))[:2]
    return made


def options(dtype="float32", twice=False, **more):
    return OPTIONS(
        output_dir="unused", dtype=dtype, gradient_checkpointing=twice, lora_r=4,
        **{"resolution": 128, **more},
    )  # fmt: skip


def compressed_groups(family, skeleton):
    shapes = layer_shapes(skeleton)
    shaped = [group_shape(names, shapes.__getitem__) for names in family.layer_groups(skeleton)]
    return [Group(shape, low_rank(rank_for(0.4, shape.rows, shape.d_in))) for shape in shaped]


def both(checkpoint, family, config, compressed, run):
    """The step in closed form and as `run` counts it."""
    skeleton = family.skeleton(checkpoint, torch.float32)
    groups = compressed_groups(family, skeleton) if compressed else []
    batch = family.planned_batch(checkpoint, config, 2)
    adapted = family.adapted_layers(skeleton, config)
    layers = planned_layers(skeleton, layer_shapes(skeleton), groups, adapted, config)
    step = StepOptions(Precision(ITEM[config.dtype]), config.gradient_checkpointing)
    planned = family.step_sizes(skeleton, layers, batch, step)
    return planned, run(family.trainable(checkpoint, groups, config), batch, family)


def real(model, batch, family):
    materialise(model)
    made = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in batch.items()}
    return count_step(model, made, traced_loss(family), autocast=False)


def traced(model, batch, family):
    return trace_step(model, batch, traced_loss(family), autocast=False)


@pytest.mark.parametrize(
    ("kind", "dtype", "twice", "compressed"),
    [("sd", *s) for s in SETTINGS[:2]]
    + [("sdxl", *s) for s in SETTINGS[2:]]
    + [("flux", *s) for s in SETTINGS],
)
def test_closed_form_is_the_real_step(described, kind, dtype, twice, compressed):
    # Half-precision convolutions on a CPU take long; on fake tensors nothing does.
    run = real if dtype == "float32" else traced
    planned, counted = both(*described[kind], options(dtype, twice), compressed, run)
    # Of blocks that run twice only the last one's workspace differs, which here is most of it.
    assert planned.largest.total == pytest.approx(counted.largest.total, rel=0.035)


@pytest.mark.parametrize(("dtype", "twice", "compressed"), SETTINGS[1:3])
def test_lora_on_convolutions(described, dtype, twice, compressed):
    config = options(dtype, twice, lora_conv=True)
    run = real if dtype == "float32" else traced
    planned, counted = both(*described["sd"], config, compressed, run)
    assert planned.largest.total == pytest.approx(counted.largest.total, rel=0.03)


def test_a_trace_counts_as_a_real_step_does(described):
    checkpoint, family = described["flux"]
    config = options(twice=True)
    planned, counted = both(checkpoint, family, config, True, traced)
    assert planned.largest.total == pytest.approx(counted.largest.total, rel=0.02)
    _, measured = both(checkpoint, family, config, True, real)
    assert counted.largest.total == pytest.approx(measured.largest.total, rel=0.001)


def test_a_block_of_flux_keeps_what_the_closed_form_says(described):
    """One double block more, one single block more."""
    checkpoint, family = described["flux"]
    assert list(family.stacks(checkpoint)) == [2, 3]

    def kept(blocks):
        shaped = both(family.shallow(checkpoint, blocks), family, options("bfloat16"), True, traced)
        return shaped[0].phases["loss"].kept, shaped[1].phases["backward"].kept

    planned, counted = kept([2, 3])
    for blocks in ([3, 3], [2, 4]):
        more, more_counted = kept(blocks)
        assert more - planned == pytest.approx(more_counted - counted, rel=0.005)


def test_other_denoisers_are_traced(described):
    checkpoint, family = described["sd3"]
    config = options(resolution=64)
    batch = family.planned_batch(checkpoint, config, 1)
    skeleton = family.skeleton(checkpoint, torch.float32)
    assert family.step_sizes(skeleton, {}, batch, StepOptions(Precision(4))) is None
    groups = compressed_groups(family, skeleton)
    counts = [
        run(family.trainable(checkpoint, groups, config), batch, family) for run in (real, traced)
    ]
    assert counts[0].largest.total == pytest.approx(counts[1].largest.total, rel=0.005)


def test_prior_preservation_doubles_the_batch(described, tmp_path):
    checkpoint, family = described["sd"]
    config = options(class_data_dir=tmp_path, class_prompt="a square")
    assert len(family.planned_batch(checkpoint, config, 3)["sample"]) == 6
    with pytest.raises(ConfigError, match="multiple of 8"):
        family.planned_batch(checkpoint, options(resolution=132), 1)
