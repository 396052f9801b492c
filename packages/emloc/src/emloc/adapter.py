"""Read a LoRA as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

Of a pipeline, subfolders may hold LoRAs of its other models, each under its model's name. Those models are
never compressed.

Only what changes a linear layer by `scaling · B · A` (and DoRA's magnitude) can be corrected and
merged; everything else that PEFT offers is refused with its reason.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from emloc.checkpoint import Checkpoint, read_json
from emloc.convolution import as_matrix
from emloc.errors import CheckpointError, MismatchError
from emloc.finite import is_finite
from emloc.output import file_sha256
from emloc.rank import match_pattern

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."

_CHANGES_BASE = {"pissa", "olora", "corda", "loftq", "lora_ga"}
_UNSUPPORTED = {
    "layer_replication": "it repeats layers",
    "target_parameters": "it adapts parameters instead of linear layers",
    "trainable_token_indices": "it trains token embeddings",
    "lora_bias": "it trains biases inside the LoRA",
    "use_qalora": "it pools the inputs",
    "alora_invocation_tokens": "it acts on some tokens only",
    "arrow_config": "it mixes several LoRAs",
    "megatron_config": "it is split over processes",
}


@dataclass(frozen=True)
class LoraLayer:
    """One adapted layer; the keys are tensor names in the adapter's file.

    Attributes:
        name: module name in the base model.
        rank: rows of A.
        scaling: `alpha / rank`, or `alpha / √rank` for rsLoRA.
        magnitude_key: DoRA's magnitude, or None.
    """

    name: str
    rank: int
    scaling: float
    down_key: str
    up_key: str
    magnitude_key: str | None

    @property
    def changed_keys(self) -> list[str]:
        """The tensors that a correction changes."""
        return [self.up_key] + ([self.magnitude_key] if self.magnitude_key else [])


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        layers: the adapted ones.
        saved: parameters of `modules_to_save`, trained whole, with their tensors' names.
        parts: adapters of the pipeline's other models, by name (`with_parts`).
    """

    path: Path
    config: dict[str, Any]
    tensors: Checkpoint
    layers: tuple[LoraLayer, ...]
    saved: Mapping[str, str]
    parts: Mapping[str, "Adapter"] = field(default_factory=dict[str, "Adapter"])

    @classmethod
    def open(cls, folder: str) -> "Adapter":
        """Open a local folder.

        Raises:
            CheckpointError: it is not a complete PEFT adapter.
            MismatchError: it is of a kind that does more than `scaling · B · A`.
        """
        path = Path(folder)
        if not path.is_dir():
            raise CheckpointError(f"No folder {folder}; pass the folder of a PEFT adapter.")
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (path / name).is_file():
                inner = sorted(p.parent.name for p in path.glob(f"*/{CONFIG_NAME}"))
                if inner:
                    raise CheckpointError(
                        f"{path} holds several adapters; pass one of {', '.join(inner)} in it."
                    )
                raise CheckpointError(f"{path} is not a PEFT adapter: it has no {name}.")
        config = read_json(path / CONFIG_NAME)
        _refuse_unsupported(path, config)
        tensors = Checkpoint.from_files(folder, path, config, {WEIGHTS_NAME: None})
        layers = _layers(path, config, tensors)
        return cls(path, config, tensors, tuple(layers), _saved(path, config, tensors, layers))

    @property
    def trained_on(self) -> Path | None:
        """The local folder that the adapter's config names as its base, if it is one."""
        name = self.config.get("base_model_name_or_path")
        return Path(str(name)) if name and Path(str(name)).is_dir() else None

    def with_parts(self, names: Iterable[str]) -> "Adapter":
        """The same with the adapters that lie in subfolders of these names, where there are any.

        Raises:
            CheckpointError, MismatchError: as `open`.
        """
        found = [name for name in names if (self.path / name / CONFIG_NAME).is_file()]
        return replace(self, parts={name: Adapter.open(str(self.path / name)) for name in found})

    @property
    def files(self) -> list[str]:
        """Its files, those of the parts as well, relative to the folder."""
        own = [CONFIG_NAME, WEIGHTS_NAME]
        return [*own, *(f"{name}/{file}" for name in self.parts for file in own)]

    def digest(self) -> str:
        """SHA-256 of the files: the same tensors with another alpha are another adapter."""
        digests = [file_sha256(self.path / name) for name in self.files]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def read(self, key: str) -> Tensor:
        """A tensor of the adapter."""
        return self.tensors.read(key)

    def matrix(self, key: str) -> Tensor:
        """A or B as a matrix, whatever the layer (`as_matrix`)."""
        return as_matrix(self.read(key))

    def magnitude(self, key: str) -> Tensor:
        """DoRA's magnitude, one number per output."""
        return self.read(key).reshape(-1)

    def require_finite(self, fail: Callable[[str], Exception]) -> None:
        """Raise `fail(key)` for the first tensor with NaN or infinity."""
        for key in self.tensors.tensors:
            if not is_finite(self.read(key)):
                raise fail(key)
        for name, part in self.parts.items():
            part.require_finite(lambda key, name=name: fail(f"{name}/{key}"))


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
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


def _layers(path: Path, config: dict[str, Any], tensors: Checkpoint) -> list[LoraLayer]:
    rank_pattern = cast("dict[str, int]", config.get("rank_pattern") or {})
    alpha_pattern = cast("dict[str, float]", config.get("alpha_pattern") or {})
    found: list[LoraLayer] = []
    for key, info in tensors.tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight").removeprefix(PREFIX)
        up_key = key.replace(".lora_A.weight", ".lora_B.weight")
        if up_key not in tensors.tensors:
            raise CheckpointError(
                f"{path / WEIGHTS_NAME} holds {key} and no {up_key}; it is incomplete."
            )
        rank = info.shape[0]
        expected = match_pattern(rank_pattern, name) or config.get("r")
        if rank != expected:
            raise CheckpointError(
                f"{path}: {key} has rank {rank}, its {CONFIG_NAME} says {expected}; the two files do "
                f"not belong together."
            )
        alpha = match_pattern(alpha_pattern, name)
        alpha = float(config.get("lora_alpha", 8) if alpha is None else alpha)
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        magnitude = key.replace(".lora_A.weight", ".lora_magnitude_vector")
        magnitude_key = magnitude if magnitude in tensors.tensors else None
        found.append(LoraLayer(name, rank, scaling, key, up_key, magnitude_key))
    if not found:
        raise CheckpointError(f"{path / WEIGHTS_NAME} holds no LoRA tensors.")
    return found


def _saved(
    path: Path, config: dict[str, Any], tensors: Checkpoint, layers: Sequence[LoraLayer]
) -> dict[str, str]:
    """What is in the file beside LoRA: parameters of modules that were trained whole."""
    used = {key for layer in layers for key in (layer.down_key, *layer.changed_keys)}
    modules = cast("list[str]", config.get("modules_to_save") or [])
    saved: dict[str, str] = {}
    for key in sorted(tensors.tensors.keys() - used):
        name = key.removeprefix(PREFIX)
        parts = name.split(".")[:-1]
        above = [".".join(parts[: count + 1]) for count in range(len(parts))]
        if not any(module.endswith(given) for module in above for given in modules):  # as PEFT does
            raise MismatchError(f"{path / WEIGHTS_NAME} holds a tensor that is not LoRA: {key}.")
        saved[name] = key
    return saved
