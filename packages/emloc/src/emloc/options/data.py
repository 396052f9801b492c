"""Options of data: which rows are read, and which of them calibrate."""

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from emloc.options.base import StageConfig
from emloc.options.types import TextMap, joined, split


class DataOptions(StageConfig):
    """Options for the data and for reading its columns."""

    dataset: Annotated[str | None, BeforeValidator(joined)] = Field(
        None, description="JSONL, CSV or parquet file, folder, or hub id; several: a,b"
    )
    dataset_weights: Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(split)] = Field(
        [], description="share of each data set; by default by size"
    )
    streaming: bool = Field(False, description="read as it comes, nothing stored; needs max_steps")
    dataset_split: str = Field("train", description="split of a hub data set or folder")
    column_map: TextMap = Field(
        {}, description="your column=ours: messages, tools, prompt, completion, text, …"
    )
    max_length: int = Field(1024, ge=2, description="tokens per sample; longer ones are truncated")


class LearntDataOptions(DataOptions):
    """Data that are mixed by weight."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> "LearntDataOptions":
        names = self.dataset.split(",") if self.dataset else []
        if self.dataset_weights and names and len(names) != len(self.dataset_weights):
            raise ValueError(
                f"dataset_weights has {len(self.dataset_weights)} weights for {len(names)} data sets; "
                f"give one for each"
            )
        return self


class CalibrationOptions(LearntDataOptions):
    """Options for the samples that stand for the data when compressing and when choosing a limit."""

    num_calibration_samples: int = Field(64, ge=1, description="samples drawn by seed")
    num_calibration_tokens: int | None = Field(
        None, ge=1, description="draw samples until there are so many tokens instead"
    )
    calibration_batch_size: int = Field(8, ge=1, description="samples per micro-batch")
    seed: int = Field(0, ge=0, description="draws calibration samples; seeds training")
