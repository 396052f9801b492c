"""Seals: a JSON file's digest of its own content, by which an edit of it is found."""

from collections.abc import Mapping
from typing import Any

from emloc.artefacts.file_digest import bytes_sha256
from emloc.artefacts.small_files import json_text

SEAL = "seal"
"""Key of the digest, which is of all other keys."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its seal."""
    return {**content, SEAL: _seal(content)}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Tell whether content is what was sealed."""
    return content.get(SEAL) == _seal(content)


def _seal(content: Mapping[str, Any]) -> str:
    return bytes_sha256(json_text({key: content[key] for key in content if key != SEAL}))
