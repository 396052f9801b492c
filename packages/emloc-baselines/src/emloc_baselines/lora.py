"""LoRA on the base model (Hu et al. 2021, arXiv 2106.09685): nothing light about it, the reference of all."""

from pathlib import Path

from emloc.config import StageConfig
from emloc.extend.methods import NoOptions, Task
from emloc.methods.light import train_light


class Lora:
    """The base is its own light model, and its adapter is the result."""

    options: type[StageConfig] = NoOptions

    def build(self, task: Task, out: Path) -> Path | None:
        """See `Method`; nothing to build."""
        return None

    def train(self, task: Task, light: Path | None, out: Path) -> Path:
        """See `Method`; `emloc.train` on the base."""
        return train_light(task, None, out)

    def recover(self, task: Task, light: Path | None, adapter: Path, out: Path) -> Path:
        """See `Method`; it is an adapter of the base already."""
        return adapter
