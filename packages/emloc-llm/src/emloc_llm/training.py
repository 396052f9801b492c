"""Train a LoRA with TRL's `SFTTrainer` on tokenised samples."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import ProgressCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from emloc.checkpoint import locate
from emloc.config import TrainConfig
from emloc.errors import CheckpointError, ConfigError, DependencyError
from emloc.integrations.transformers.training import (
    PLOT_NAME,
    Progression,
    last_complete_checkpoint,
    plot_loss,
)
from emloc.memory import PeakMemory, return_large_blocks
from emloc.progress import console
from emloc_llm.data import Sample, encode_all, load_rows, say_truncated
from emloc_llm.loading import load_model, load_tokenizer


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
    samples = _samples(config, tokenizer, str(config.dataset), config.dataset_split)
    evaluation = None
    if config.eval_dataset:
        split = "" if Path(config.eval_dataset).is_file() else config.eval_dataset_split
        evaluation = _samples(config, tokenizer, config.eval_dataset, split)
    arguments = _arguments(config, work)
    torch.manual_seed(config.seed)
    model = load_model(path, config.dtype, config.device)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model = get_peft_model(model, _lora(config, model))
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    progression = Progression(work)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(samples),
        eval_dataset=_dataset(evaluation) if evaluation else None,
        processing_class=tokenizer,
        callbacks=[progression],
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=_checkpoint(config, work))
    finally:
        progression.close()
    model.save_pretrained(str(work))
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


def _samples(config: TrainConfig, tokenizer: Any, name: str, split: str) -> list[Sample]:
    rows = load_rows(config, name, split)
    samples = encode_all(rows, tokenizer, config, name)
    say_truncated(samples, config, f"samples of {name}")
    # A sample whose completion was cut off would add padding and no loss.
    return [sample for sample in samples if any(label >= 0 for label in sample.labels)]


def _dataset(samples: list[Sample]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {"input_ids": [s.input_ids for s in samples], "labels": [s.labels for s in samples]}
    )


def _lora(config: TrainConfig, model: Any) -> LoraConfig:
    targets = config.lora_target_modules
    if targets != ["all-linear"]:
        names = [name for name, _ in model.named_modules()]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                from emloc.config import nearest

                hint = nearest(target, sorted({name.rpartition(".")[2] for name in names}))
                raise ConfigError(f"lora_target_modules: the model has no module {target}.{hint}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType] (PEFT takes both)
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        rank_pattern=dict(config.lora_rank_pattern),
        alpha_pattern=dict(config.lora_alpha_pattern),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
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
