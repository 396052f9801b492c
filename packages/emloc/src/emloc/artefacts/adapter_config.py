"""The statements of `adapter_config.json` about a LoRA: that it is one, each layer's rank and scaling.

Only what changes a linear layer by `scaling · B · A` (and DoRA's magnitude) can be corrected and
merged; everything else that PEFT offers is refused with its reason.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from emloc.artefacts.json_files import read_json
from emloc.artefacts.schema import Finite, Schema, Size, conforming
from emloc.errors import CheckpointError, ConfigError, MismatchError
from emloc.options.patterns import match_pattern, require_affordable, require_pattern

CONFIG_NAME = "adapter_config.json"

Switch = bool | None


class AdapterConfig(Schema):
    """The keys of PEFT's configuration that EMLoC looks at."""

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Size | None = None
    lora_alpha: float | None = None
    rank_pattern: dict[str, Size] | None = None
    alpha_pattern: dict[str, float] | None = None
    lora_dropout: Finite | None = None
    use_rslora: Switch = None
    use_dora: Switch = None
    bias: str = "none"
    init_lora_weights: bool | str | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: Switch = None


def adapter_config(path: Path) -> dict[str, Any]:
    """The configuration in an adapter's folder.

    Raises:
        CheckpointError: it cannot be read, or a value is of another kind than PEFT writes.
    """
    config = read_json(path / CONFIG_NAME)
    conforming(AdapterConfig, config, path / CONFIG_NAME)
    return config


def require_patterns(path: Path, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse patterns of ranks and scalings that are none, or would take too long over these names.

    Raises:
        CheckpointError: says which.
    """
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    try:
        require_affordable(patterns, names)
        for pattern in patterns:
            require_pattern(pattern)
    except ConfigError as problem:
        raise CheckpointError(f"{path / CONFIG_NAME}: {problem}") from problem


_CHANGES_BASE = {"pissa", "olora", "corda", "loftq", "lora_ga"}
_UNSUPPORTED = {
    "layer_replication": "it repeats layers",
    "target_parameters": "it adapts parameters instead of linear layers",
    "trainable_token_indices": "it trains token embeddings",
    "lora_bias": "it trains biases inside the LoRA",
    "use_qalora": "it pools the inputs",
    "use_bdlora": "its A and B are block-diagonal",
    "alora_invocation_tokens": "it acts only on some tokens",
    "arrow_config": "it mixes several LoRAs",
    "kasa_config": "it truncates the base's weights, and has singular values between A and B",
    "monteclora_config": "it draws its weights at random",
    "megatron_config": "it is split over processes",
}


def refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    """Let plain LoRA, rsLoRA and DoRA pass.

    Raises:
        MismatchError: the adapter does more than `scaling · B · A`.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MismatchError(f"{path} is a {kind} adapter; only LoRA can be corrected and merged.")
    for option, reason in _UNSUPPORTED.items():
        if config.get(option):
            raise MismatchError(f"{path} uses {option}, which is not supported: {reason}.")
    if config.get("bias", "none") != "none":
        raise MismatchError(
            f"{path} trains biases (bias={config['bias']!r}), which is not supported: they would be "
            f"left out; train with bias='none'."
        )
    start = str(config.get("init_lora_weights")).lower()
    if any(start.startswith(name) for name in _CHANGES_BASE):
        raise MismatchError(
            f"{path} was initialised with {start}, which changes the emulator's weights; convert it "
            f"to a plain LoRA with PEFT's path_initial_model_for_weight_conversion first."
        )


def require_rank(path: Path, config: dict[str, Any], name: str, key: str, rank: int) -> None:
    """Check that the file's rank of a layer is the config's.

    Args:
        key: of the layer's A, which has `rank` rows.

    Raises:
        CheckpointError: it is not, or there are no rows.
    """
    patterns = cast("dict[str, int]", config.get("rank_pattern") or {})
    expected = match_pattern(patterns, name) or config.get("r")
    if rank != expected or rank < 1:
        raise CheckpointError(
            f"{path}: {key} has rank {rank}, but its {CONFIG_NAME} says {expected}; the two files do not "
            f"belong together."
        )


def scaling_of(path: Path, config: dict[str, Any], name: str, rank: int) -> float:
    """A layer's `alpha / rank`, or `alpha / √rank` for rsLoRA; finite and not zero.

    Raises:
        CheckpointError: alpha is no number, or one that no LoRA is trained with.
    """
    patterns = cast("dict[str, Any]", config.get("alpha_pattern") or {})
    alpha: Any = match_pattern(patterns, name)
    alpha = config.get("lora_alpha", 8) if alpha is None else alpha
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if number else 0.0
    if not math.isfinite(scaling) or scaling == 0:
        raise CheckpointError(
            f"{path / CONFIG_NAME} gives {name} the alpha {alpha!r}, with which a LoRA does nothing or "
            f"makes NaN; set lora_alpha (or alpha_pattern) to what it was trained with."
        )
    return float(scaling)


def exact_patterns(
    config: Mapping[str, Any], layers: Iterable[tuple[str, int, float]]
) -> tuple[dict[str, int], dict[str, float]]:
    """PEFT's `rank_pattern` and `alpha_pattern` for layers by their full names.

    Args:
        config: the adapter's; layers of its `r` and `lora_alpha` need no pattern.
        layers: name, rank and scaling of each.
    """
    rank, root = config["r"], bool(config.get("use_rslora"))
    alpha = config.get("lora_alpha", 8)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, own_rank, scaling in layers:
        own = scaling * (math.sqrt(own_rank) if root else own_rank)
        pattern = f"^{re.escape(name)}"
        if own_rank != rank:
            ranks[pattern] = own_rank
        if not math.isclose(own, alpha):
            alphas[pattern] = own
    return ranks, alphas
