"""Options of verify."""

from pydantic import Field

from emloc.options.base import ModelOptions
from emloc.options.types import Located, OutputDir


class VerifyConfig(ModelOptions):
    """Check an emulator, adapter or merged model."""

    path: OutputDir = Field(description="folder to check")
    model_name_or_path: Located | None = Field(
        None, description="the base model; by default the one that the folder names"
    )
    adapter: Located | None = Field(
        None,
        description="the adapter that it was made from; by default the one that the folder names",
    )
