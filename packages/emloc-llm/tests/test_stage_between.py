"""A plugin's stage that takes an emulator and makes one, run between compress and train."""

import importlib.metadata
import io
import shutil
import sys
import types
from pathlib import Path

import pytest
from pydantic import Field
from rich.console import Console

import emloc
from emloc.artefacts.kinds import EMULATOR
from emloc.artefacts.manifest import Manifest
from emloc.config import MemoryOptions
from emloc.extend.stages import StageEntry
from emloc.planning.ledger import StageMemory, total
from emloc.planning.report import report
from emloc.stages.stage import stage
from emloc_llm.example import write_example


def half(setting):
    """The memory of a stage that takes half of what training does."""
    return StageMemory({"copies": total(setting.train().device) // 2})


class DuplicateConfig(MemoryOptions):
    """Copy an emulator."""

    emulator: str = Field(description="emulator to copy")
    output_dir: Path = Field(description="where the copy goes")


@stage(
    DuplicateConfig, consumes={"emulator": EMULATOR}, produces=EMULATOR, folder="copy", memory=half
)
def duplicate(config):
    """Copy an emulator; returns the copy's folder."""
    return Path(shutil.copytree(config.emulator, config.output_dir))


@pytest.fixture
def installed(monkeypatch):
    module = types.ModuleType("toy_stages")
    module.duplicate = duplicate

    def emloc_register_stages():
        return [StageEntry("duplicate", "toy_stages:duplicate")]

    module.emloc_register_stages = emloc.hookimpl(emloc_register_stages)
    plugin = types.SimpleNamespace(name="toys", load=lambda: module)
    real = importlib.metadata.entry_points
    monkeypatch.setitem(sys.modules, "toy_stages", module)
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: [*real(group=group), *([plugin] if group == "emloc" else [])],
    )


def test_it_is_planned_by_what_it_declares(installed, tmp_path):
    model = write_example(tmp_path, seed=0)["model_name_or_path"]
    plan = emloc.plan(model_name_or_path=model, device="cpu")
    rows = plan["stages"]
    assert list(rows) == ["compress", "duplicate", "train", "correct", "merge", "inference"]
    bytes_of = {name: row["device_bytes"]["total"] for name, row in rows.items()}
    assert bytes_of["duplicate"] == bytes_of["train"] // 2
    shown = io.StringIO()
    Console(file=shown, width=200).print(report(plan))
    assert any("duplicate" in line and "copies" in line for line in shown.getvalue().splitlines())


def test_it_is_fed_and_feeds(installed, tmp_path):
    options = write_example(tmp_path / "example", seed=0)
    made = emloc.run(
        {**options, "output_dir": str(tmp_path / "run"), "device": "cpu", "compress": {},
         "duplicate": {}, "train": {"max_steps": 1, "lora_r": 2}, "correct": {"limit": 1}}
    )  # fmt: skip
    assert list(made) == ["compress", "duplicate", "train", "correct"]
    trained, corrected = Manifest.read(made["train"]), Manifest.read(made["correct"])
    assert (
        trained.emulator.name_or_path == corrected.emulator.name_or_path == str(made["duplicate"])
    )
    assert trained.base_model.name_or_path == options["model_name_or_path"]
