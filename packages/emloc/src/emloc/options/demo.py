"""Options of demo."""

from pathlib import Path

from pydantic import Field

from emloc.machine.device import Device
from emloc.options.base import DEVICES, StageConfig
from emloc.options.types import Located, OutputDir


class DemoConfig(StageConfig):
    """The whole method on a small real model."""

    family: str = Field("llm", description="family whose demo to run")
    output_dir: OutputDir = Field(
        Path("demo-output"), description="folder for everything that it writes"
    )
    model_name_or_path: Located | None = Field(
        None, description="a model to use instead of the demo's own"
    )
    keep_ratio: float | None = Field(
        None, gt=0, le=1, description="passed to compress; by default the demo's budget in bits"
    )
    bits_per_weight: float | None = Field(
        None, gt=0, le=64, description="passed to compress; by default the demo's own"
    )
    max_steps: int | None = Field(None, ge=1, description="by default the demo's own")
    num_samples: int | None = Field(None, ge=1, description="unseen examples to evaluate on")
    seed: int = Field(0, ge=0)
    device: Device = Field("auto", validate_default=True, description=DEVICES)
