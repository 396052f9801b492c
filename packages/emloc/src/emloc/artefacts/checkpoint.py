"""Read a checkpoint's tensors by name, straight from its safetensors shards.

`Checkpoint.open` parses headers only. `read` returns a view into the memory-mapped file, so a tensor
costs file-backed pages and no anonymous memory until it is copied or converted.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import safe_open
from torch import Tensor

from emloc.artefacts.companions import companions
from emloc.artefacts.file_digest import file_identity
from emloc.artefacts.json_files import read_json
from emloc.artefacts.layout import Layout, layout_of, part_names
from emloc.artefacts.locate import locate
from emloc.artefacts.modest_config import require_modest_depth
from emloc.artefacts.named_files import named_path
from emloc.artefacts.read_errors import reading
from emloc.artefacts.tensor_info import DTYPES, TensorInfo
from emloc.artefacts.weight_files import NAMED_BY_CONFIG, weight_files
from emloc.errors import CheckpointError

SAMPLE_BYTES = 4096
"""Bytes of each end of a tensor that go into a checkpoint's digest."""


@dataclass
class Checkpoint:
    """A local folder with a config and safetensors shards.

    Attributes:
        name: what the user called it, a path or a hub id.
        path: the local folder; of a pipeline, the pipeline's.
        config: the parsed `config.json`; of a pipeline, the denoiser's.
        tensors: every tensor by name, in name order.
        single_file_config: what was named as the configuration of a model in one file, if it was one.
        translated: whether config and tensors are of another layout than the files'.
        drawn: modules whose tensors are in no file, and were drawn by a seed: a head that is to be trained.
    """

    translated: ClassVar[bool] = False

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    single_file_config: str | None = None
    drawn: tuple[str, ...] = ()
    _files: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)
    _offsets: dict[str, dict[str, tuple[int, int]]] = field(
        default_factory=dict[str, dict[str, tuple[int, int]]], repr=False
    )

    @classmethod
    def open(cls, model_name_or_path: str | os.PathLike[str]) -> "Checkpoint":
        """Open a local folder or a hub id (downloaded or found in the hub's cache).

        Raises:
            CheckpointError: nothing is there, a shard is missing or corrupt, or the config is of no model.
        """
        name = os.fspath(model_name_or_path)
        path = locate(name)
        layout = layout_of(path)
        config = read_json(named_path(path, layout.config, path))
        require_modest_depth(config, path / layout.config)
        files = weight_files(path, layout, config)
        config.pop(
            NAMED_BY_CONFIG, None
        )  # it is about these files, and not about what is made of them
        opened = cls.from_files(name, path, config, files)
        opened.companions()  # a link out of the folder is refused before a library follows it
        return opened

    @cached_property
    def layout(self) -> Layout:
        """The names of the checkpoint's files."""
        return layout_of(self.path)

    @property
    def main_dtype(self) -> torch.dtype:
        """The floating-point dtype that most bytes are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def parts(self) -> list[str]:
        """Names of a pipeline's other models."""
        return part_names(self.path)

    def part(self, name: str) -> "Checkpoint":
        """One of them."""
        return Checkpoint.open(self.path / name)

    @classmethod
    def from_files(
        cls, name: str, path: Path, config: dict[str, Any], files: Mapping[str, set[str] | None]
    ) -> "Checkpoint":
        """Open given safetensors files, each with the tensors it must hold (None: not known)."""
        tensors: dict[str, TensorInfo] = {}
        checkpoint = cls(name, path, config, tensors)
        for file, promised in files.items():
            held = dict(checkpoint.headers(file))
            for missing in sorted(promised - held.keys()) if promised is not None else ():
                raise CheckpointError(
                    f"Shard {path / file}: it does not hold the tensor {missing} that the index "
                    f"promises; download the checkpoint again."
                )
            tensors.update(held)
        checkpoint.tensors = dict(sorted(tensors.items()))
        return checkpoint

    def reference_name(self) -> str:
        """The name by which another artefact should refer to this model: an absolute path, or the hub
        id.
        """
        if os.path.isfile(self.name):
            return str(Path(self.name).absolute())
        return str(self.path.absolute()) if os.path.isdir(self.name) else self.name

    def headers(self, file: str) -> Iterator[tuple[str, TensorInfo]]:
        """Names, dtypes and shapes of one shard."""
        handle = self._open(file)
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            view = handle.get_slice(name)
            kind = str(view.get_dtype())
            if kind not in DTYPES:
                raise CheckpointError(
                    f"Tensor {name} in {self.path / file} has dtype {kind}, which is not supported; "
                    f"use a float32, bfloat16 or float16 checkpoint."
                )
            yield name, TensorInfo(file, DTYPES[kind], tuple(view.get_shape()))

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, a view into the file.

        Raises:
            CheckpointError: no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"Checkpoint {self.name} holds no tensor {name}.")
        return cast(Tensor, self._open(self.tensors[name].file).get_tensor(name))

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the system to read tensors into its cache in the background; returns at once.

        A hint: where the system has none to take (`posix_fadvise`), nothing happens.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        spans: dict[str, list[tuple[int, int]]] = {}
        for name in names:
            file = self.tensors[name].file
            spans.setdefault(file, []).append(self._spans(file)[name])
        for file, parts in spans.items():
            with (self.path / file).open("rb") as handle, contextlib.suppress(OSError):
                for start, length in parts:
                    os.posix_fadvise(handle.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def _spans(self, file: str) -> dict[str, tuple[int, int]]:
        """Offset and length of each tensor in a shard: 8 bytes of length, a JSON header, the data."""
        if file not in self._offsets:
            with (self.path / file).open("rb") as handle:
                size = int.from_bytes(handle.read(8), "little")
                header: dict[str, Any] = json.loads(handle.read(size))
            self._offsets[file] = {
                name: (
                    8 + size + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        return self._offsets[file]

    def digest(self) -> str:
        """Identity of the weights: names, dtypes, shapes, and both ends of every tensor.

        Sampling makes it cheap for hundreds of gigabytes: two trainings of one architecture differ in
        nearly every weight. An edit of a few values in the middle of a tensor goes unnoticed.
        """
        sha = hashlib.sha256()
        for name, info in self.tensors.items():
            sha.update(f"{name}|{info.dtype}|{info.shape}|".encode())
            flat = self.read(name).reshape(-1).view(torch.uint8)
            for part in (flat[:SAMPLE_BYTES], flat[-SAMPLE_BYTES:]):
                sha.update(part.numpy().tobytes())
        return sha.hexdigest()

    def companions_digest(self) -> str:
        """SHA-256 of the config and of the files beside the weights; of large ones, of size and ends."""
        sha = hashlib.sha256()
        for name in [self.layout.config, *self.companions()]:
            if (self.path / name).is_file():
                sha.update(name.encode() + file_identity(self.path / name))
        return sha.hexdigest()

    def companions(self) -> list[str]:
        """Files that belong to the model beside weights and config: tokenizer, generation config, …

        Of a pipeline, all of its other models' files.

        Raises:
            CheckpointError: one is a link out of the folder.
        """
        return companions(self.path, self.layout)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = named_path(self.path, file, self.path)
            hint = "it is incomplete or corrupt, download it again"
            with reading(f"Shard {self.path / file}", "cannot be read", hint):
                self._files[file] = safe_open(str(path), framework="pt")
        return self._files[file]
