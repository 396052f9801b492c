"""Options for rows and for text; families register those that they read. Imports nothing heavy."""

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from emloc.config import (
    CalibrationOptions,
    DataOptions,
    EvaluateConfig,
    LearntDataOptions,
    StageConfig,
    TrainingOptions,
)
from emloc.options.marks import InsteadOf, LossAlone, NamesData, SampleSize, SplitOf
from emloc.options.types import Located, Names, TextMap, split

SHORTEST = 256
"""Tokens below which no budget takes `max_length`."""


class SplitOptions(StageConfig):
    """The option for the part of a data set that is read."""

    dataset_split: Annotated[str, SplitOf("dataset")] = Field(
        "train", description="split of a hub data set or folder"
    )


class RowOptions(StageConfig):
    """Options for reading rows of one or several data sets."""

    dataset_weights: Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(split)] = Field(
        [], description="share of each data set; by default proportional to its size"
    )
    streaming: bool = Field(
        False, description="read rows as they come and store nothing; needs max_steps"
    )
    column_map: TextMap = Field(
        {}, description="your column=ours: messages, tools, prompt, completion, text, …"
    )


class MixingOptions(StageConfig):
    """A check of `RowOptions` where data sets are mixed."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> "MixingOptions":
        whole: Any = self
        several = whole.dataset and not os.path.exists(whole.dataset)  # as `data_names`
        names = whole.dataset.split(",") if several else []
        if whole.streaming and len(names) > 1 and not whole.dataset_weights:
            raise ValueError(
                "streaming does not know how large data sets are; give dataset_weights, one for each"
            )
        if whole.dataset_weights and names and len(names) != len(whole.dataset_weights):
            raise ValueError(
                f"dataset_weights has {len(whole.dataset_weights)} weights for {len(names)} data sets; "
                f"give one for each"
            )
        return self


class LengthOptions(StageConfig):
    """The option for the length of samples."""

    max_length: Annotated[int, SampleSize(SHORTEST)] = Field(
        1024, ge=2, description="tokens per sample; longer ones are truncated"
    )


class LabelOptions(StageConfig):
    """Options for the parts of a sample that have a loss."""

    completion_only_loss: bool = Field(True, description="no loss on prompts")
    assistant_only_loss: bool = Field(False, description="loss on every answer of a chat")


class TokenCountOptions(StageConfig):
    """The option for counting calibration samples in tokens."""

    num_calibration_tokens: int | None = Field(
        None, ge=1, description="draw samples until they have this many tokens"
    )


class EvaluationDataOptions(StageConfig):
    """Options for data that training is judged on while it goes on."""

    eval_dataset: Annotated[Located | None, NamesData("eval_data_digest")] = Field(
        None, description="evaluated every eval_steps"
    )
    eval_dataset_split: Annotated[str, SplitOf("eval_dataset")] = Field(
        "test", description="split of a hub data set"
    )
    eval_steps: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _has_data(self) -> "EvaluationDataOptions":
        if self.eval_steps is not None and self.eval_dataset is None:
            raise ValueError("eval_steps is for an eval_dataset; pass one, or leave it out")
        return self


class PackingOptions(StageConfig):
    """The option for making rows of samples of text."""

    packing: bool = Field(False, description="fill max_length with several samples, cut anywhere")


class AnswerOptions(StageConfig):
    """Options for the answers that a model is asked for, and for comparing them."""

    max_new_tokens: Annotated[int, LossAlone(0)] = Field(256, ge=0, description="0: loss only")
    num_answers: int | None = Field(
        None, ge=1, description="number of samples to answer, from the first; by default all"
    )
    answer: Literal["auto", "text", "number", "option", "json"] = Field(
        "auto", description="how answers are compared; auto: according to the references"
    )


class TaskOptions(StageConfig):
    """The option for scores of lm-eval."""

    tasks: Annotated[Names, InsteadOf("dataset")] = Field(
        [], description="lm-eval tasks instead of a data set"
    )


TEXT_OPTIONS: Mapping[type[BaseModel], Sequence[type[BaseModel]]] = {
    DataOptions: (SplitOptions, RowOptions, LengthOptions, LabelOptions),
    LearntDataOptions: (MixingOptions,),
    CalibrationOptions: (TokenCountOptions,),
    TrainingOptions: (EvaluationDataOptions, PackingOptions),
    EvaluateConfig: (AnswerOptions,),
}
"""The options of a family that reads rows with text, as it registers them (`FamilyEntry.options`)."""


def counted_tokens(options: BaseModel) -> int | None:
    """`num_calibration_tokens`, where a family has the option."""
    return getattr(options, "num_calibration_tokens", None)


def longest(options: BaseModel) -> int:
    """`max_length`; 0 where a family does not have the option."""
    return getattr(options, "max_length", 0)


def read_whole(options: BaseModel, length: int, elsewhere: bool) -> dict[str, Any]:
    """Options under which every token of samples has a loss, of those that a family has.

    Args:
        length: tokens that samples are cut at.
        elsewhere: whether the samples are of another data set than the options name, so that what they say of
            its columns does not hold.
    """
    whole: dict[str, Any] = {
        "num_calibration_tokens": None,
        "max_length": length,
        "completion_only_loss": False,
    }
    if elsewhere:
        whole |= {"column_map": {}, "dataset_weights": []}
    return {name: value for name, value in whole.items() if name in type(options).model_fields}
