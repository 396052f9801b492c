"""Options of data: what is learnt or scored, and which samples calibrate.

What there is to say of rows of text besides is `emloc.integrations.transformers.text_options`.
"""

from typing import Annotated

from pydantic import BeforeValidator, Field

from emloc.options.base import StageConfig
from emloc.options.marks import NamesData
from emloc.options.types import joined


class DataOptions(StageConfig):
    """Options for the data."""

    dataset: Annotated[str | None, BeforeValidator(joined), NamesData("data_digest")] = Field(
        None, description="JSONL, CSV or parquet file, folder, or hub id; several: a,b"
    )


class LearntDataOptions(DataOptions):
    """Options for data that are learnt, where several data sets become one."""


class CalibrationOptions(LearntDataOptions):
    """Options for the samples that stand for the data when compressing and when choosing a limit."""

    num_calibration_samples: int = Field(64, ge=1, description="samples to draw, by seed")
    calibration_batch_size: int = Field(8, ge=1, description="samples per micro-batch")
    seed: int = Field(0, ge=0, description="seed for drawing calibration samples and for training")
