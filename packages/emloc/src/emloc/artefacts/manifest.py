"""`emloc.json`: what an artefact is, what it was made from, and what making it cost.

Everything but `measured`, and the digests of what training notes beside its adapter, follows from the inputs
and is the same in every run.
"""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.json_files import read_json
from emloc.artefacts.kinds import KindName
from emloc.artefacts.schema import FileName, Name, conforming
from emloc.artefacts.seal import is_sealed, sealed
from emloc.artefacts.small_files import write_json
from emloc.errors import CheckpointError
from emloc.machine.special_files import refuse_special

MANIFEST_NAME = "emloc.json"
FORMAT = 2

UNLISTED = frozenset({1})
"""Formats whose manifests list the weights alone."""


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal digits."""


class ModelReference(BaseModel):
    """The model, or the adapter, that an artefact was made from.

    Attributes:
        name_or_path: an absolute path or hub id.
        digest: of the weights; of an adapter, of its files.
        single_file_config: where the configuration of a model in one file is, if it was named.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name_or_path: Name
    digest: Digest
    single_file_config: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, digest: str) -> "ModelReference":
        """Refer to a checkpoint whose digest is known."""
        config = checkpoint.single_file_config
        if config is not None and os.path.isdir(config):
            config = str(Path(config).absolute())
        return cls(
            name_or_path=checkpoint.reference_name(), digest=digest, single_file_config=config
        )

    @classmethod
    def of_adapter(cls, folder: Path, digest: str) -> "ModelReference":
        """Refer to an adapter whose digest is known."""
        return cls(name_or_path=str(folder.absolute()), digest=digest)


class Manifest(BaseModel):
    """The content of `emloc.json`.

    Attributes:
        base_model: the original model.
        emulator: the emulator that a LoRA was trained on; None for a LoRA trained on the base.
        adapter: the adapter that a corrected one or a merged model was made from, or that training went on
            from, with its own digest.
        settings: the options that shaped the result.
        layers: per layer or group what the stage did to it.
        tables: of an emulator, embeddings and heads in few bits (`emloc.formats.vocabulary`).
        kept_dense: layers left as they are, with the reason.
        summary: figures of the whole that follow from the inputs.
        files: SHA-256 of every file of the folder but this one, by name.
        sizes: their bytes.
        seal: SHA-256 of all of this but itself, so that an edit of the manifest is found.
        method: which method's light model it is, or is trained on; None for EMLoC's own, and for a LoRA
            trained on the base.
        measured: `seconds`, `peak_bytes` (anonymous memory over the stage's start) and the like, and under
            which options that shape no result.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    kind: KindName
    family: str
    base_model: ModelReference
    emulator: ModelReference | None = None
    adapter: ModelReference | None = None
    settings: dict[str, Any] = {}
    layers: dict[str, dict[str, Any]] = {}
    tables: list[dict[str, Any]] | None = None
    kept_dense: dict[str, str] = {}
    summary: dict[str, Any] = {}
    files: dict[FileName, Digest] = {}
    sizes: dict[FileName, Annotated[int, Field(ge=0)]] = {}
    versions: dict[str, str] = {}
    method: str | None = None
    measured: dict[str, Any] = {}
    seal: Digest | None = None

    def write(self, folder: Path) -> None:
        """Write it into `folder`, sealed."""
        content = self.model_dump(mode="json", exclude_none=True)
        write_json(folder / MANIFEST_NAME, sealed(content))

    @staticmethod
    def require_sealed(folder: Path) -> None:
        """Refuse a manifest that was edited; those of before have no seal.

        Raises:
            CheckpointError: it was.
        """
        content = read_json(folder / MANIFEST_NAME)
        if content.get("format") not in UNLISTED and not is_sealed(content):
            raise CheckpointError(
                f"{folder / MANIFEST_NAME} is not what was written (its seal differs); put it back, or "
                f"remove {folder} and make it again."
            )

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder that a stage wrote.

        Raises:
            CheckpointError: there is none, or it is not one of ours, or is of a format that is not known.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {MANIFEST_NAME}: it was not written by emloc, or it is incomplete."
            )
        content = read_json(path)
        form = content.get("format")
        if type(form) is not int or not 1 <= form <= FORMAT:
            raise CheckpointError(
                f"{path} is of the format {form!r}, but this version of emloc reads 1 to {FORMAT}; update "
                "emloc."
            )
        return conforming(cls, content, path)

    @classmethod
    def find(cls, folder: Path) -> "Manifest | None":
        """The manifest of `folder`, or None where there is none."""
        refuse_special(folder / MANIFEST_NAME)
        return cls.read(folder) if (folder / MANIFEST_NAME).is_file() else None


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of Python and of `packages`."""
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
