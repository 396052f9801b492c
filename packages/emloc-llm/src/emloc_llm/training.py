"""Train a LoRA with TRL's `SFTTrainer` on tokenised samples."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import ProgressCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from emloc.checkpoint import locate
from emloc.config import TrainConfig
from emloc.errors import CheckpointError, ConfigError, DependencyError
from emloc.integrations.peft.low_rank_lora import fuse_lora
from emloc.integrations.transformers.training import (
    PLOT_NAME,
    Progression,
    last_complete_checkpoint,
    plot_loss,
)
from emloc.memory import PeakMemory, return_large_blocks
from emloc.progress import console
from emloc_llm.data import Sample, encode, encode_all, load_samples, say_truncated
from emloc_llm.loading import load_model, load_tokenizer
from emloc_llm.lora import new_lora, save_as_plain_lora
from emloc_llm.rows import dataset_names, load_rows, shares


class Trainer(SFTTrainer):
    """TRL's trainer without its usage report."""

    def _send_telemetry(self) -> None:
        pass


def train_lora(config: TrainConfig, work: Path) -> dict[str, Any]:
    """Train into `work`; returns figures for the manifest.

    Raises:
        DataError, ConfigError, NumericalError: see their messages.
    """
    # Without it, activations freed in one step are still there in the next: 6 to 10 % more memory
    # for some 7 % of time, measured on SmolLM2-135M on two cores.
    return_large_blocks()
    with PeakMemory(config.device, mapped=True) as peak:
        figures = _train(config, work)
    return {**figures, **peak.figures()}


def _train(config: TrainConfig, work: Path) -> dict[str, Any]:
    path = locate(config.emulator or str(config.model_name_or_path))
    tokenizer = load_tokenizer(path)
    if config.streaming and config.max_steps <= 0:
        raise ConfigError("train: streaming needs max_steps, since the data's length is not known.")
    samples = [] if config.streaming else _learnable(load_samples(config, tokenizer, config.seed))
    evaluation = None
    if config.eval_dataset:
        split = "" if Path(config.eval_dataset).is_file() else config.eval_dataset_split
        evaluation = _learnable(_evaluation_samples(config, tokenizer, config.eval_dataset, split))
    arguments = _arguments(config, work)
    torch.manual_seed(config.seed)
    model = load_model(path, config.dtype, config.device)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model, start = new_lora(model, config, samples, tokenizer)
    fuse_lora(model)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    progression = Progression(work)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_stream(config, tokenizer) if config.streaming else _dataset(samples),
        eval_dataset=_dataset(evaluation) if evaluation else None,
        processing_class=tokenizer,
        callbacks=[progression],
        optimizers=(_optimizer(model, config), None),
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=_checkpoint(config, work))
    finally:
        progression.close()
    model.save_pretrained(str(work), save_embedding_layers=False)
    if start:
        save_as_plain_lora(work, start)
    tokenizer.save_pretrained(work)
    plot_loss(trainer.state.log_history, work / PLOT_NAME)
    return {
        "summary": {
            "train_weight_bytes": weight_bytes + trainable,
            "trainable_bytes": trainable,
            "samples": len(samples),
            "truncated_samples": sum(sample.truncated for sample in samples),
            "steps": trainer.state.global_step,
        },
        "seconds_per_step": progression.seconds_per_step,
    }


def _evaluation_samples(config: TrainConfig, tokenizer: Any, name: str, split: str) -> list[Sample]:
    samples = encode_all(load_rows(config, name, split), tokenizer, config, name)
    say_truncated(samples, config, f"samples of {name}")
    return samples


def _learnable(samples: list[Sample]) -> list[Sample]:
    """A sample whose completion was cut off would add padding and no loss."""
    return [sample for sample in samples if any(label >= 0 for label in sample.labels)]


def _stream(config: TrainConfig, tokenizer: Any) -> Any:
    """Rows encoded as they come, interleaved by weight."""
    from datasets import Features, Sequence, Value, interleave_datasets

    tokens = Sequence(Value("int64"))
    features = Features({"input_ids": tokens, "labels": tokens})

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        sample = encode(row, tokenizer, config)
        return {"input_ids": sample.input_ids, "labels": sample.labels}

    def learnable(row: dict[str, Any]) -> bool:
        return any(label >= 0 for label in row["labels"])

    parts: list[Any] = []
    for name in dataset_names(config):
        rows = load_rows(config, name)
        columns = list(next(iter(rows)))
        rows = rows.map(encoded, remove_columns=columns, features=features)
        parts.append(rows.filter(learnable))
    weights = shares(config, [1] * len(parts))
    mixed = (
        parts[0]
        if len(parts) == 1
        else interleave_datasets(
            parts, probabilities=weights, seed=config.seed, stopping_strategy="all_exhausted"
        )
    )
    return mixed.shuffle(seed=config.seed, buffer_size=1000)


def _dataset(samples: list[Sample]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {"input_ids": [s.input_ids for s in samples], "labels": [s.labels for s in samples]}
    )


def _optimizer(model: Any, config: TrainConfig) -> Any:
    """LoRA+ (Hayou et al. 2024) where asked for, or None for the trainer's own."""
    if config.loraplus_lr_ratio is None:
        return None
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=config.learning_rate,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        weight_decay=config.weight_decay,
    )


def _arguments(config: TrainConfig, work: Path) -> SFTConfig:
    on_gpu = config.device.startswith("cuda")
    for backend in config.report_to:
        _require(backend)
    try:
        return SFTConfig(
            output_dir=str(work),
            per_device_train_batch_size=config.per_device_train_batch_size,
            per_device_eval_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_ratio,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            max_steps=config.max_steps,
            num_train_epochs=config.num_train_epochs,
            gradient_checkpointing=config.gradient_checkpointing,
            logging_steps=config.logging_steps,
            logging_nan_inf_filter=False,  # it would hide a loss that is not a number
            save_steps=config.save_steps,
            save_total_limit=config.save_total_limit,
            eval_strategy="steps" if config.eval_dataset else "no",
            eval_steps=config.eval_steps or config.logging_steps,
            report_to=config.report_to or "none",
            seed=config.seed,
            data_seed=config.seed,
            max_length=config.max_length,
            packing=config.packing,
            packing_strategy="wrapped",  # the others need kernels that keep samples apart
            bf16=on_gpu and torch.cuda.is_bf16_supported(),
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            disable_tqdm=True,
        )
    except (ValueError, TypeError) as problem:
        raise ConfigError(f"train: {str(problem).strip().splitlines()[0]}") from problem


def _require(backend: str) -> None:
    if backend == "tensorboard":
        with contextlib.suppress(ImportError):
            import tensorboard  # noqa: F401

            return
        raise DependencyError(
            "report_to=tensorboard needs tensorboard; pip install 'emloc-llm[tensorboard]'."
        )


def _checkpoint(config: TrainConfig, work: Path) -> str | None:
    wanted = config.resume_from_checkpoint
    if wanted == "never":
        for stale in work.glob("checkpoint-*"):
            shutil.rmtree(stale)
        return None
    if wanted == "auto":
        found = last_complete_checkpoint(work)
        if found:
            console.print(f"train: going on from {Path(found).name}")
        return found
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise CheckpointError(f"{wanted} is not a complete training checkpoint; pass checkpoint-N.")
    return wanted
