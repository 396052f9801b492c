"""Packages that options of training ask for, found out before a model is loaded or a stage before it runs.

The names of trackers are transformers'.
"""

import importlib.util
import os
from collections.abc import Sequence

from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import LoraOptions, TrainConfig, nearest
from emloc.errors import ConfigError, DependencyError
from emloc.machine.progress import warn
from emloc.options.patterns import require_matching

TRACKERS = {
    "azure_ml": ("azureml-core", ("azureml",)),
    "clearml": ("clearml", ("clearml",)),
    "codecarbon": ("codecarbon", ("codecarbon",)),
    "comet_ml": ("comet-ml", ("comet_ml",)),
    "dagshub": ("dagshub", ("dagshub", "mlflow")),
    "dvclive": ("dvclive", ("dvclive",)),
    "flyte": ("flytekit", ("flytekit",)),
    "kubeflow": ("kubeflow", ()),
    "mlflow": ("mlflow", ("mlflow",)),
    "neptune": ("neptune", ("neptune",)),
    "swanlab": ("swanlab", ("swanlab",)),
    "tensorboard": ("tensorboard", ("tensorboard",)),
    "trackio": ("trackio", ("trackio",)),
    "wandb": ("wandb", ("wandb",)),
}
"""Trackers by transformers' name: what to install, and the modules that are imported."""

INSTEAD = {"tensorboard": "tensorboardX"}
"""A module that does as well."""

PRODIGY = "prodigy"
ON_GPU = frozenset({"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"})
"""The optimisers of bitsandbytes."""


STREAM_EXCLUDES = {
    "gradient_checkpointing": "which it does already, block by block",
}
"""Options that exclude stream, and what they are for."""

BEGINNINGS = ("pissa", "olora", "eva")
"""Beginnings of a LoRA that look at all weights, or at samples, before the first step."""


def check_training(config: TrainConfig) -> None:
    """Refuse what training could not begin with.

    Raises:
        ConfigError: an unknown tracker, an 8-bit or paged optimiser without a GPU, Prodigy with LoRA+, or an
            option that excludes stream.
        DependencyError: a tracker or an optimiser that is not installed.
    """
    check_trackers(config)
    check_optimizer(config)
    if config.stream_bits is not None and not (config.stream and config.stream_from == "ram"):
        raise ConfigError(
            "train: stream_bits is for blocks that wait in memory; pass stream=true and stream_from=ram, or "
            "leave it out."
        )
    if config.stream:
        _check_streamed(config)


def say_idle_options(config: TrainConfig) -> None:
    """Say which options do nothing because the model is not streamed."""
    for name in ("stream_from", "stream_inputs"):
        value = getattr(config, name)
        # An emulator is never streamed: there, a run's options may be meant for polish.
        idle = not config.stream and config.emulator is None
        if idle and value != type(config).model_fields[name].default:
            warn(f"train: {name}={value} does nothing without stream=true")


def _check_streamed(config: TrainConfig) -> None:
    if config.emulator is not None:
        raise ConfigError(
            "train: stream=true trains on model_name_or_path, block by block, but an emulator is meant to "
            "be held in memory; leave stream out, or pass the model."
        )
    for name, what in STREAM_EXCLUDES.items():
        if getattr(config, name):
            raise ConfigError(
                f"train: stream=true excludes {name} ({what}); leave one of them out."
            )
    if config.lora_init in BEGINNINGS:
        raise ConfigError(
            f"train: lora_init={config.lora_init} looks at all weights, or at samples, before a step; "
            f"stream=true holds one block. Pass lora_init=default or gaussian."
        )


def check_trackers(config: TrainConfig) -> None:
    """Refuse trackers that transformers does not know or that are not installed.

    Raises:
        ConfigError, DependencyError: as `check_training`.
    """
    for name in config.report_to:
        if name in ("none", "all"):
            if len(config.report_to) > 1:
                raise ConfigError(f"train: report_to: {name} must be alone, or left out.")
            continue
        if name not in TRACKERS:
            hint = nearest(name, list(TRACKERS)) or f" There are {_listed()}."
            raise ConfigError(f"train: report_to: there is no tracker {name}.{hint}")
        package, modules = TRACKERS[name]
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        other = INSTEAD.get(name)
        if missing and not (other and importlib.util.find_spec(other)):
            raise DependencyError(
                f"report_to={name} needs {package}, which is not installed; pip install {package}, or "
                f"leave report_to out."
            )
        if name == "kubeflow" and "KUBEFLOW_TRAINER_SERVER_URL" not in os.environ:
            raise ConfigError("train: report_to=kubeflow works only inside a Kubeflow job.")


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimiser that cannot run here.

    Raises:
        ConfigError, DependencyError: as `check_training`.
    """
    if config.optim == PRODIGY:
        if config.loraplus_lr_ratio is not None:
            raise ConfigError(
                "train: optim=prodigy has one learning rate for all parameters, but loraplus_lr_ratio gives "
                "A and B different ones; leave one of them out."
            )
        _require("prodigyopt", config.optim)
    elif config.optim in ON_GPU:
        if not config.device.startswith("cuda"):
            raise ConfigError(
                f"train: optim={config.optim} needs a GPU (device=cuda), but this run is on "
                f"{config.device}; use adamw_torch_fused, or adafactor for less memory."
            )
        _require("bitsandbytes", config.optim)


def require_modules(config: LoraOptions, names: Sequence[str]) -> None:
    """Refuse target modules that a model does not have, and patterns that match none of its modules.

    Args:
        names: of all its modules.

    Raises:
        ConfigError: with the nearest name.
    """
    for option in ("lora_rank_pattern", "lora_alpha_pattern"):
        require_matching(option, getattr(config, option), names)
    for option in ("lora_target_modules", "lora_modules_to_save"):
        wanted: list[str] = getattr(config, option)
        for target in wanted if wanted != ["all-linear"] else ():
            if not any(name == target or name.endswith(f".{target}") for name in names):
                hint = nearest(target, sorted({name.rpartition(".")[2] for name in names} - {""}))
                raise ConfigError(f"{option}: the model has no module {target}.{hint}")


def require_trained(
    config: LoraOptions, whole: Sequence[str], model: Checkpoint, drawn: Sequence[str]
) -> None:
    """Refuse to leave a head as it was drawn: it would stay random, and be another one in other libraries.

    Args:
        whole: ends of the names of modules that are trained whole.
        drawn: modules that are in no file of the model.

    Raises:
        ConfigError: names those that are not trained whole.
    """
    ends = tuple(f".{name}" for name in whole)
    left = [name for name in drawn if not ends or not f".{name}".endswith(ends)]
    if left:
        names = sorted(
            {name.rpartition(".")[2] for name in left} | set(config.lora_modules_to_save)
        )
        raise ConfigError(
            f"train: {model.name} holds no {', '.join(left)}, so it is initialised at random and must be "
            f"trained whole; pass lora_modules_to_save={','.join(names)}."
        )


def _listed() -> str:
    return ", ".join(TRACKERS)


def _require(package: str, optim: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DependencyError(f"optim={optim} needs {package}; pip install {package}.")
