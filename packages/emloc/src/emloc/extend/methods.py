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
from emloc.machine.targets import imported

Options = Mapping[str, Any]
"""Keywords of a stage."""


@dataclass(frozen=True)
class Task:
    """The model, data and options that a method is run on.

    Attributes:
        model_name_or_path: the base model.
        keep_ratio: the budget: a light model may hold, while it is trained, as many parameter bytes as
            EMLoC's emulator of this ratio does. A method that has no such size leaves it alone.
        seed: of whatever is drawn.
        compress: keywords of `emloc.compress`: how an emulator is built, and the
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
    """The empty options of a method that has none."""


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
        needs: what a family must offer (`emloc.extend.capabilities`) for the method to work on its models.
        uses_budget: whether `keep_ratio` changes the light model.
        trains_as: the method whose light model and training are the same, if not its own.
        plugin: filled in by core.
    """

    name: str
    summary: str
    target: str
    # By name alone: what stood in the fourth place once were families.
    needs: tuple[str, ...] = field(default=(), kw_only=True)
    uses_budget: bool = field(default=True, kw_only=True)
    trains_as: str = field(default="", kw_only=True)
    plugin: str = field(default="", kw_only=True)

    def load(self) -> Method:
        """Import the method."""
        return cast(Method, imported(self.target))

    def owned_by(self, plugin: str) -> "MethodEntry":
        """The same entry with its plugin's name."""
        return replace(self, plugin=plugin)


CORE_METHODS = (
    MethodEntry(
        "emloc", "LoRA on an emulator, corrected for the base", "emloc.methods.emloc:Emloc"
    ),
    MethodEntry(
        "emloc-uncorrected",
        "the same without correction",
        "emloc.methods.emloc:EmlocUncorrected",
        trains_as="emloc",
    ),
)
