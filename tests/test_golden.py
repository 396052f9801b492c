"""Numbers of a tiny seeded model in float64 that must not drift unnoticed.

If a change moves them on purpose, run `python tests/test_golden.py` and explain it in the commit.
"""

import json
from pathlib import Path

import pytest
import torch

import emloc
from emloc.checkpoint import Checkpoint
from emloc.config import CorrectConfig
from emloc.limits import CandidateLora, losses
from emloc.manifest import Manifest
from emloc.plugins import load_plugins
from emloc.stream import UnitStream

GOLDEN = Path(__file__).parent / "golden.json"


def measure_llm(root: Path) -> dict:
    """Ranks, errors and losses of the stages without training, whose kernels may differ."""
    from emloc_llm.example import write_model, write_rows

    base = write_model(root / "base", dtype=torch.float64, seed=7)
    data = {"dataset": str(write_rows(root / "train.jsonl", 16, seed=7)), "max_length": 96}
    folder = emloc.compress(
        model_name_or_path=str(base), output_dir=root / "e", keep_ratio=0.45, **data
    )
    layers = Manifest.read(folder).layers
    checkpoint = Checkpoint.open(base)
    family = load_plugins().families["llm"].load()
    stream = UnitStream(family, checkpoint)
    config = CorrectConfig(adapter="a", emulator="e", output_dir="o", **data)
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


def test_llm_numbers_have_not_drifted(tmp_path):
    found, golden = measure_llm(tmp_path), json.loads(GOLDEN.read_text())["llm"]
    assert found["ranks"] == golden["ranks"]
    assert found["tokens"] == golden["tokens"]
    assert found["relative_errors"] == pytest.approx(golden["relative_errors"], rel=1e-9)
    assert found["losses"] == pytest.approx(golden["losses"], rel=1e-9)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        numbers = {"llm": measure_llm(Path(temporary))}
    GOLDEN.write_text(json.dumps(numbers, indent=2) + "\n")
