"""Options of train, and those that it shares with polish."""

from typing import Annotated, Literal

from pydantic import Field

from emloc.machine.device import Device
from emloc.options.base import DEVICES, MemoryOptions, ModelOptions
from emloc.options.data import LearntDataOptions
from emloc.options.lora import LoraOptions
from emloc.options.marks import UnlessDefault, WithoutEffect
from emloc.options.types import Dtype, Located, Names, Optimizer, OutputDir, Scheduler


class TrainingOptions(LearntDataOptions, ModelOptions, MemoryOptions):
    """Options for the steps of an optimiser, and for what is kept of them."""

    output_dir: OutputDir = Field(description="where the adapter goes; must not exist")
    dtype: Dtype = Field("auto", description="dtype of the frozen weights; auto: as stored")
    device: Annotated[Device, WithoutEffect()] = Field(
        "auto", validate_default=True, description=DEVICES
    )
    stream: Annotated[bool, UnlessDefault()] = Field(
        False, description="hold one block of model_name_or_path at a time, read twice per step"
    )
    stream_from: Annotated[Literal["disk", "ram"], WithoutEffect()] = Field(
        "disk", description="where blocks wait for their turn with stream=true"
    )
    stream_bits: Annotated[Literal[4, 8] | None, UnlessDefault()] = Field(
        None,
        description="bits of blocks that wait in ram; the model is then quantised, as in QLoRA",
    )
    stream_inputs: Annotated[Literal["disk", "ram"], WithoutEffect()] = Field(
        "ram", description="where each block's inputs are kept during a step with stream=true"
    )
    seed: int = Field(0, ge=0, description="seed for initialisation, data order and dropout")
    per_device_train_batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    optim: Optimizer = Field(
        "adamw_torch_fused",
        description="as transformers names it, or prodigy; 8-bit ones need a GPU",
    )
    lr_scheduler_type: Scheduler = Field("cosine", description="as transformers names it")
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    num_held_back_samples: Annotated[int, UnlessDefault()] = Field(
        0, ge=0, description="samples not trained on; their loss is measured before and after"
    )
    logging_steps: Annotated[int, WithoutEffect()] = Field(10, ge=1)
    save_steps: Annotated[int, WithoutEffect()] = Field(
        100, ge=1, description="steps between resumable checkpoints"
    )
    save_total_limit: Annotated[int, WithoutEffect()] = Field(
        2, ge=1, description="checkpoints kept"
    )
    resume_from_checkpoint: Annotated[Located, WithoutEffect()] = Field(
        "auto", description="auto: continue an interrupted run; never; or a checkpoint's folder"
    )
    report_to: Annotated[Names, WithoutEffect()] = Field(
        [], description="tensorboard, wandb, …; none by default"
    )


class TrainConfig(TrainingOptions, LoraOptions):
    """Stage 2: train a LoRA on an emulator (or, as a reference, on the model itself)."""

    emulator: Located | None = Field(None, description="folder written by compress")
    model_name_or_path: Located | None = Field(
        None, description="train on this model instead of an emulator"
    )
    adapter: Annotated[Located | None, UnlessDefault()] = Field(
        None, description="continue from this LoRA, with its options, instead of starting a new one"
    )
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_steps: int = Field(-1, ge=-1, description="overrides num_train_epochs if positive")
    num_train_epochs: float = Field(3.0, gt=0)
    gradient_checkpointing: Annotated[bool, WithoutEffect()] = Field(
        False, description="less memory, slower steps"
    )
