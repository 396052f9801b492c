"""Training on a light model, which is the same for every method."""

from pathlib import Path
from typing import Any

from emloc.extend.methods import Options, Task
from emloc.stages.train import train


def train_light(task: Task, light: Path | None, out: Path, **instead: Any) -> Path:
    """`emloc.train` on a light model, or on the base where there is none; `instead` overrides options."""
    where: Options = (
        {"model_name_or_path": task.model_name_or_path}
        if light is None
        else {"emulator": str(light)}
    )
    return train(**{**task.train, "seed": task.seed, **where, **instead}, output_dir=out)
