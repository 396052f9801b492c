"""The options of each stage: Python keywords, YAML keys and `--long_options` are these fields.

One model per stage, unknown keys refused with the nearest known name.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from emloc.artefacts.output_place import OutputDir
from emloc.artefacts.settings import WithoutEffect
from emloc.errors import ConfigError
from emloc.machine.device import Device, PlannedDevice
from emloc.options.text import whole_numbers
from emloc.options.types import (
    CountMap,
    Dtype,
    Limit,
    Located,
    Names,
    Optimizer,
    RatioMap,
    Scheduler,
    TextMap,
    joined,
    split,
)
from emloc.planning.amounts import Bytes

DEVICES = "cpu, cuda, cuda:1; auto: cuda where there is one"
_SHOWN_CHARACTERS = 100


class StageConfig(BaseModel):
    """Base of all stage options: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelOptions(StageConfig):
    """How the model's files are read."""

    single_file_config: Located | None = Field(
        None,
        description="of a model in one file: a folder or hub id with its configuration; by default a guess",
    )


class MemoryOptions(StageConfig):
    """What a stage may take."""

    memory: Annotated[Bytes | None, WithoutEffect()] = Field(
        None,
        description="what the device has for it, such as 24GiB: planned before, and held to it",
    )


class DataOptions(StageConfig):
    """Which data, and how its columns are read."""

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
    completion_only_loss: bool = Field(True, description="no loss on prompts")
    assistant_only_loss: bool = Field(False, description="loss on every answer of a chat")


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
    """Which samples stand for the data when compressing and when choosing a limit."""

    num_calibration_samples: int = Field(64, ge=1, description="samples drawn by seed")
    num_calibration_tokens: int | None = Field(
        None, ge=1, description="draw samples until there are so many tokens instead"
    )
    calibration_batch_size: int = Field(8, ge=1, description="samples per micro-batch")
    seed: int = Field(0, ge=0, description="draws calibration samples; seeds training")


class CompressConfig(CalibrationOptions, ModelOptions, MemoryOptions):
    """Stage 1: write a low-rank emulator of a model."""

    model_name_or_path: Located = Field(
        description="local folder or hub id of the base model, or its one file"
    )
    output_dir: OutputDir = Field(description="where the emulator goes; must not exist")
    keep_ratio: float = Field(
        0.4,
        gt=0,
        le=1,
        description="share of each layer's parameters kept; with memory, what fits by default",
    )
    keep_ratio_pattern: RatioMap = Field({}, description="regular expression=ratio, per layer")
    rank_pattern: CountMap = Field({}, description="regular expression=rank, per layer")
    keep_ratio_allocation: Literal["uniform", "error"] = Field(
        "uniform",
        description="uniform: the same ratio for all; error: where it lowers the error most",
    )
    share_factors: bool = Field(True, description="one right factor for layers of one input")
    exclude: Names = Field([], description="regular expressions of layers to keep dense")
    include: Names = Field(
        [], description="regular expressions of layers to compress that are kept dense by default"
    )
    dtype: Dtype = Field("auto", description="of the emulator's weights; auto: the base's")
    device: Annotated[Device, WithoutEffect()] = Field(
        "auto", validate_default=True, description=DEVICES
    )


class LoraOptions(StageConfig):
    """PEFT's LoRA options under the names that people know."""

    lora_r: int = Field(16, ge=1, description="rank")
    lora_alpha: float = Field(
        32, gt=0, allow_inf_nan=False, description="alpha; scaling is alpha / r"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target_modules: Names = Field(
        ["all-linear"], description="module names, or all-linear (the head excluded)"
    )
    lora_rank_pattern: CountMap = Field({}, description="regular expression=rank")
    lora_alpha_pattern: CountMap = Field({}, description="regular expression=alpha")
    use_rslora: bool = Field(False, description="scaling is alpha / sqrt(r)")
    use_dora: bool = Field(False, description="weight-decomposed LoRA")
    lora_init: Literal["default", "gaussian", "pissa", "olora", "eva"] = Field(
        "default", description="how A and B begin"
    )
    lora_layers_to_transform: Annotated[
        list[Annotated[int, Field(ge=0)]], BeforeValidator(split)
    ] = Field([], description="numbers of the blocks to adapt; by default all")
    lora_layers_pattern: Names = Field(
        [], description="names of the stacks that blocks are numbered in, where there are several"
    )
    lora_modules_to_save: Names = Field([], description="modules trained whole, such as lm_head")
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="LoRA+: learning rate of B over that of A"
    )


