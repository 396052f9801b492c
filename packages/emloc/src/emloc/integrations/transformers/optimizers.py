"""The optimiser of a LoRA's parameters: transformers' by name, Prodigy beside them, LoRA+ over any.

Prodigy (Mishchenko, Defazio 2023) estimates its step size while it goes, so its learning rate is a mere
factor, 1 as a rule; transformers has no name for it. LoRA+ (Hayou et al. 2024) gives B a learning rate
that is a multiple of A's.
"""

import importlib.util
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer

from emloc.config import TrainConfig
from emloc.errors import ConfigError, DependencyError
from emloc.progress import console

PRODIGY = "prodigy"
ON_GPU = frozenset({"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"})
"""The optimisers of bitsandbytes."""

LOW_PRODIGY_RATE = 0.1
"""Learning rates below are meant for another optimiser."""

PRODIGY_OPTIONS = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
"""As diffusers' training scripts set them; warm-up belongs to our schedules too."""


def check_optimizer(config: TrainConfig) -> None:
    """Refuse, before any work, what will not run; warn of what will not learn.

    Raises:
        ConfigError: an 8-bit or paged optimiser without a GPU, or Prodigy with LoRA+.
        DependencyError: the package that has the optimiser is not installed.
    """
    if config.optim == PRODIGY:
        if config.loraplus_lr_ratio is not None:
            raise ConfigError(
                "train: optim=prodigy has one learning rate for all parameters, and loraplus_lr_ratio "
                "gives A and B different ones; leave one of them out."
            )
        _require("prodigyopt", config.optim)
        if config.learning_rate < LOW_PRODIGY_RATE:
            console.print(
                f"[yellow]warning:[/] learning_rate={config.learning_rate:g} is low for Prodigy, which "
                f"multiplies its own step size by it; 1.0 is usual"
            )
    elif config.optim in ON_GPU:
        if not config.device.startswith("cuda") or not torch.cuda.is_available():
            raise ConfigError(
                f"train: optim={config.optim} needs a GPU (device=cuda), and this run is on "
                f"{config.device}; use adamw_torch_fused, or adafactor for less memory."
            )
        _require("bitsandbytes", config.optim)


def trainers_name(config: TrainConfig) -> dict[str, Any]:
    """What `TrainingArguments` is told of the optimiser; nothing of one that it does not know."""
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


def _require(package: str, optim: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DependencyError(f"optim={optim} needs {package}; pip install {package}.")
