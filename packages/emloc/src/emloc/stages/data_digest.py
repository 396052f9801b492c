"""Identity of a stage's data, with the files that rows name, such as pictures."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from emloc.artefacts.digest import data_names, dataset_digest
from emloc.artefacts.file_digest import file_sha256
from emloc.config import DataOptions
from emloc.extend.data_capabilities import data_files_of
from emloc.extend.family import ModelFamily
from emloc.machine.progress import progress_bar
from emloc.options.marks import NamesData, marked, split_of

MANY = 1000
"""Files from which on reading them is worth a progress bar."""


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
    if not dataset:
        return own
    files: dict[Path, None] = {}
    for name in data_names(dataset):
        if os.path.exists(name):
            within = Path(name).absolute()  # a folder, whose files are in its own digest
            named = (path.absolute() for path in data_files_of(family, options, name, split))
            files |= {path: None for path in named if not path.is_relative_to(within)}
    return f"{own}+{_files_digest(files)}" if files else own


def digested(options: DataOptions) -> dict[str, str]:
    """Options in whose place settings hold the digest of what they name: its key, by their names."""
    marks = marked(type(options), NamesData).items()
    return {name: mark.digest for name, mark in marks if mark.digest}


def data_digests(options: DataOptions, family: ModelFamily) -> dict[str, str | None]:
    """The digests of all data that the options name, as settings hold them."""
    return {
        key: data_digest(getattr(options, name), split_of(options, name), options, family)
        for name, key in digested(options).items()
    }


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