class TrainConfig(LearntDataOptions, LoraOptions, ModelOptions, MemoryOptions):
    """Stage 2: train a LoRA on an emulator (or, as a reference, on the model itself)."""

    emulator: Located | None = Field(None, description="folder that compress wrote")
    model_name_or_path: Located | None = Field(
        None, description="train on this model instead of an emulator"
    )
    output_dir: OutputDir = Field(description="where the adapter goes; must not exist")
    eval_dataset: Located | None = Field(None, description="evaluated every eval_steps")
    eval_dataset_split: str = Field("test", description="split of a hub data set")
    dtype: Dtype = Field("auto", description="of the frozen weights; auto: as stored")
    device: Annotated[Device, WithoutEffect()] = Field(
        "auto", validate_default=True, description=DEVICES
    )
    seed: int = Field(0, ge=0, description="initialisation, data order and dropout")
    per_device_train_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    optim: Optimizer = Field(
        "adamw_torch_fused", description="transformers' names; 8 bits need a GPU; prodigy"
    )
    lr_scheduler_type: Scheduler = Field("cosine", description="under transformers' name")
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_steps: int = Field(-1, ge=-1, description="overrides num_train_epochs where positive")
    num_train_epochs: float = Field(3.0, gt=0)
    packing: bool = Field(False, description="fill max_length with several samples, cut anywhere")
    gradient_checkpointing: Annotated[bool, WithoutEffect()] = Field(
        False, description="less memory, slower steps"
    )
    logging_steps: Annotated[int, WithoutEffect()] = Field(10, ge=1)
    save_steps: Annotated[int, WithoutEffect()] = Field(
        100, ge=1, description="steps between resumable checkpoints"
    )
    save_total_limit: Annotated[int, WithoutEffect()] = Field(
        2, ge=1, description="checkpoints kept"
    )
    eval_steps: int | None = Field(None, ge=1)
    resume_from_checkpoint: Annotated[Located, WithoutEffect()] = Field(
        "auto", description="auto: go on with an interrupted run; never; or a checkpoint's folder"
    )
    report_to: Annotated[Names, WithoutEffect()] = Field(
        [], description="tensorboard, wandb, …; none by default"
    )


class CorrectConfig(CalibrationOptions, ModelOptions, MemoryOptions):
    """Stage 3: fit the LoRA to the original model."""

    adapter: Located = Field(description="PEFT adapter trained on the emulator")
    emulator: Located = Field(description="the emulator it was trained on")
    output_dir: OutputDir = Field(description="where the corrected adapter goes; must not exist")
    model_name_or_path: Located | None = Field(
        None, description="the base model; by default the one that the emulator names"
    )
    num_calibration_samples: int = Field(32, ge=1, description="samples drawn by seed")
    limit: Limit = Field(
        "auto", description="largest correction per direction, relative to the LoRA; none; auto"
    )
    limit_candidates: Annotated[list[Limit], BeforeValidator(split)] = Field(
        [0.0, 0.3, 1.0, 3.0, "none"], description="what auto tries; 0 is no correction"
    )
    device: Annotated[Device, WithoutEffect()] = Field(
        "auto", validate_default=True, description=DEVICES
    )


