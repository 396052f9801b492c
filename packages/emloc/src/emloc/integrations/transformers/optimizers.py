"""The optimiser of a LoRA's parameters: transformers' by name, Prodigy beside them, LoRA+ over any.

Prodigy (Mishchenko, Defazio 2023) estimates its step size while it goes, so its learning rate is a mere
factor, 1 as a rule; transformers has no name for it. LoRA+ (Hayou et al. 2024) gives B a learning rate
that is a multiple of A's.
"""

from typing import Any

from peft.optimizers import create_loraplus_optimizer

from emloc.config import TrainConfig
from emloc.machine.progress import warn
from emloc.stages.training_needs import PRODIGY

LOW_PRODIGY_RATE = 0.1
"""Learning rates below are meant for another optimiser."""

PRODIGY_OPTIONS = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
"""Options that diffusers' training scripts set; warm-up belongs to our schedules too."""


def warn_of_slow_learning(config: TrainConfig) -> None:
    """Say that a learning rate is meant for another optimiser."""
    if config.optim == PRODIGY and config.learning_rate < LOW_PRODIGY_RATE:
        warn(
            f"learning_rate={config.learning_rate:g} is low for Prodigy, which multiplies its own step "
            f"size by it; 1.0 is usual"
        )


def trainers_name(config: TrainConfig) -> dict[str, Any]:
    """The options of `TrainingArguments` that name the optimiser; none for one that it does not know."""
    return {} if config.optim == PRODIGY else {"optim": config.optim}


def set_optimizer(trainer: Any, config: TrainConfig) -> None:
    """Give a trainer the optimiser that its arguments cannot ask for."""
    if config.optim == PRODIGY:
        from prodigyopt import Prodigy

        arguments = trainer.args
        trainer.optimizer_cls_and_kwargs = (
            Prodigy,
            {
                "lr": arguments.learning_rate,
                "betas": (arguments.adam_beta1, arguments.adam_beta2),
                "eps": arguments.adam_epsilon,
                **PRODIGY_OPTIONS,
            },
        )
    elif config.loraplus_lr_ratio is not None:
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        trainer.optimizer = create_loraplus_optimizer(
            trainer.model,
            kind,
            loraplus_lr_ratio=config.loraplus_lr_ratio,
            loraplus_weight_decay=config.weight_decay,
            **options,
        )
