"""Identity of files: SHA-256 of all that they hold, or of size and ends where that would take long."""

import hashlib
from pathlib import Path

LARGE_BYTES = 64 << 20
"""Files beside the weights that are larger (a pipeline's other models) are known by size and ends."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def bytes_sha256(content: bytes) -> str:
    """SHA-256 of what is in memory, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_identity(path: Path) -> bytes:
    """SHA-256 of a file; of a large one, of its size and both ends."""
    size = path.stat().st_size
    if size <= LARGE_BYTES:
        return hashlib.sha256(path.read_bytes()).digest()
    with path.open("rb") as file:
        head = file.read(LARGE_BYTES // 2)
        file.seek(size - LARGE_BYTES // 2)
        return hashlib.sha256(f"{size}|".encode() + head + file.read()).digest()
