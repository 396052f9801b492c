"""An artefact as it was written: all files that its manifest lists, by existence, size and SHA-256.

Everything in an artefact's folder is listed, tokenizer and configuration as well as weights, so that an edit
of any of them is found, and a file that was added. How closely one looks depends on what is at stake:

- *complete already*: every file, read again only where it changed since it was last read (`KnownDigests`);
- a stage that reads a model: the files that are read of it, in the same way;
- a stage whose result is wrong without a sign if one byte is: the same files, all of them read;
- `verify`: everything, read.
"""

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from emloc.artefacts.adapter_config import CONFIG_NAME
from emloc.artefacts.adapter_tensors import WEIGHTS_NAME
from emloc.artefacts.companions import PATTERNS
from emloc.artefacts.digest_cache import KnownDigests
from emloc.artefacts.file_digest import bytes_sha256, file_sha256
from emloc.artefacts.json_files import read_json
from emloc.artefacts.kinds import ADAPTER, CORRECTED_ADAPTER, Kind
from emloc.artefacts.manifest import MANIFEST_NAME, UNLISTED, Manifest
from emloc.artefacts.named_files import named_path
from emloc.artefacts.settings import difference, same
from emloc.artefacts.small_files import json_text
from emloc.errors import CheckpointError, OutputError
from emloc.machine.progress import console

OF_MODELS = ("*.safetensors", *PATTERNS)
"""Patterns of the files that libraries and stages read of a model."""

OF_ADAPTERS = (CONFIG_NAME, WEIGHTS_NAME)
"""The files that libraries and stages read of an adapter."""

OF_HOSTS = frozenset({".cache", ".git", ".gitattributes", ".gitignore", ".DS_Store"})
"""Names that hubs, git and file managers put into a folder; nothing reads them."""

_CHECKPOINT = re.compile(r"checkpoint-\d+")


def listing(
    folder: Path, known: Mapping[str, str], without: frozenset[str]
) -> tuple[dict[str, str], dict[str, int]]:
    """SHA-256 and bytes of every file in a folder that is being finished, by name.

    Args:
        known: digests that were computed while the files were written.
        without: files that will not be there.
    """
    names = sorted(set(_files(folder)) - without)
    digests = {name: known.get(name) or file_sha256(folder / name) for name in names}
    return digests, {name: (folder / name).stat().st_size for name in names}


def require_intact(
    folder: Path, manifest: Manifest, every: bool = False, fresh: bool = False
) -> None:
    """Refuse an artefact that is not what was written.

    Args:
        every: look at every file, and not only at those that are read of a model or an adapter.
        fresh: read every file that is looked at, whatever is known of it.

    Raises:
        CheckpointError: a file is missing, was changed or was added, or its name leads out of the folder.
    """
    if every and fresh:
        Manifest.require_sealed(folder)
    names = [name for name in manifest.files if every or _is_read(name, manifest)]
    names = [name for name in names if not _is_forgiven(folder, name, manifest, every)]
    for name in names:
        _require_size(folder, name, manifest.sizes.get(name))
    _require_listed(folder, manifest, every and fresh)
    known = None if fresh else KnownDigests(folder)
    for name in names:
        digest = file_sha256(folder / name) if known is None else known.of(name)
        if digest != manifest.files[name]:
            raise CheckpointError(
                f"{folder / name} is not what was written (SHA-256 differs); {_again(folder)}."
            )
    if known is not None:
        known.keep()


def require_read(folder: Path, fresh: bool = False) -> Manifest | None:
    """The manifest of a folder that a stage reads, None without one; see `require_intact`.

    Raises:
        CheckpointError: the folder is not what its manifest says, or its manifest cannot be read.
    """
    manifest = Manifest.find(folder)
    if manifest is not None:
        require_intact(folder, manifest, fresh=fresh)
    return manifest


def is_complete(
    stage: str, kind: Kind, output_dir: Path, settings: Mapping[str, object], family: str
) -> bool:
    """Return whether an artefact made with these settings is there already, whole, and say so.

    Args:
        kind: of the artefact that the stage makes.
        family: of its model, by name.

    Raises:
        OutputError: another artefact is there; the message says what differs.
        CheckpointError: its manifest cannot be read, or it is not what was written.
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
        require_intact(output_dir, manifest, every=True)
        console.print(f"{stage}: {output_dir} is complete already")
        return True
    raise OutputError(
        f"{output_dir} {what}. Choose another output_dir or remove it; nothing is ever overwritten."
    )


def _require_size(folder: Path, name: str, size: int | None) -> None:
    path = named_path(folder, name, folder / MANIFEST_NAME)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, and {MANIFEST_NAME} lists it; {_again(folder)}.")
    bytes_now = path.stat().st_size
    if size is not None and bytes_now != size:
        raise CheckpointError(
            f"{path} is not what was written ({bytes_now} bytes, originally {size}); {_again(folder)}."
        )


def _require_listed(folder: Path, manifest: Manifest, everything: bool) -> None:
    """Nothing was added: a library may prefer a file to the one that it would have read."""
    if manifest.format in UNLISTED:
        return
    for name in _files(folder):
        if name not in manifest.files and (everything or _is_read(name, manifest)):
            raise CheckpointError(
                f"{folder / name} was added after {MANIFEST_NAME} was written, which does not list it; move "
                f"it elsewhere."
            )


def _files(folder: Path) -> Iterator[str]:
    """Files below a folder, but for its manifest and what hubs put there; links are not followed."""
    for path, folders, files in os.walk(folder):
        inside = Path(path).relative_to(folder)
        if not inside.parts:
            folders[:] = [name for name in folders if name not in OF_HOSTS]
            files = [name for name in files if name not in OF_HOSTS and name != MANIFEST_NAME]
        links = [name for name in folders if (Path(path) / name).is_symlink()]
        yield from ((inside / name).as_posix() for name in (*files, *links))


def _is_read(name: str, manifest: Manifest) -> bool:
    path = PurePosixPath(name)
    if _CHECKPOINT.fullmatch(path.parts[0]):
        return False
    patterns = OF_ADAPTERS if manifest.kind in (ADAPTER.name, CORRECTED_ADAPTER.name) else OF_MODELS
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)


def _is_forgiven(folder: Path, name: str, manifest: Manifest, every: bool) -> bool:
    """Return whether a file need not be as it was.

    Nobody misses a checkpoint of training that was removed whole; and a stage that knows the base by the
    manifest does not mind what PEFT's config calls it.
    """
    first = PurePosixPath(name).parts[0]
    if _CHECKPOINT.fullmatch(first) is not None and not (folder / first).exists():
        return True
    return not every and _names_another_base(folder, name, manifest)


def _names_another_base(folder: Path, name: str, manifest: Manifest) -> bool:
    """Return whether PEFT's config was changed in the name of its base alone, which has perhaps moved."""
    if PurePosixPath(name).name != CONFIG_NAME or not (folder / name).is_file():
        return False
    config, key = read_json(folder / name), "base_model_name_or_path"
    origins = [origin for origin in (manifest.emulator, manifest.base_model) if origin is not None]
    return any(
        bytes_sha256(json_text({**config, key: origin.name_or_path})) == manifest.files[name]
        for origin in origins
        if key in config
    )


def _again(folder: Path) -> str:
    return f"put it back, or remove {folder} and make it again"
