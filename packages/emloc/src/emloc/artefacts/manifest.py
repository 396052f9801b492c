"""`emloc.json`: what an artefact is, what it was made from, and what making it cost.

Everything but `measured` follows from the inputs and is the same in every run.
"""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.json_files import read_json
from emloc.artefacts.kinds import Kind, KindName
from emloc.artefacts.settings import difference, same
from emloc.artefacts.small_files import write_json
from emloc.errors import CheckpointError, OutputError
from emloc.machine.progress import console
from emloc.machine.special_files import refuse_special

MANIFEST_NAME = "emloc.json"
FORMAT = 1


class ModelReference(BaseModel):
    """The weights that an artefact was made from.

    Attributes:
        name_or_path: an absolute path or hub id.
        digest: of the weights.
        single_file_config: where the configuration of a model in one file is, if it was named.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name_or_path: str
    digest: str
    single_file_config: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, digest: str) -> "ModelReference":
        """Refer to a checkpoint whose digest is known."""
        config = checkpoint.single_file_config
        if config is not None and Path(config).is_dir():
            config = str(Path(config).absolute())
        return cls(
            name_or_path=checkpoint.reference_name(), digest=digest, single_file_config=config
        )


class Manifest(BaseModel):
    """The content of `emloc.json`.

    Attributes:
        base_model: the original model.
        emulator: the emulator that a LoRA was trained on; None for a LoRA trained on the base.
        settings: the options that shaped the result.
        layers: per layer or group what the stage did to it.
        tables: of an emulator, embeddings and heads in few bits (`emloc.formats.vocabulary`).
        kept_dense: layers left as they are, with the reason.
        summary: figures of the whole that follow from the inputs.
        files: SHA-256 of the files written.
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
    settings: dict[str, Any] = {}
    layers: dict[str, dict[str, Any]] = {}
    tables: list[dict[str, Any]] | None = None
    kept_dense: dict[str, str] = {}
    summary: dict[str, Any] = {}
    files: dict[str, str] = {}
    versions: dict[str, str] = {}
    method: str | None = None
    measured: dict[str, Any] = {}

    def write(self, folder: Path) -> None:
        """Write it into `folder`."""
        write_json(folder / MANIFEST_NAME, self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder that a stage wrote.

        Raises:
            CheckpointError: there is none, or it is not one of ours.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {MANIFEST_NAME}: it was not written by emloc, or it is incomplete."
            )
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as problem:
            first = problem.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{path}: {place}: {first['msg']}.") from problem

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


def is_complete(
    stage: str, kind: Kind, output_dir: Path, settings: Mapping[str, Any], family: str
) -> bool:
    """Return whether an artefact made with these settings is there already, and say so.

    Args:
        kind: of the artefact that the stage makes.
        family: of its model, by name.

    Raises:
        OutputError: another artefact is there; the message says what differs.
        CheckpointError: its manifest cannot be read.
    """
    manifest = Manifest.find(output_dir)
    if manifest is None:
        return False
    if manifest.kind != kind.name:
        what = f"holds an artefact of another kind ({manifest.kind.replace('_', ' ')})"
    elif manifest.family != family:
        what = f"was made with the family {manifest.family}, now {family}"
    elif not same(manifest.settings, settings):
        what = f"was made with {difference(manifest.settings, settings)}"
    else:
        console.print(f"{stage}: {output_dir} is complete already")
        return True
    raise OutputError(
        f"{output_dir} {what}. Choose another output_dir or remove it; nothing is ever overwritten."
    )
