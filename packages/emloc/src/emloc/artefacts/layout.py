"""The places of weights and config in a model's folder.

A model of transformers lies at the top of its folder. A pipeline of diffusers holds several models, each
in a folder of its own; the one that EMLoC works on is the denoiser, and the others are carried along.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from emloc.artefacts.json_files import read_json
from emloc.artefacts.named_files import named_path
from emloc.errors import CheckpointError

PIPELINE_NAME = "model_index.json"
STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}

Library = Literal["transformers", "diffusers"]


@dataclass(frozen=True)
class Layout:
    """Names of a checkpoint's files, relative to the model's folder.

    Attributes:
        folder: the component's folder with a slash at its end, or nothing.
        library: the one that loads the model, and so decides what its files are called.
    """

    folder: str = ""
    library: Library = "transformers"

    @property
    def stem(self) -> str:
        """The beginning of the weights' file names."""
        return STEMS[self.library]

    @property
    def config(self) -> str:
        """The model's configuration."""
        return f"{self.folder}config.json"

    @property
    def index(self) -> str:
        """The file that says which tensor is in which shard."""
        return f"{self.folder}{self.stem}.safetensors.index.json"

    @property
    def single(self) -> str:
        """The weights, where they are one file."""
        return f"{self.folder}{self.stem}.safetensors"

    def shards(self, count: int) -> list[str]:
        """The weights, where they are `count` files."""
        return [
            f"{self.folder}{self.stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
        ]

    def inside(self, file: str) -> str:
        """A file's name as the index gives it, relative to the index."""
        return file.removeprefix(self.folder)


def layout_of(path: Path) -> Layout:
    """Find how the files of a model's folder are named.

    Raises:
        CheckpointError: its pipeline's index, or its config, cannot be read or is a link out of the folder.
    """
    for name in (PIPELINE_NAME, "config.json"):
        named_path(path, name, path)
    if (path / PIPELINE_NAME).is_file():
        component = _denoiser(components(path))
        if component is not None:
            return Layout(f"{component}/", "diffusers")
    if (path / "config.json").is_file() and "_class_name" in read_json(path / "config.json"):
        return Layout(library="diffusers")  # a component of a pipeline by itself
    return Layout()


def components(path: Path) -> Mapping[str, tuple[str, str]]:
    """The components that a pipeline's index names, each with its library and class.

    A component's name is that of its folder, below which everything is read and copied: it is one plain
    name, and the folder lies in the pipeline's.

    Raises:
        CheckpointError: the index cannot be read, or a component's name leads elsewhere.
    """
    index = path / PIPELINE_NAME
    kinds_by_name: dict[str, tuple[str, str]] = {}
    for name, kind in read_json(index).items():
        kind = cast("list[Any]", kind) if isinstance(kind, list) else []
        if name.startswith("_") or len(kind) != 2 or None in kind:
            continue  # an option of the pipeline, or a component that it does without
        if not name or name in (".", "..") or {"/", "\\", "\0"} & set(name):
            raise CheckpointError(
                f"{index} names the component {name!r}, which is not a plain folder name; nothing outside "
                f"{path} is read."
            )
        named_path(path, name, index)
        kinds_by_name[name] = (str(kind[0]), str(kind[1]))
    return kinds_by_name


def part_names(path: Path) -> list[str]:
    """The other models of a pipeline, by folder; none where the folder is that of one model."""
    folder = layout_of(path).folder
    if not folder:
        return []
    return [
        name
        for name in components(path)
        if (path / name / "config.json").is_file() and f"{name}/" != folder
    ]


def _denoiser(kinds: Mapping[str, tuple[str, str]]) -> str | None:
    """The component whose class is a `…Model` of diffusers; autoencoders and schedulers are not."""
    for name, (library, class_name) in kinds.items():
        if library == "diffusers" and class_name.endswith("Model"):
            return name
    return None
