"""A setting that was chosen for a budget, how it came about, and all of it as JSON."""

from dataclasses import dataclass, field
from typing import Any

from emloc.config import PlanConfig
from emloc.options.compress import sized_by, with_size
from emloc.options.marks import SampleSize, marked
from emloc.planning.setting import Setting, Stages

CHANGEABLE = (
    "format",
    "keep_ratio",
    "gradient_checkpointing",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "num_calibration_samples",
    "calibration_batch_size",
)
"""Options that fitting may change, in addition to the sizes of samples (`SampleSize`)."""


RUNNING = "inference"
"""The row of the base with the corrected LoRA, which is what all stages are for."""


def changed_options(options: PlanConfig) -> dict[str, Any]:
    """The changed options as they are now: what to give the stages."""
    names = (*CHANGEABLE, *marked(type(options), SampleSize))
    return {name: getattr(options, name) for name in names}


@dataclass
class MemoryPlan:
    """A setting, and how it came about.

    Attributes:
        stages: that are planned.
        budget: bytes of the device, or None.
        fits: whether all stages do; None without a budget.
        given_up: what was changed to fit, in order.
        smallest: bytes that the least demanding setting takes, where nothing fits.
        dominating: the stage and the line that take most, where nothing fits.
        choices: the formats that were tried, as JSON.
    """

    setting: Setting
    stages: Stages
    budget: int | None = None
    fits: bool | None = None
    given_up: list[str] = field(default_factory=list[str])
    smallest: int | None = None
    dominating: tuple[str, str] | None = None
    choices: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def as_json(self) -> dict[str, Any]:
        """`parameters`, `fits`, `keep_ratio` (null where bits size it), `stages`, and what else there is."""
        subject, options = self.setting.subject, self.setting.options
        described: Stages = {**self.stages, RUNNING: Setting.inference}
        stages = {name: self.setting.stage(each).as_json() for name, each in described.items()}
        return {
            "model": subject.checkpoint.name,
            "family": subject.family.name,
            "parameters": subject.parameters,
            "dtype": str(subject.stored).removeprefix("torch."),
            "emulator_parameters": subject.emulator_parameters(self.setting.emulator),
            "emulator_bytes": subject.emulator_bytes(self.setting.emulator, options.dtype),
            "embedding_bits": options.embedding_bits,
            "keep_ratio": with_size(options).keep_ratio,
            "sized_by": sized_by(options),
            "format": options.format,
            "bits_per_weight": self.setting.bits_per_weight,
            "device": options.device,
            "activations": self.setting.counted_by,
            "memory": self.budget,
            "fits": self.fits,
            "given_up": self.given_up,
            "smallest": self.smallest,
            "dominating": list(self.dominating) if self.dominating else None,
            "choices": self.choices,
            "options": changed_options(options),
            "stages": stages,
            "beside": {name: memory.as_json() for name, memory in self.setting.beside.items()},
        }
