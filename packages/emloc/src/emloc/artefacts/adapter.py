"""Read a LoRA as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

Of a pipeline, subfolders may hold LoRAs of its other models, each under its model's name. Those models are
never compressed.

A file holds more than LoRA where modules were trained whole (`modules_to_save`), and where PEFT saves a
frozen copy of a base weight beside a LoRA on the embeddings or the head. Every tensor of the file is one of
these three; any other is refused here, or by `adapted_weights`, which knows the base.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from emloc.artefacts.adapter_config import CONFIG_NAME, refuse_unsupported, require_rank, scaling_of
from emloc.artefacts.checkpoint import Checkpoint, read_json
from emloc.artefacts.named_files import named_path, refuse_special
from emloc.artefacts.output import file_sha256, write_json
from emloc.errors import CheckpointError, MismatchError
from emloc.linalg.convolution import as_matrix, matrix_shape
from emloc.linalg.finite import is_finite

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
COPIES = (".base_layer", ".original_module")
"""What PEFT puts between a module's name and the base's own weight, beside a LoRA or a trained copy."""
TRAINED = ".modules_to_save"
"""What it puts before a trained copy that it saves a second time, with the embeddings."""


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
        copies: parameters of the base that lie in the file as well, with their tensors' names.
        parts: adapters of the pipeline's other models, by name (`with_parts`).
    """

    path: Path
    config: dict[str, Any]
    tensors: Checkpoint
    layers: tuple[LoraLayer, ...]
    saved: Mapping[str, str]
    copies: Mapping[str, str]
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
            refuse_special(path / name)
            if not (path / name).is_file():
                inner = sorted(p.parent.name for p in path.glob(f"*/{CONFIG_NAME}"))
                if inner:
                    raise CheckpointError(
                        f"{path} holds several adapters; pass one of {', '.join(inner)} in it."
                    )
                raise CheckpointError(f"{path} is not a PEFT adapter: it has no {name}.")
        config = read_json(path / CONFIG_NAME)
        refuse_unsupported(path, config)
        tensors = Checkpoint.from_files(folder, path, config, {WEIGHTS_NAME: None})
        layers = _layers(path, config, tensors)
        return cls(path, config, tensors, tuple(layers), *_others(path, config, tensors, layers))

    def with_parts(self, names: Iterable[str]) -> "Adapter":
        """The same with the adapters that lie in subfolders of these names, where there are any.

        Raises:
            CheckpointError, MismatchError: as `open`, or a name leads out of the folder.
        """
        folders = {name: named_path(self.path, name, self.path) for name in names}
        found = {name: path for name, path in folders.items() if (path / CONFIG_NAME).is_file()}
        return replace(self, parts={name: Adapter.open(str(p)) for name, p in found.items()})

    def renamed(self, module_name: Callable[[str], str]) -> "Adapter":
        """The same under other names of modules; keys of the file, and parts, stay.

        Raises:
            MismatchError: two tensors of the file come to be of one module.
        """

        def parameter(name: str) -> str:
            module, _, leaf = name.rpartition(".")
            return f"{module_name(module)}.{leaf}" if module else name

        layers = [replace(layer, name=module_name(layer.name)) for layer in self.layers]
        saved = [(parameter(name), key) for name, key in self.saved.items()]
        copies = [(parameter(name), key) for name, key in self.copies.items()]
        _refuse_doubles(self.path, [(layer.name, layer.down_key) for layer in layers])
        _refuse_doubles(self.path, saved)
        _refuse_doubles(self.path, copies)
        return replace(self, layers=tuple(layers), saved=dict(saved), copies=dict(copies))

    def name_base(self, name: str) -> None:
        """Write what the model that it was trained on is called into its config, and the parts'."""
        for adapter in (self, *self.parts.values()):
            config = read_json(adapter.path / CONFIG_NAME)
            write_json(adapter.path / CONFIG_NAME, {**config, "base_model_name_or_path": name})

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


def _layers(path: Path, config: dict[str, Any], tensors: Checkpoint) -> list[LoraLayer]:
    found: list[LoraLayer] = []
    for key, info in tensors.tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight").removeprefix(PREFIX)
        up_key = key.replace(".lora_A.weight", ".lora_B.weight")
        magnitude_key = key.replace(".lora_A.weight", ".lora_magnitude_vector")
        dora = bool(config.get("use_dora"))
        for wanted in (up_key, *([magnitude_key] if dora else [])):
            if wanted not in tensors.tensors:
                raise CheckpointError(
                    f"{path / WEIGHTS_NAME} holds {key} and no {wanted}; it is incomplete."
                )
        rank = info.shape[0]
        require_rank(path, config, name, key, rank)
        if matrix_shape(tensors.tensors[up_key].shape)[1] != rank:
            raise CheckpointError(
                f"{path / WEIGHTS_NAME}: {key} has {rank} rows, and {up_key} as many columns as "
                f"{tensors.tensors[up_key].shape} says; it is damaged."
            )
        scaling = scaling_of(path, config, name, rank)
        found.append(LoraLayer(name, rank, scaling, key, up_key, magnitude_key if dora else None))
    if not found:
        raise CheckpointError(f"{path / WEIGHTS_NAME} holds no LoRA tensors.")
    _refuse_doubles(path, [(layer.name, layer.down_key) for layer in found])
    return found


def _others(
    path: Path, config: dict[str, Any], tensors: Checkpoint, layers: list[LoraLayer]
) -> tuple[dict[str, str], dict[str, str]]:
    """What is in the file beside LoRA: parameters that were trained whole, and copies of the base's."""
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
                f"{path / WEIGHTS_NAME} holds {key}, which is not LoRA by its {CONFIG_NAME}; the two files "
                f"do not belong together."
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
                f"{path / WEIGHTS_NAME} holds {key}, and not the same as {own}; it was changed after "
                f"PEFT had saved it."
            )
    return saved, copies


def _refuse_doubles(path: Path, named: Iterable[tuple[str, str]]) -> None:
    known: dict[str, str] = {}
    for name, key in named:
        if name in known:
            raise MismatchError(
                f"{path / WEIGHTS_NAME} holds {known[name]} and {key}, which both are of {name}; it "
                f"mixes names of two versions of the model."
            )
        known[name] = key
