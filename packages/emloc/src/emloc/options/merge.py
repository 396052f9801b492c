"""Options of merge."""

from pydantic import Field

from emloc.options.base import MemoryOptions, ModelOptions
from emloc.options.types import Located, OutputDir


class MergeConfig(ModelOptions, MemoryOptions):
    """Write base + adapter as a full checkpoint."""

    adapter: Located = Field(description="PEFT adapter of the base model")
    output_dir: OutputDir = Field(description="where the merged model goes; must not exist")
    model_name_or_path: Located | None = Field(
        None, description="the base model; by default the one that the adapter names"
    )