class MergeConfig(ModelOptions, MemoryOptions):
    """Write base + adapter as a full checkpoint."""

    adapter: Located = Field(description="PEFT adapter of the base model")
    output_dir: OutputDir = Field(description="where the merged model goes; must not exist")
    model_name_or_path: Located | None = Field(
        None, description="the base model; by default the one that the adapter names"
    )


class EvaluateConfig(DataOptions, ModelOptions):
    """Loss and exact match of a model, with or without an adapter."""

    model_name_or_path: Located = Field(description="model or emulator")
    adapter: Located | None = Field(None, description="PEFT adapter to put on it")
    output_dir: OutputDir | None = Field(None, description="where evaluation.json goes")
    num_samples: int | None = Field(None, ge=1, description="the first so many; by default all")
    per_device_eval_batch_size: int = Field(16, ge=1)
    max_new_tokens: int = Field(256, ge=0, description="0: loss only")
    num_answers: int | None = Field(
        None, ge=1, description="answers are written to the first so many samples; by default all"
    )
    answer: Literal["auto", "text", "number", "option", "json"] = Field(
        "auto", description="how answers are compared; auto: by what the references are"
    )
    tasks: Names = Field([], description="lm-eval tasks instead of a data set")
    dtype: Dtype = Field("auto", description="auto: as stored")
    device: Annotated[Device, WithoutEffect()] = Field(
        "auto", validate_default=True, description=DEVICES
    )


class VerifyConfig(ModelOptions):
    """Check an emulator, adapter or merged model."""

    path: OutputDir = Field(description="folder to check")
    model_name_or_path: Located | None = Field(
        None, description="the base model; by default the one that the folder names"
    )


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
    device: Annotated[PlannedDevice, WithoutEffect()] = Field(
        "auto",
        validate_default=True,
        description=f"{DEVICES}; cuda need not be here, and cpu's memory is the machine's",
    )
    dtype: Dtype = Field("auto", description="of the weights; auto: what the config says")
    output_dir: OutputDir | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, description="where plan.json and plan.png go"
    )


class DemoConfig(StageConfig):
    """The whole method on a small real model."""

    family: str = Field("llm", description="which plugin's demo")
    output_dir: OutputDir = Field(Path("demo-output"), description="where everything goes")
    model_name_or_path: Located | None = Field(
        None, description="another model than the demo's own"
    )
    keep_ratio: float | None = Field(None, gt=0, le=1, description="by default the demo's own")
    max_steps: int | None = Field(None, ge=1, description="by default the demo's own")
    num_samples: int | None = Field(None, ge=1, description="unseen examples to evaluate on")
    seed: int = Field(0, ge=0)
    device: Device = Field("auto", validate_default=True, description=DEVICES)


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """` Did you mean X?` for an unknown name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def build(model: type[ConfigT], options: Mapping[str, Any], where: str) -> ConfigT:
    """Validate options; `where` names their origin in messages.

    Raises:
        ConfigError: one sentence on the first thing wrong.
    """
    try:
        return model(**whole_numbers(model, options))
    except ValidationError as problem:
        raise ConfigError(f"{where}: {_sentence(model, problem.errors()[0])}") from problem


def _sentence(model: type[BaseModel], first: ErrorDetails) -> str:
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"unknown option {name}.{nearest(name, cast('dict[str, Any]', model.model_fields))}"
    if first["type"] == "missing":
        return f"{name} is required ({model.model_fields[name].description})."
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        allowed = _allowed(model, name)
        message += f".{nearest(first['input'], allowed)}" if allowed else ""
    shown = repr(first["input"])
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[: _SHOWN_CHARACTERS - 1]}…"
    start = f"{name} = {shown}: " if name else ""
    end = "" if message.endswith(("?", ".")) else "."
    return f"{start}{message[0].lower()}{message[1:]}{end}"


def _allowed(model: type[BaseModel], name: str) -> list[str]:
    field = model.model_fields.get(name)
    values = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
    return [value for value in values if isinstance(value, str)]
