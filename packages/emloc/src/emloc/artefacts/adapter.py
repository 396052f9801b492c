"""Read a LoRA as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

Of a pipeline, subfolders may hold LoRAs of its other models, each under its model's name. Those models are
never compressed.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from emloc.artefacts.adapter_config import CONFIG_NAME, adapter_config, refuse_unsupported
from emloc.artefacts.adapter_tensors import (
    WEIGHTS_NAME,
    LoraLayer,
    lora_layers,
    other_tensors,
    refuse_doubles,
)
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.file_digest import file_sha256
from emloc.artefacts.json_files import read_json
from emloc.artefacts.named_files import named_path
from emloc.artefacts.small_files import write_json
from emloc.errors import CheckpointError
from emloc.linalg.convolution import as_matrix
from emloc.linalg.finite import is_finite
from emloc.machine.special_files import refuse_special


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
        config = adapter_config(path)
        refuse_unsupported(path, config)
        tensors = Checkpoint.from_files(folder, path, config, {WEIGHTS_NAME: None})
        layers = lora_layers(path, config, tensors)
        return cls(
            path, config, tensors, tuple(layers), *other_tensors(path, config, tensors, layers)
        )

    def with_parts(self, names: Iterable[str]) -> "Adapter":
        """The same with the adapters that lie in subfolders of these names, where there are any.

        Raises:
            CheckpointError, MismatchError: as `open`, or a name leads out of the folder.
        """
        folders = {name: named_path(self.path, name, self.path) for name in names}
        folders_of_parts = {
            name: path for name, path in folders.items() if (path / CONFIG_NAME).is_file()
        }
        return replace(
            self, parts={name: Adapter.open(str(p)) for name, p in folders_of_parts.items()}
        )

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
        refuse_doubles(self.path, [(layer.name, layer.down_key) for layer in layers])
        refuse_doubles(self.path, saved)
        refuse_doubles(self.path, copies)
        return replace(self, layers=tuple(layers), saved=dict(saved), copies=dict(copies))

    def name_base(self, name: str) -> None:
        """Write what the model that it was trained on is called into its config, and the parts'."""
        for adapter in (self, *self.parts.values()):
            config = read_json(adapter.path / CONFIG_NAME)
            write_json(adapter.path / CONFIG_NAME, {**config, "base_model_name_or_path": name})

    @property
    def files(self) -> list[str]:
        """Files of the adapter and of its parts, relative to the folder."""
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
