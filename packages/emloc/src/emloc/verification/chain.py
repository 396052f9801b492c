"""The way from an artefact back to the original: each model and adapter that it was made from, in turn.

A merged model was made from an adapter, a corrected adapter from one that was trained, that on an emulator,
and the emulator from the base. Each manifest names what it was made from, with a digest; what is here is
compared with it, and is whole by its own manifest. Of what is not here any more it is said that nobody could
look at it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.intact import require_intact
from emloc.artefacts.kinds import ADAPTER, CORRECTED_ADAPTER, EMULATOR
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.errors import MismatchError

OF_CORRECTION = "limit"
"""A setting of every adapter that was corrected by the formula, and of no other."""


@dataclass(frozen=True)
class Link:
    """One step back.

    Attributes:
        kind: `adapter`, `emulator` or `base`.
        path: of what was made from.
        checked: whether it is here, and is what the manifest says.
    """

    kind: str
    path: str
    checked: bool


def is_here(name: str) -> bool:
    """Return whether a recorded name is of something on this machine; a folder below ours may be
    another.
    """
    return os.path.isabs(name) and os.path.exists(name)


def walk(
    folder: Path, manifest: Manifest, parts: Sequence[str], adapter: str | None = None
) -> Iterator[Link]:
    """The links back from an artefact but for the base, each checked before it is given.

    Args:
        parts: the base's other models, in its own order.
        adapter: where the adapter that it was made from is now; by default where it was.

    Raises:
        MismatchError: something in its place is not what it was made from.
        CheckpointError: it is not what was written.
    """
    if manifest.adapter is not None:
        yield from _adapter(folder, manifest, manifest.adapter, parts, adapter)
    trained = manifest.kind == ADAPTER.name  # on this emulator, wherever it went on from
    if manifest.emulator is not None and (trained or manifest.adapter is None):
        yield _emulator(folder, manifest, manifest.emulator)


def _adapter(
    folder: Path,
    manifest: Manifest,
    origin: ModelReference,
    parts: Sequence[str],
    instead: str | None,
) -> Iterator[Link]:
    name = instead or origin.name_or_path
    if instead is None and not is_here(name):
        yield Link("adapter", name, False)
        if manifest.emulator is not None and manifest.kind != ADAPTER.name:
            yield _emulator(folder, manifest, manifest.emulator)
        return
    opened, own = Adapter.open(name), Manifest.find(Path(name))
    if own is not None:
        require_intact(Path(name), own, every=True, fresh=True)
    if opened.with_parts(parts).digest() != origin.digest:
        raise MismatchError(f"{folder} was made from another adapter than the one in {name}.")
    trained = manifest.kind == ADAPTER.name  # which may go on from the adapter of another model
    if own is not None and not trained and own.base_model.digest != manifest.base_model.digest:
        raise MismatchError(f"{folder} and the adapter {name} name different base models.")
    if manifest.kind == CORRECTED_ADAPTER.name and OF_CORRECTION in manifest.settings:
        _require_same_reads(folder, opened)
    yield Link("adapter", name, True)
    if own is not None:
        yield from walk(Path(name), own, parts)


def _require_same_reads(folder: Path, trained: Adapter) -> None:
    """A correction changes what a LoRA writes, and never what it reads."""
    corrected = Adapter.open(str(folder))
    downs = {layer.name: layer.down_key for layer in trained.layers}
    for layer in corrected.layers:
        key = downs.get(layer.name)
        if key is None or not torch.equal(corrected.read(layer.down_key), trained.read(key)):
            raise MismatchError(
                f"A of {layer.name} in {folder} is not that of {trained.path}, from which it was corrected."
            )


def _emulator(folder: Path, manifest: Manifest, origin: ModelReference) -> Link:
    name = origin.name_or_path
    if not is_here(name):
        return Link("emulator", name, False)
    own = Manifest.read(Path(name))
    require_intact(Path(name), own, every=True, fresh=True)
    if own.kind != EMULATOR.name or Checkpoint.open(name).digest() != origin.digest:
        raise MismatchError(f"{folder} was made with another emulator than the one in {name}.")
    if own.base_model.digest != manifest.base_model.digest:
        raise MismatchError(f"{folder} and the emulator {name} name different base models.")
    return Link("emulator", name, True)
