"""Where weights and config lie in a model's folder.

A model of transformers lies at the top of its folder. A pipeline of diffusers holds several models, each
in a folder of its own; the one that EMLoC works on is the denoiser, and the others are carried along.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIPELINE_NAME = "model_index.json"


@dataclass(frozen=True)
class Layout:
    """Names of a checkpoint's files, relative to the model's folder.

    Attributes:
        folder: the component's folder with a slash at its end, or nothing.
        stem: of the weights' file.
    """

    folder: str = ""
    stem: str = "model"

    @property
    def config(self) -> str:
        """The model's configuration."""
        return f"{self.folder}config.json"

    @property
    def index(self) -> str:
        """Which tensor is in which shard."""
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
    """How the files of a model's folder are named."""
    if (path / PIPELINE_NAME).is_file():
        component = _denoiser(path / PIPELINE_NAME)
        if component is not None:
            return Layout(f"{component}/", "diffusion_pytorch_model")
    return Layout()


def part_names(path: Path) -> list[str]:
    """The other models of a pipeline, by folder; none where the folder is that of one model."""
    if not layout_of(path).folder:
        return []
    components: dict[str, Any] = json.loads((path / PIPELINE_NAME).read_text("utf-8"))
    return [
        name
        for name in components
        if (path / name / "config.json").is_file() and f"{name}/" != layout_of(path).folder
    ]


def _denoiser(index: Path) -> str | None:
    """The component whose class is a `…Model` of diffusers; autoencoders and schedulers are not."""
    try:
        components: dict[str, Any] = json.loads(index.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    for name, kind in components.items():
        if isinstance(kind, list) and kind[:1] == ["diffusers"] and str(kind[-1]).endswith("Model"):
            return name
    return None
