"""Say what every stage will take, from a model's config alone, and choose what fits a budget."""

import os
from pathlib import Path
from typing import Any

import torch

from emloc.artefacts.json_files import read_json
from emloc.artefacts.kinds import BASE
from emloc.artefacts.output_place import require_folder
from emloc.artefacts.small_files import write_json
from emloc.artefacts.write_errors import writing
from emloc.config import PlanConfig
from emloc.errors import ConfigError, OutputError
from emloc.extend.plugin_options import of_family
from emloc.planning.choices import choose
from emloc.planning.memory_plan import MemoryPlan
from emloc.planning.rates import Rates, known_rates, measured_rates
from emloc.planning.setting import Setting
from emloc.planning.subject import Subject
from emloc.planning.ways import Room, as_json, ways_of
from emloc.stages.registry import planned_stages
from emloc.stages.stage import stage

PLAN_NAME, PICTURE_NAME = "plan.json", "plan.png"
OPTIONAL = (Setting.polish,)


def _has_folder(config: PlanConfig) -> None:
    if config.output_dir is not None:
        require_folder(config.output_dir)


@stage(PlanConfig, check=_has_folder, consumes={"model_name_or_path": BASE})
def plan(config: PlanConfig) -> dict[str, Any]:
    """Plan; returns the figures as JSON (README), and writes them and a picture to `output_dir`."""
    made = make_memory_plan(config)
    room = Room(config.memory, config.ram, config.disk)
    ways = ways_of(made.setting, made.stages, _rates(made.setting, config.measure))
    planned = {
        **made.as_json(),
        **as_json(ways, room, made.setting, _samples(config.dataset)),
    }
    if config.output_dir is not None:
        _write(config.output_dir, planned)
    return planned


def make_memory_plan(config: PlanConfig) -> MemoryPlan:
    """The plan of the options, chosen for `memory` where that is given."""
    subject = Subject.of(config.model_name_or_path, config.dtype, config.family)
    setting = Setting(subject, of_family(config, subject.family))
    # What the method can do without stands beside it, and nothing is given up for it.
    stages = {name: lines for name, lines in planned_stages().items() if lines not in OPTIONAL}
    if config.memory is None:
        return MemoryPlan(setting, stages)
    return choose(setting, config.memory, stages)


def _rates(setting: Setting, measure: bool) -> Rates | None:
    """The speed of the device, if it is here."""
    device: str = setting.options.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        if measure:
            raise ConfigError(
                f"plan: measure needs the device, but there is no {device} here; leave measure out."
            )
        return None
    dtype = setting.subject.stored
    if setting.options.dtype != "auto":
        dtype = getattr(torch, setting.options.dtype)
    return measured_rates(device, dtype) if measure else known_rates(device, dtype)


def _samples(dataset: str | None) -> int | None:
    """The rows of a data set that is one local file of lines; None for any other."""
    if dataset is None or not dataset.endswith(".jsonl") or not os.path.isfile(dataset):
        return None
    with open(dataset, "rb") as lines:
        return sum(1 for line in lines if line.strip())


def _write(folder: Path, planned: dict[str, Any]) -> None:
    from emloc.planning.picture import draw  # seconds to import

    target = folder / PLAN_NAME
    if target.exists() and read_json(target) != planned:
        raise OutputError(
            f"{target} holds another plan; nothing is ever overwritten, so choose another output_dir."
        )
    with writing(target):
        folder.mkdir(parents=True, exist_ok=True)
        draw(planned, folder / PICTURE_NAME)
    write_json(target, planned)
