"""One image of a data set: what a row may say of it, and how it is opened."""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast
from urllib.parse import unquote, urlsplit

from PIL import Image

from emloc.artefacts.named_files import named_path
from emloc.errors import DataError
from emloc.integrations.pictures import read_picture

Source: TypeAlias = Path | bytes | Image.Image

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SHOWN = 200
"""Characters of a text that messages show: somebody's base64 may be megabytes."""


@dataclass(frozen=True)
class ImageRef:
    """An image that is opened when it is needed.

    Attributes:
        source: a path, the bytes of a file, or a PIL image.
        where: file and line, or data set and row, for messages.
    """

    source: Source
    where: str

    def open(self) -> Image.Image:
        """The image in RGB (`emloc.integrations.pictures`).

        Raises:
            DataError: missing, not an image, or too large; names file and line.
        """
        name = _short(str(self.source)) if isinstance(self.source, Path) else "in the row"
        try:
            return read_picture(
                self.source,
                f"{self.where}: the image {name}",
                "replace it, or pass on_bad_image=skip",
            )
        except FileNotFoundError as problem:
            raise DataError(
                f"{self.where}: there is no image {name}; correct the path, set image_folder, or pass "
                f"on_bad_image=skip."
            ) from problem


def image_source(source: Any, folder: Path, where: str) -> Source:
    """The path, bytes or PIL image that an entry of a row means; nothing is opened.

    Args:
        source: a path in `folder`, a `data:` address with base64, the bytes of a file, a PIL image, or
            the mapping of `bytes` and `path` that the datasets library stores.
        folder: where paths begin, and what they stay inside of.
        where: file and line, for messages.

    Raises:
        DataError: it is none of these, an address, or a path that leads out of the folder.
    """
    if isinstance(source, Mapping):
        entry = cast("Mapping[str, Any]", source)
        content, path = entry.get("bytes"), entry.get("path")
        if isinstance(content, (bytes, bytearray, memoryview)):
            return bytes(content)
        if content is not None or not isinstance(path, (str, Path)):
            raise DataError(
                f"{where}: an image entry has the keys {_short(', '.join(map(str, entry)))} but neither "
                f"bytes nor a path; correct the row."
            )
        source = path
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, (str, Path)):
        raise DataError(
            f"{where}: an image entry is {_short(repr(source))}, where a path, bytes or a picture should "
            f"be; correct the row."
        )
    name = _local(str(source))
    if name.lower().startswith("data:"):
        return _decoded(name, where)
    if _ADDRESS.match(name):
        raise DataError(
            f"{where}: the image {_short(name)} is an address; download it first and name the file."
        )
    if ".." in Path(name).parts or (Path(name).is_absolute() and not _is_below(name, folder)):
        raise DataError(
            f"{where}: the image {_short(name)} lies outside {folder}; set image_folder to a folder that "
            f"holds all images, and give paths relative to it."
        )
    return named_path(folder, name, where, DataError)


def _local(name: str) -> str:
    """The path in a `file:` address of this machine; any other name as it is."""
    address = urlsplit(name) if name.startswith("file://") else None
    if address is None or address.netloc not in ("", "localhost"):
        return name
    return unquote(address.path)


def _is_below(name: str, folder: Path) -> bool:
    """Return whether a path is below by name, or once links are followed; where a name inside leads is the
    matter of `named_path`.
    """
    path, home = Path(name), folder.resolve()
    if path.is_relative_to(folder.absolute()) or path.is_relative_to(home):
        return True
    try:
        return path.resolve().is_relative_to(home)
    except (OSError, RuntimeError, ValueError):  # a link in a circle, a name too long
        return False


def _decoded(address: str, where: str) -> bytes:
    head, comma, content = address.partition(",")
    try:
        if not comma or not head.lower().endswith(";base64"):
            raise binascii.Error("not base64")
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise DataError(
            f"{where}: the image {_short(address)} is a data: address without valid base64; correct the "
            f"row."
        ) from problem


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
