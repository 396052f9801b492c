"""Train a LoRA with transformers' Trainer (or TRL's): arguments, resuming, saving, figures.

What differs between modalities, the model, the data and the trainer's class, is given.
"""

import shutil
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import PreTrainedModel, ProgressCallback
from transformers.trainer_callback import PrinterCallback

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.json_files import read_json
from emloc.artefacts.stage_folder import SETTINGS_NAME
from emloc.config import TrainConfig
from emloc.errors import CheckpointError, ConfigError, EmlocError, NumericalError
from emloc.extend.family import Batch, ModelFamily
from emloc.integrations.peft.attach import put_on
from emloc.integrations.peft.fused_lora import fuse_lora
from emloc.integrations.peft.lora import new_lora, save_as_plain_lora
from emloc.integrations.peft.parts import Part, refuse_beginning, with_parts
from emloc.integrations.transformers.checkpoint_lora import require_same_lora
from emloc.integrations.transformers.checkpoints import (
    DIGESTS_NAME,
    KeepsCheckpoints,
    damage,
    last_whole_checkpoint,
)
from emloc.integrations.transformers.held_back import mean_loss
from emloc.integrations.transformers.optimizers import (
    set_optimizer,
    trainers_name,
    warn_of_slow_learning,
)
from emloc.integrations.transformers.streamed_training import (
    fill_saved,
    set_magnitudes,
    stream_steps,
)
from emloc.integrations.transformers.training import (
    PLOT_NAME,
    Progression,
    plot_loss,
)
from emloc.linalg.finite import is_finite
from emloc.machine.progress import console
from emloc.stages.training_needs import check_training
from emloc.streaming.streamed_model import StreamedModel


def train_lora(
    config: TrainConfig,
    work: Path,
    model: Any,
    make_trainer: Callable[..., Any],
    batches: Iterable[Batch],
    excluded: Container[str] = (),
    parts: Mapping[str, Part] | None = None,
    task_type: str | None = None,
    adapter: Adapter | None = None,
    held_back: Any = None,
    family: ModelFamily | None = None,
) -> dict[str, Any]:
    """Train a LoRA on `model` into `work`; returns figures for the manifest.

    Args:
        make_trainer: builds the trainer of the model with its LoRA, given `model=` and `callbacks=`.
        batches: training batches, for beginnings of the LoRA that look at data.
        excluded: modules that are not adapted, whatever targets say.
        parts: other models to train along, by the names of the subfolders that their adapters go to.
        task_type: PEFT's name of what the model is for, such as `CAUSAL_LM`, if it has one.
        adapter: to go on from, in place of a new LoRA.
        held_back: samples, as the trainer takes them, whose loss is taken before and after.
        family: the model's, which beginnings that look at data ask what counts.

    Raises:
        DataError, ConfigError, NumericalError: see their messages.
    """
    few = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    # In other models, what is not in few bits stays as it is.
    if few and isinstance(model, PreTrainedModel):
        model = prepare_model_for_kbit_training(model, config.gradient_checkpointing)
    parts = parts or {}
    if adapter is None:
        refuse_beginning(config, parts)
    streamed = StreamedModel.of(model)
    held = [part.model for part in parts.values()] + ([] if streamed else [model])
    weight_bytes = sum(_held(tensor) for each in held for tensor in _weights(each))
    if streamed is not None:  # one unit computes while another one is read
        weight_bytes += 2 * streamed.unit_bytes
    with nullcontext() if streamed is None else streamed.on_device():
        if adapter is None:
            model, start = new_lora(model, config, batches, excluded, task_type, family)
        else:
            model, start = put_on(model, adapter, trained=True), {}
    if streamed is not None and adapter is None:
        fill_saved(streamed)
        if config.use_dora:
            set_magnitudes(streamed)
    fuse_lora(model)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    model = with_parts(model, parts, config, adapter)
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    resumed = _checkpoint(config, work)
    if resumed is not None:
        require_same_lora(resumed, model)
    progression = Progression(work)
    kept = KeepsCheckpoints(work, config.save_total_limit, resumed)
    try:
        trainer = make_trainer(model=model, callbacks=[progression, kept])
    except EmlocError:
        raise
    except ValueError as problem:  # such as TRL's, whose loss passes a LoRA on the head by
        raise ConfigError(f"train: {str(problem).strip().splitlines()[0]}") from problem
    kept.trainer = trainer
    if streamed is not None:
        stream_steps(trainer, streamed)
    set_optimizer(trainer, config)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    losses: list[float] = []
    try:
        if held_back:
            losses.append(mean_loss(trainer, held_back, streamed))
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        _require_finite(model)
        if held_back:
            losses.append(mean_loss(trainer, held_back, streamed))
    finally:
        progression.close()
    model.save_pretrained(str(work), save_embedding_layers=False)
    if start:
        save_as_plain_lora(work, start)
    plot_loss(trainer.state.log_history, work / PLOT_NAME)
    return {
        "summary": {
            "train_weight_bytes": weight_bytes + trainable,
            "trainable_bytes": trainable,
            "steps": trainer.state.global_step,
            **({"held_back_loss": losses} if held_back else {}),
        },
        "seconds_per_step": progression.seconds_per_step,
    }


