"""Options of plan: those of compress and train together."""

from typing import Annotated

from pydantic import Field

from emloc.machine.device import PlannedDevice
from emloc.options.amounts import Bytes
from emloc.options.base import DEVICES
from emloc.options.compress import CompressConfig
from emloc.options.marks import WithoutEffect
from emloc.options.train import TrainConfig
from emloc.options.types import Dtype, Located, OutputDir


class PlanConfig(CompressConfig, TrainConfig):
    """Say what every stage will need, from a config alone, and choose what fits.

    Takes the options of compress and train; those that change no byte are accepted too.
    """

    model_name_or_path: Located = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description="local folder or hub id; weights are neither needed nor downloaded"
    )
    memory: Bytes | None = Field(
        None, description="memory of the device, such as 24GiB; by default nothing is chosen"
    )
    ram: Bytes | None = Field(
        None,
        description="the machine's memory besides a GPU's; by default ways are not judged by it",
    )
    disk: Bytes | None = Field(
        None, description="disk space that may be used; by default any amount"
    )
    measure: bool = Field(
        False,
        description="spend a few seconds measuring how fast this device is, to predict seconds per step; "
        "the result is kept",
    )
    device: Annotated[PlannedDevice, WithoutEffect()] = Field(
        "auto",
        validate_default=True,
        description=f"{DEVICES}; cuda need not be available here, and cpu's memory is the machine's",
    )
    dtype: Dtype = Field("auto", description="dtype of the weights; auto: the config's")
    output_dir: OutputDir | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, description="where plan.json and plan.png go"
    )
