"""Options that mean something for text alone; families of text register them. Imports nothing heavy."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, Field

from emloc.config import (
    CalibrationOptions,
    DataOptions,
    EvaluateConfig,
    StageConfig,
    TrainConfig,
)


class TextOptions(StageConfig):
    """Options for the parts of a sample that have a loss."""

    completion_only_loss: bool = Field(True, description="no loss on prompts")
    assistant_only_loss: bool = Field(False, description="loss on every answer of a chat")


class TextTrainingOptions(StageConfig):
    """Options for making rows of samples of text."""

    packing: bool = Field(False, description="fill max_length with several samples, cut anywhere")


class AnswerOptions(StageConfig):
    """Options for the answers that a model is asked for, and for comparing them."""

    num_answers: int | None = Field(
        None, ge=1, description="answers are written to the first so many samples; by default all"
    )
    answer: Literal["auto", "text", "number", "option", "json"] = Field(
        "auto", description="how answers are compared; auto: by what the references are"
    )


TEXT_OPTIONS: Mapping[type[BaseModel], Sequence[type[BaseModel]]] = {
    DataOptions: (TextOptions,),
    TrainConfig: (TextTrainingOptions,),
    EvaluateConfig: (AnswerOptions,),
}
"""The options as a family registers them (`FamilyEntry.options`)."""


class TextDataOptions(DataOptions, TextOptions):
    """The data options of text families' stages, for annotations."""


class TextCalibrationOptions(CalibrationOptions, TextDataOptions):
    """The options of stages that calibrate, for annotations."""


class TextTrainConfig(TrainConfig, TextDataOptions, TextTrainingOptions):
    """The options of training, for annotations."""


class TextEvaluateConfig(EvaluateConfig, TextDataOptions, AnswerOptions):
    """The options of evaluating, for annotations."""
