"""Identity of data: what settings record beside a path, so that a changed file is noticed."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from emloc.artefacts.file_digest import file_sha256
from emloc.options.marks import NamesFiles, marked


def batches_digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """SHA-256 of all tensors of the micro-batches, names and shapes included."""
    sha = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            sha.update(f"{name}{tuple(tensor.shape)}".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def dataset_digest(dataset: str | None) -> str | None:
    """SHA-256 of a local file or of all files below a folder; a hub id stands for itself; `a,b` are two,
    unless there is one of that name."""
    if not dataset or not os.path.exists(dataset):
        if dataset and "," in dataset:
            return ",".join(str(dataset_digest(name)) for name in data_names(dataset))
        return dataset
    if os.path.isfile(dataset):
        return file_sha256(Path(dataset))
    sha = hashlib.sha256()
    for path in sorted(path for path in Path(dataset).rglob("*") if path.is_file()):
        sha.update(f"{path.relative_to(dataset)}|{file_sha256(path)}|".encode())
    return sha.hexdigest()


def data_names(dataset: str) -> list[str]:
    """The names of one or several data sets, `a,b`, unless there is one of that name."""
    return [dataset] if os.path.exists(dataset) else [name for name in dataset.split(",") if name]


def named_digests(options: BaseModel) -> dict[str, str]:
    """Digests of what the marked options name, by option; those that are not set are left out."""
    digests: dict[str, str] = {}
    for name in marked(type(options), NamesFiles):
        value: Any = getattr(options, name)
        if value:
            named: list[Any] = value if isinstance(value, list) else [value]
            digests[name] = ",".join(str(dataset_digest(str(one))) for one in named)
    return digests
