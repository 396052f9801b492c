"""A model in one file, as people exchange them, made into a model's folder.

Such a file holds all parts of a model under the names of the program that trained it, and no
configuration. The family that knows the names makes an ordinary folder of it, once, in the user's cache,
under the digest of the file's tensors and of the configuration; every stage then works on that folder as
on any other, and manifests name the file.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from filelock import FileLock

from emloc.artefacts.cache import cache_folder
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.durable import sync_folder, sync_tree
from emloc.artefacts.file_digest import file_identity
from emloc.artefacts.write_errors import others_writing, writing
from emloc.errors import CheckpointError
from emloc.extend.family import FamilyEntry
from emloc.machine.progress import console

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
FORMAT = 1
"""A number for the layout of the folders that are made; another number makes them anew."""


@runtime_checkable
class SingleFileReader(Protocol):
    """The protocol of what a family's `FamilyEntry.single_file` names."""

    def configuration(self, file: Checkpoint, named: str | None) -> Path:
        """The local folder of the file's configuration.

        Args:
            file: its tensors; `config` is empty.
            named: the option `single_file_config`; None lets the reader find out.

        Raises:
            CheckpointError: there is none, or it cannot be had.
        """
        ...

    def write(self, file: Checkpoint, configuration: Path, folder: Path) -> None:
        """Write the model into `folder`, which is not there yet.

        Raises:
            CheckpointError: file and configuration do not belong together.
        """
        ...


def model_folder(path: Path, named: str | None, families: Mapping[str, FamilyEntry]) -> Path:
    """The folder that a model's one file becomes, made if it is not there.

    Raises:
        CheckpointError: it is a pickle or no model that a family knows, or cannot be read.
        OutputError: the cache cannot be written.
    """
    file = _opened(path)
    reader = _reader(file, families)
    configuration = reader.configuration(file, named)
    identity = f"{FORMAT}|{file.digest()}|{_folder_digest(configuration)}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    target = cache_folder() / "single-files" / f"{path.stem[:40]}-{digest}"
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            console.print(f"{path.name} is converted into {target}")
            with (
                writing(target),
                others_writing(target),
                tempfile.TemporaryDirectory(dir=target.parent) as temporary,
            ):
                made = Path(temporary) / "model"
                reader.write(file, configuration, made)
                sync_tree(made)
                made.rename(target)
                sync_folder(target.parent)
    return target


def _opened(path: Path) -> Checkpoint:
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when read, so it is not read; convert it to "
            f"safetensors first."
        )
    if path.suffix.lower() != SUFFIX:
        raise CheckpointError(
            f"{path} is a file; pass the model's folder, or one {SUFFIX} file of all its parts."
        )
    return Checkpoint.from_files(str(path), path.parent, {}, {path.name: None})


def _reader(file: Checkpoint, families: Mapping[str, FamilyEntry]) -> SingleFileReader:
    readers = [
        entry
        for entry in families.values()
        if entry.single_file and entry.recognises_file(file.tensors.keys())
    ]
    if len(readers) == 1:
        return readers[0].load_single_file()
    if readers:
        names = ", ".join(entry.name for entry in readers)
        raise CheckpointError(f"Several families read {file.name}: {names}; pass a model's folder.")
    raise CheckpointError(
        f"{file.name} is not a single-file model that an installed family knows (its first tensor is "
        f"{next(iter(file.tensors), 'missing')}); pass the model's folder."
    )


def _folder_digest(folder: Path) -> str:
    """A digest of all files; a folder that also holds weights lends those that the file lacks."""
    sha = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sha.update(path.relative_to(folder).as_posix().encode() + file_identity(path))
    return sha.hexdigest()
