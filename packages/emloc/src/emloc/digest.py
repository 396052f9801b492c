"""Identity of data: what settings record beside a path, so that a changed file is noticed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from emloc.family import Batch
from emloc.output import file_sha256


def batches_digest(batches: Sequence[Batch]) -> str:
    """SHA-256 of all tensors of the micro-batches, names and shapes included."""
    sha = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            sha.update(f"{name}{tuple(tensor.shape)}".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def dataset_digest(dataset: str | None) -> str | None:
    """SHA-256 of a local file or of all files below a folder; a hub id stands for itself; `a,b` are two."""
    if dataset and "," in dataset:
        return ",".join(str(dataset_digest(name)) for name in dataset.split(",") if name)
    if not dataset or not Path(dataset).exists():
        return dataset
    if Path(dataset).is_file():
        return file_sha256(Path(dataset))
    sha = hashlib.sha256()
    for path in sorted(path for path in Path(dataset).rglob("*") if path.is_file()):
        sha.update(f"{path.relative_to(dataset)}|{file_sha256(path)}|".encode())
    return sha.hexdigest()


@dataclass(frozen=True)
class NamesFiles:
    """Marks an option that names local files, or may: `Annotated[str | None, NamesFiles()]`.

    What the files hold belongs to the settings then, as that of models, adapters and data sets does.
    """


def named_digests(options: BaseModel) -> dict[str, str]:
    """By option, the digests of what the marked ones name; those that are not set are left out."""
    found: dict[str, str] = {}
    for name, field in type(options).model_fields.items():
        value: Any = getattr(options, name)
        if value and any(isinstance(mark, NamesFiles) for mark in field.metadata):
            named: list[Any] = value if isinstance(value, list) else [value]
            found[name] = ",".join(str(dataset_digest(str(one))) for one in named)
    return found
