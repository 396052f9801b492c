"""The tensors of a PEFT adapter, sorted by their meaning.

A file holds more than LoRA where modules were trained whole (`modules_to_save`), and where PEFT saves a
frozen copy of a base weight beside a LoRA on the embeddings or the head. Every tensor of the file is one of
these three; any other is refused here, or by `adapted_weights`, which knows the base.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from emloc.artefacts.adapter_config import CONFIG_NAME, require_patterns, require_rank, scaling_of
from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import CheckpointError, MismatchError
from emloc.linalg.convolution import matrix_shape

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
DOWN = ".lora_A.weight"
COPIES = (".base_layer", ".original_module")
"""Name parts that PEFT puts between a module's name and the base's own weight, beside a LoRA or a trained
copy.
"""
TRAINED = ".modules_to_save"
"""Name parts that PEFT puts before a trained copy that it saves a second time, with the embeddings."""


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


def lora_layers(path: Path, config: dict[str, Any], tensors: Checkpoint) -> list[LoraLayer]:
    """The adapted layers.

    Raises:
        CheckpointError: the file is incomplete, or does not belong to the config.
        MismatchError: two of its tensors are of one module.
    """
    layers: list[LoraLayer] = []
    downs = [key for key in tensors.tensors if key.endswith(DOWN)]
    require_patterns(path, config, [key.removesuffix(DOWN).removeprefix(PREFIX) for key in downs])
    for key in downs:
        name = key.removesuffix(DOWN).removeprefix(PREFIX)
        up_key = key.replace(DOWN, ".lora_B.weight")
        magnitude_key = key.replace(DOWN, ".lora_magnitude_vector")
        dora = bool(config.get("use_dora"))
        for wanted in (key, up_key, *([magnitude_key] if dora else [])):
            if wanted not in tensors.tensors:
                raise CheckpointError(
                    f"{path / WEIGHTS_NAME} holds {key} but no {wanted}; it is incomplete."
                )
            if len(tensors.tensors[wanted].shape) < 2 and wanted != magnitude_key:
                raise CheckpointError(
                    f"{path / WEIGHTS_NAME}: {wanted} is not a matrix; it is damaged."
                )
        rank = tensors.tensors[key].shape[0]
        require_rank(path, config, name, key, rank)
        if matrix_shape(tensors.tensors[up_key].shape)[1] != rank:
            raise CheckpointError(
                f"{path / WEIGHTS_NAME}: {key} has {rank} rows, and {up_key} as many columns as "
                f"{tensors.tensors[up_key].shape} says; it is damaged."
            )
        scaling = scaling_of(path, config, name, rank)
        layers.append(LoraLayer(name, rank, scaling, key, up_key, magnitude_key if dora else None))
    if not layers:
        raise CheckpointError(f"{path / WEIGHTS_NAME} holds no LoRA tensors.")
    refuse_doubles(path, [(layer.name, layer.down_key) for layer in layers])
    return layers


def other_tensors(
    path: Path, config: dict[str, Any], tensors: Checkpoint, layers: list[LoraLayer]
) -> tuple[dict[str, str], dict[str, str]]:
    """Tensors of the file beside LoRA: parameters that were trained whole, and copies of the base's.

    Raises:
        MismatchError: a tensor is of a kind that is not supported, or was changed after it was saved.
    """
    used = {key for layer in layers for key in (layer.down_key, *layer.changed_keys)}
    modules = cast("list[str]", config.get("modules_to_save") or [])
    saved: dict[str, str] = {}
    copies: dict[str, str] = {}
    twice: dict[str, str] = {}
    for key in sorted(tensors.tensors.keys() - used):
        name = key.removeprefix(PREFIX)
        if ".lora_embedding_" in key:
            raise MismatchError(
                f"{path / WEIGHTS_NAME} holds {key}, a LoRA on an embedding, which is not supported; "
                f"train the embedding whole (modules_to_save), or leave it out."
            )
        if ".lora_" in key:
            raise MismatchError(
                f"{path / WEIGHTS_NAME} holds {key}, which is not LoRA according to its {CONFIG_NAME}; the "
                f"two files do not belong together."
            )
        module, _, leaf = name.rpartition(".")
        wrapped = next((part for part in (*COPIES, TRAINED) if module.endswith(part)), "")
        own = f"{module.removesuffix(wrapped)}.{leaf}"
        parts = module.split(".")
        above = [".".join(parts[: count + 1]) for count in range(len(parts))]
        if wrapped == TRAINED:
            twice[own] = key
        elif wrapped:
            copies[own] = key
        # PEFT matches ends of names; with ensure_weight_tying, its config names the embeddings alone, and
        # the file has what is tied to them as well.
        elif config.get("ensure_weight_tying") or any(
            part.endswith(given) for part in above for given in modules
        ):
            saved[own] = key
        else:
            copies[own] = key
    for own, key in twice.items():
        if own not in saved or not torch.equal(tensors.read(key), tensors.read(saved[own])):
            raise MismatchError(
                f"{path / WEIGHTS_NAME} holds {key}, which differs from {own}; it was changed after PEFT "
                f"saved it."
            )
    return saved, copies


def refuse_doubles(path: Path, named: Iterable[tuple[str, str]]) -> None:
    """Let nothing be dropped because two tensors (the second of each pair) have one name.

    Raises:
        MismatchError: two have.
    """
    known: dict[str, str] = {}
    for name, key in named:
        if name in known:
            raise MismatchError(
                f"{path / WEIGHTS_NAME} holds {known[name]} and {key}, which both belong to {name}; it "
                f"mixes names of two versions of the model."
            )
        known[name] = key
