"""A method of training a LoRA in less memory than the base model takes: EMLoC and what it is compared with.

Every one answers three questions. How is the light model built that is held while training? What is
trained on it? How does the result go back to the original model? What comes out is always an ordinary
PEFT adapter whose manifest names the model that it runs on, so evaluate, merge and verify need not know
the method.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from emloc.config import StageConfig
from emloc.extend.targets import imported

Options = Mapping[str, Any]
"""Keywords of a stage."""


@dataclass(frozen=True)
class Task:
    """What a method is run on.

    Attributes:
        model_name_or_path: the base model.
        keep_ratio: the budget: a light model may hold, while it is trained, as many parameter bytes as
            EMLoC's emulator of this ratio does. A method that has no such size leaves it alone.
        seed: of whatever is drawn.
        compress: keywords of `emloc.compress`: how a light model of factors is built, and the
            calibration data for those that look at data.
        train, correct: keywords of those stages. In none of the three: models, adapters, folders,
            `keep_ratio` and `seed`, which are the method's to give.
        options: of the method's own (`Method.options`).
    """

    model_name_or_path: str
    keep_ratio: float
    seed: int
    compress: Options
    train: Options
    correct: Options
    options: Options = field(default_factory=dict[str, Any])


class NoOptions(StageConfig):
    """Of a method that has none."""


@runtime_checkable
class Method(Protocol):
    """One method. Each step writes its folder completely or not at all, and returns it."""

    options: type[StageConfig]

    def build(self, task: Task, out: Path) -> Path | None:
        """Write the light model; None where the base itself, or another model, is trained on."""
        ...

    def train(self, task: Task, light: Path | None, out: Path) -> Path:
        """Train a LoRA on the light model; returns the PEFT adapter's folder."""
        ...

    def recover(self, task: Task, light: Path | None, adapter: Path, out: Path) -> Path:
        """Turn it into an adapter of the original model; may be the adapter as it is."""
        ...


@dataclass(frozen=True)
class MethodEntry:
    """A method as a plugin registers it, without importing it.

    Attributes:
        name: for example `emloc`.
        summary: one line for `emloc methods`.
        target: `module:attribute` of the `Method` class.
        families: those that it works for; none means all.
        uses_budget: whether `keep_ratio` changes the light model.
        trains_as: the method whose light model and training are the same, if not its own.
        plugin: filled in by core.
    """

    name: str
    summary: str
    target: str
    families: tuple[str, ...] = ()
    uses_budget: bool = True
    trains_as: str = ""
    plugin: str = ""

    def load(self) -> Method:
        """Import the method."""
        return cast(Method, imported(self.target))

    def owned_by(self, plugin: str) -> "MethodEntry":
        """The same entry with its plugin's name."""
        return replace(self, plugin=plugin)


class Emloc:
    """Low-rank emulator, LoRA, correction: the stages of this package."""

    options: type[StageConfig] = NoOptions

    def build(self, task: Task, out: Path) -> Path:
        """See `Method`; `emloc.compress`."""
        from emloc.stages.compress import compress

        return compress(
            **{**task.compress, "model_name_or_path": task.model_name_or_path, "seed": task.seed},
            keep_ratio=task.keep_ratio,
            output_dir=out,
        )

    def train(self, task: Task, light: Path | None, out: Path) -> Path:
        """See `Method`; `emloc.train`."""
        return train_light(task, light, out)

    def recover(self, task: Task, light: Path | None, adapter: Path, out: Path) -> Path:
        """See `Method`; `emloc.correct`."""
        return self._correct(task, light, adapter, out)

    def _correct(
        self, task: Task, light: Path | None, adapter: Path, out: Path, **instead: Any
    ) -> Path:
        from emloc.stages.correct import correct

        return correct(
            **{**task.correct, "seed": task.seed, **instead},
            adapter=str(adapter),
            emulator=str(light),
            output_dir=out,
        )


class EmlocUncorrected(Emloc):
    """The same without correction: what was learnt on the emulator is put on the original as it is."""

    def recover(self, task: Task, light: Path | None, adapter: Path, out: Path) -> Path:
        """See `Method`; a limit of 0 leaves every weight as it is and renames the base."""
        return self._correct(task, light, adapter, out, limit=0.0)


def train_light(task: Task, light: Path | None, out: Path, **instead: Any) -> Path:
    """`emloc.train` on a light model, or on the base where there is none; `instead` overrides options."""
    from emloc.stages.train import train

    where: Options = (
        {"model_name_or_path": task.model_name_or_path}
        if light is None
        else {"emulator": str(light)}
    )
    return train(**{**task.train, "seed": task.seed, **where, **instead}, output_dir=out)


CORE_METHODS = (
    MethodEntry(
        "emloc", "low-rank emulator, LoRA corrected for the base", "emloc.extend.methods:Emloc"
    ),
    MethodEntry(
        "emloc-uncorrected",
        "the same without correction",
        "emloc.extend.methods:EmlocUncorrected",
        trains_as="emloc",
    ),
)
