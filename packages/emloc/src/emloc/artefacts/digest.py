"""Identity of data: what settings record beside a path, so that a changed file is noticed."""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from emloc.artefacts.file_digest import file_sha256
from emloc.config import DataOptions
from emloc.extend.family import Batch, ModelFamily, NamesDataFiles
from emloc.machine.progress import progress_bar

MANY = 1000
"""Files from which on reading them is worth a progress bar."""


def batches_digest(batches: Sequence[Batch]) -> str:
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
    if not dataset or not Path(dataset).exists():
        if dataset and "," in dataset:
            return ",".join(str(dataset_digest(name)) for name in _names(dataset))
        return dataset
    if Path(dataset).is_file():
        return file_sha256(Path(dataset))
    sha = hashlib.sha256()
    for path in sorted(path for path in Path(dataset).rglob("*") if path.is_file()):
        sha.update(f"{path.relative_to(dataset)}|{file_sha256(path)}|".encode())
    return sha.hexdigest()


def data_digest(
    dataset: str | None, split: str, options: DataOptions, family: ModelFamily
) -> str | None:
    """`dataset_digest`, and the content of the files that rows name, where the family has such rows.

    Args:
        dataset: an option of the stage; hub ids name no files here.
        split: which part of it is read.
        options: of the stage.

    Raises:
        DataError: rows cannot be read, as the family says it.
    """
    own = dataset_digest(dataset)
    if not dataset or not isinstance(family, NamesDataFiles):
        return own
    files: dict[Path, None] = {}
    for name in _names(dataset):
        if Path(name).exists():
            within = Path(name).absolute()  # a folder, whose files are in its own digest
            found = (path.absolute() for path in family.data_files(options, name, split))
            files |= {path: None for path in found if not path.is_relative_to(within)}
    return f"{own}+{_files_digest(files)}" if files else own


def _names(dataset: str) -> list[str]:
    return [dataset] if Path(dataset).exists() else [name for name in dataset.split(",") if name]


def _files_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the files' contents in this order, wherever they are; what is missing counts as that."""
    paths = list(files)
    sha = hashlib.sha256()
    shown = (
        progress_bar("data files", len(paths)) if len(paths) >= MANY else nullcontext(lambda: None)
    )
    # Hashing lets go of the interpreter, and so does waiting for a disk.
    with shown as advance, ThreadPoolExecutor() as pool:
        for digest in pool.map(_content, paths):
            sha.update(f"{digest}|".encode())
            advance()
    return sha.hexdigest()


def _content(path: Path) -> str:
    return file_sha256(path) if path.is_file() else "missing"


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
