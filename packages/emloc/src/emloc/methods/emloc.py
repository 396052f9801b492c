"""EMLoC as a method: emulator, LoRA, correction."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc.config import StageConfig
from emloc.extend.methods import NoOptions, Task
from emloc.methods.light import train_light
from emloc.options.compress import SIZING
from emloc.stages.compress import compress
from emloc.stages.correct import correct

CHOOSING = ("limit", "limit_candidates", "strength", "strength_candidates")
"""Options of correct that say how."""


class Emloc:
    """Emulator, LoRA, correction: the stages of this package, in the format that the options say."""

    options: type[StageConfig] = NoOptions

    def build(self, task: Task, out: Path) -> Path:
        """See `Method`; `emloc.compress`, with the task's budget unless its options size the emulator."""
        sized = not task.compress.keys().isdisjoint(SIZING)
        budget = {} if sized else {"keep_ratio": task.keep_ratio}
        return compress(
            **{**task.compress, "model_name_or_path": task.model_name_or_path, "seed": task.seed},
            **budget,
            output_dir=out,
        )

    def train(self, task: Task, light: Path | None, out: Path) -> Path:
        """See `Method`; `emloc.train`."""
        return train_light(task, light, out)

    def recover(self, task: Task, light: Path | None, adapter: Path, out: Path) -> Path:
        """See `Method`; `emloc.correct`."""
        return correct(
            **{**self.correct_options(task.correct), "seed": task.seed},
            adapter=str(adapter),
            emulator=str(light),
            output_dir=out,
        )

    def correct_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of correct as this method uses them.

        Args:
            options: as the task has them.
        """
        return dict(options)


class EmlocUncorrected(Emloc):
    """The same without correction: what was learnt on the emulator is put on the original as it is."""

    def correct_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """See `Emloc`; a limit of 0 leaves every weight as it is, whatever way others are corrected."""
        return {**{k: v for k, v in options.items() if k not in CHOOSING}, "limit": 0.0}
