"""Numbers of a tiny seeded model in float64 that must not drift unnoticed.

If a change moves them on purpose, run `python tests/test_golden.py` and explain it in the commit.
"""

import json
from pathlib import Path

import pytest
import torch

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig, CorrectConfig
from emloc.correction.limits import CandidateLora, losses
from emloc.extend.plugin_options import with_plugin_options
from emloc.extend.plugins import load_plugins
from emloc.streaming.stream import UnitStream

GOLDEN = Path(__file__).parent / "golden.json"


def measure_llm(root: Path) -> dict:
    """Ranks, errors and losses of the stages without training, whose kernels may differ."""
    from emloc_llm.example import write_model, write_rows

    root.mkdir(parents=True, exist_ok=True)
    base = write_model(root / "base", dtype=torch.float64, seed=7)
    data = {"dataset": str(write_rows(root / "train.jsonl", 16, seed=7)), "max_length": 96}
    folder = emloc.compress(
        model_name_or_path=str(base),
        output_dir=root / "e",
        format="low_rank",
        keep_ratio=0.45,
        **data,
    )
    layers = Manifest.read(folder).layers
    checkpoint = Checkpoint.open(base)
    family = load_plugins().families["llm"].load()
    stream = UnitStream(family, checkpoint)
    config = with_plugin_options(CorrectConfig)(adapter="a", emulator="e", output_dir="o", **data)
    batches = family.calibration_batches(checkpoint, config)
    draw = torch.Generator().manual_seed(7)
    down = torch.randn(3, 48, generator=draw, dtype=torch.float64)
    up = torch.randn(80, 3, generator=draw, dtype=torch.float64)
    lora = CandidateLora(down, [up * 0, up], 0.01, None)
    return {
        "ranks": {name: entry["rank"] for name, entry in layers.items()},
        "relative_errors": {name: entry["relative_error"] for name, entry in layers.items()},
        "losses": losses(stream, batches, ["model.layers.1.mlp.up_proj"], lambda _: lora, 2),
        "tokens": next(entry["tokens"] for entry in layers.values()),
    }


def measure_vlm(root: Path) -> dict:
    """The same for an InternVL: both towers."""
    from emloc_vlm.example import write_model, write_rows

    root.mkdir(parents=True, exist_ok=True)
    base = write_model(root / "base", dtype=torch.float64, seed=7)
    data = {"dataset": str(write_rows(root / "train.jsonl", 16, seed=7)), "max_length": 96}
    folder = emloc.compress(
        model_name_or_path=str(base),
        output_dir=root / "e",
        format="low_rank",
        keep_ratio=0.45,
        **data,
    )
    layers = Manifest.read(folder).layers
    family = load_plugins().families["vlm"].load()
    stream = UnitStream(family, Checkpoint.open(base))
    config = with_plugin_options(CorrectConfig)(adapter="a", emulator="e", output_dir="o", **data)
    batches = family.calibration_batches(Checkpoint.open(base), config)
    draw = torch.Generator().manual_seed(7)
    down = torch.randn(3, 40, generator=draw, dtype=torch.float64)
    up = torch.randn(72, 3, generator=draw, dtype=torch.float64)
    lora = CandidateLora(down, [up * 0, up], 0.01, None)
    name = "model.vision_tower.encoder.layer.1.mlp.fc1"
    return {
        "ranks": {name: entry["rank"] for name, entry in layers.items()},
        "relative_errors": {name: entry["relative_error"] for name, entry in layers.items()},
        "losses": losses(stream, batches, [name], lambda _: lora, 2),
        "tokens": next(entry["tokens"] for entry in layers.values()),
    }


def measure_diffusion(root: Path) -> dict:
    """The same for a UNet: linear layers and convolutions."""
    from emloc_diffusion.example import write_pictures
    from emloc_diffusion.example_pipelines import RESOLUTION, write_pipeline

    root.mkdir(parents=True, exist_ok=True)
    base = write_pipeline(root / "base", "sd", dtype=torch.float64, seed=7)
    data = {
        "dataset": str(write_pictures(root / "pictures", 3, seed=7)), "resolution": RESOLUTION,
        "instance_prompt": "a sks square", "num_calibration_samples": 6,
    }  # fmt: skip
    folder = emloc.compress(
        model_name_or_path=str(base),
        output_dir=root / "e",
        format="low_rank",
        keep_ratio=0.45,
        **data,
    )
    layers = Manifest.read(folder).layers
    family = load_plugins().families["diffusion"].load()
    stream = UnitStream(family, Checkpoint.open(base))
    config = with_plugin_options(CompressConfig)(
        model_name_or_path=str(base), output_dir="o", **data
    )
    batches = family.calibration_batches(Checkpoint.open(base), config)
    draw = torch.Generator().manual_seed(7)
    name = "down_blocks.0.resnets.0.conv1"
    down = torch.randn(3, 24, 3, 3, generator=draw, dtype=torch.float64)
    up = torch.randn(24, 3, generator=draw, dtype=torch.float64)
    lora = CandidateLora(down, [up * 0, up], 0.01, None)
    return {
        "ranks": {name: entry["rank"] for name, entry in layers.items()},
        "relative_errors": {name: entry["relative_error"] for name, entry in layers.items()},
        "losses": losses(stream, batches, [name], lambda _: lora, 2),
        "tokens": next(entry["tokens"] for entry in layers.values()),
    }


MEASURES = {"llm": measure_llm, "vlm": measure_vlm, "diffusion": measure_diffusion}

# diffusers embeds time steps in float32, in sines whose last bit depends on the processor.
TOLERANCE = {"llm": 1e-9, "vlm": 1e-9, "diffusion": 1e-6}


@pytest.mark.parametrize("family", MEASURES)
def test_numbers_have_not_drifted(tmp_path, family):
    found, golden = MEASURES[family](tmp_path), json.loads(GOLDEN.read_text())[family]
    within = TOLERANCE[family]
    assert found["ranks"] == golden["ranks"]
    assert found["tokens"] == golden["tokens"]
    assert found["relative_errors"] == pytest.approx(golden["relative_errors"], rel=within)
    assert found["losses"] == pytest.approx(golden["losses"], rel=within)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        numbers = {n: measure(Path(temporary) / n) for n, measure in MEASURES.items()}
    GOLDEN.write_text(json.dumps(numbers, indent=2) + "\n")
