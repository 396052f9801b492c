"""SHA-256 of files that were looked at before, so that what has not changed since is not read again.

A digest is believed for a path whose size, time of modification, time of change and inode are those it was
computed at. It is kept in the user's cache (`cache_folder`), a file per folder, of which the newest stay.
Whoever can set the clock or write into that cache can deceive it: what must be sure is read.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc.artefacts.cache import cache_folder
from emloc.artefacts.file_digest import file_sha256

KEPT = 256
"""Folders whose digests are kept."""

TICK_NS = 50_000_000
"""A file that changed so shortly before it was looked at may have changed again at the same time."""


class KnownDigests:
    """The digests of a folder's files.

    Args:
        folder: any; it is known by its resolved path.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        key = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:32]
        self._path = cache_folder() / "digests" / f"{key}.json"
        self._known = _read(self._path)
        self._changed = False

    def of(self, name: str) -> str:
        """SHA-256 of a file in the folder, in hexadecimal; computed where it is not known."""
        identity, now = _identity(self._folder / name), time.time_ns()
        entry = self._known.get(name)
        if isinstance(entry, dict) and entry.get("identity") == identity:
            digest = entry.get("sha256")
            if isinstance(digest, str) and identity[2] + TICK_NS < entry.get("seen", 0):
                return digest
        digest = file_sha256(self._folder / name)
        if _identity(self._folder / name) == identity:
            self._note(name, digest, identity, now)
        return digest

    def note(self, digests: Mapping[str, str]) -> None:
        """Keep digests that were computed while their files were written."""
        for name, digest in digests.items():
            self._note(name, digest, _identity(self._folder / name), time.time_ns())
        self.keep()

    def keep(self) -> None:
        """Write what is known; a cache that cannot be written is none."""
        if not self._changed:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self._known), "utf-8")
            temporary.replace(self._path)
            kept = sorted(self._path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for path in kept[:-KEPT]:
                path.unlink(missing_ok=True)

    def _note(self, name: str, digest: str, identity: list[int], seen: int) -> None:
        self._changed = True
        self._known[name] = {"identity": identity, "seen": seen, "sha256": digest}


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