def _require_finite(model: Any) -> None:
    """The last step's loss is of the weights before it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_finite(parameter.detach()):
            raise NumericalError(
                f"Training ended with NaN or infinity in {name}; use a lower learning_rate or max_grad_norm."
            )


def _weights(model: Any) -> list[Any]:
    """A model's parameters, and the buffers that are stored like them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = model.state_dict().keys() - parameters.keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in stored]
    return [*model.parameters(), *buffers]


def _held(parameter: Any) -> int:
    """Bytes of a parameter; of one in few bits, with the scales that belong to it."""
    state = getattr(parameter, "quant_state", None)
    scales = [] if state is None else state.as_dict(packed=True).values()
    return sum(t.numel() * t.element_size() for t in (parameter, *scales))


def training_arguments(kind: Any, config: TrainConfig, work: Path, **more: Any) -> Any:
    """The options as `kind`, transformers' `TrainingArguments` or a subclass; `more` are its own.

    With an `eval_dataset` among the options, it is evaluated every `eval_steps`.

    Raises:
        ConfigError: a value that transformers refuses, or an optimiser that cannot run here.
        DependencyError: a tracker or an optimiser that is not installed.
    """
    check_training(config)
    warn_of_slow_learning(config)
    on_gpu = config.device.startswith("cuda")
    try:
        arguments = kind(
            output_dir=str(work),
            per_device_train_batch_size=config.per_device_train_batch_size,
            per_device_eval_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_ratio,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            **trainers_name(config),
            max_steps=config.max_steps,
            num_train_epochs=config.num_train_epochs,
            gradient_checkpointing=config.gradient_checkpointing,
            logging_steps=config.logging_steps,
            logging_nan_inf_filter=False,  # it would hide a loss that is not a number
            save_steps=config.save_steps,
            save_total_limit=None,  # removed when the new one is whole (`KeepsCheckpoints`)
            eval_strategy="steps" if getattr(config, "eval_dataset", None) else "no",
            eval_steps=getattr(config, "eval_steps", None) or config.logging_steps,
            report_to=_trackers(config),
            seed=config.seed,
            data_seed=config.seed,
            bf16=on_gpu and torch.cuda.is_bf16_supported(),
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            disable_tqdm=True,
            **more,
        )
    except (ValueError, TypeError) as problem:
        raise ConfigError(f"train: {str(problem).strip().splitlines()[0]}") from problem
    if on_gpu:
        on_one_card(arguments, config.device)
    return arguments


def on_one_card(arguments: Any, device: str) -> None:
    """Have the Trainer compute on this card alone.

    By itself it takes the first, and where there are several all of them side by side, each with a part of
    every micro-batch.
    """
    if arguments.distributed_state.num_processes > 1:
        return
    card = torch.device(device if ":" in device else f"{device}:0")
    torch.cuda.set_device(card)
    arguments.__dict__.update(_setup_devices=card, _n_gpu=1)  # what it has cached


def _trackers(config: TrainConfig) -> str | list[str]:
    """transformers takes `all` and `none` as text alone."""
    alone = config.report_to[0] if len(config.report_to) == 1 else ""
    return alone if alone in ("all", "none") else (config.report_to or "none")


def _checkpoint(config: TrainConfig, work: Path) -> Path | None:
    """The checkpoint that training goes on from, if any.

    Raises:
        CheckpointError: the one that is asked for is none, or is damaged.
    """
    wanted = config.resume_from_checkpoint
    if wanted == "never":
        for stale in work.glob("checkpoint-*"):
            shutil.rmtree(stale)
        return None
    if wanted == "auto":
        newest = last_whole_checkpoint(work)
        if newest:
            console.print(f"train: continuing from {newest.name}")
        return newest
    asked = Path(wanted)
    # Another run's, as this one's settings say, which went on from there already if it has its own.
    settings = work / SETTINGS_NAME
    went_on = settings.is_file() and "checkpoint_digest" in read_json(settings)
    own = last_whole_checkpoint(work) if went_on else None
    if own is not None:
        console.print(f"train: continuing from {own.name}, which went on from {wanted}")
        return own
    if not (asked / "trainer_state.json").is_file():
        raise CheckpointError(f"{wanted} is not a complete training checkpoint; pass checkpoint-N.")
    # One that another trainer wrote has no digests.
    problem = damage(asked) if (asked / DIGESTS_NAME).is_file() else None
    if problem is not None:
        raise CheckpointError(f"{wanted}: {problem}; pass another checkpoint-N.")
    return asked
