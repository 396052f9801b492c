"""A smaller model of the same family, trained as it is: what a user would run who has no other way.

Its row is its own: the LoRA is trained on the smaller model and used on it, and never meets the base.
"""

from pathlib import Path

from pydantic import Field

from emloc.config import StageConfig, build
from emloc.extend.methods import Task
from emloc.methods.light import train_light

NAME = "smaller-model"


class SmallerOptions(StageConfig):
    """The choice of the smaller model."""

    smaller_model_name_or_path: str = Field(description="local folder or hub id")


class SmallerModel:
    """`Method`."""

    options: type[StageConfig] = SmallerOptions

    def build(self, task: Task, out: Path) -> Path | None:
        """See `Method`; nothing to build."""
        return None

    def train(self, task: Task, light: Path | None, out: Path) -> Path:
        """See `Method`."""
        own = build(SmallerOptions, task.options, NAME)
        return train_light(task, None, out, model_name_or_path=own.smaller_model_name_or_path)

    def recover(self, task: Task, light: Path | None, adapter: Path, out: Path) -> Path:
        """See `Method`; the adapter's manifest names the smaller model, on which it is scored."""
        return adapter
