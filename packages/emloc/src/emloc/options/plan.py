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
    """Say what every stage will take, from a config alone, and choose what fits.

    Takes the options of compress and train; those that change no byte are accepted all the same.
    """

    model_name_or_path: Located = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description="local folder or hub id; weights are neither needed nor downloaded"
    )
    memory: Bytes | None = Field(
        None, description="what the device has, such as 24GiB; by default nothing is chosen"
    )
    ram: Bytes | None = Field(
        None, description="what the machine has beside a GPU; by default ways are not judged by it"
    )
    disk: Bytes | None = Field(None, description="what may be written; by default any amount")
    measure: bool = Field(
        False,
        description="measure in some seconds how fast this device is, for seconds per step; kept",
    )
    device: Annotated[PlannedDevice, WithoutEffect()] = Field(
        "auto",
        validate_default=True,
        description=f"{DEVICES}; cuda need not be here, and cpu's memory is the machine's",
    )
    dtype: Dtype = Field("auto", description="of the weights; auto: what the config says")
    output_dir: OutputDir | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, description="where plan.json and plan.png go"
    )
