"""Writers of files: under a temporary name, synced and renamed, so whatever is there is whole."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from emloc.artefacts.checkpoint import DTYPES
from emloc.errors import OutputError
from emloc.linalg.finite import require_writable

SYNC_BYTES = 64 << 20
"""After so many bytes a shard that is being written is synced."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into an `OutputError`."""
    try:
        yield
    except OSError as problem:
        if isinstance(problem, OutputError):
            raise
        if problem.errno in _FULL:
            raise _disk_full(path) from problem
        raise OutputError(f"Cannot write {path}: {problem.strerror or problem}.") from problem


@contextmanager
def others_writing(path: Path) -> Iterator[None]:
    """Recognise a full disk in the errors of libraries that write below `path`; let others pass."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError, RuntimeError) as problem:
        # safetensors and torch.save wrap the system's error in their own words.
        text = str(problem)
        code = re.search(r"os error (\d+)", text)
        number = int(code[1]) if code else getattr(problem, "errno", None)
        if number in _FULL or "inline_container" in text:
            raise _disk_full(path) from problem
        raise


def _disk_full(path: Path) -> OutputError:
    free = shutil.disk_usage(existing_parent(path)).free
    return OutputError(
        f"The disk is full while writing {path} ({free / 2**20:.0f} MiB free); free some space and "
        f"run the same command again, it continues where it stopped."
    )


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    for folder in path.absolute().parents:
        if folder.is_dir():
            return folder
    return Path("/")


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is in memory atomically."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, readable and with a final newline."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    temporary = target.with_name(target.name + ".tmp")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(target)


class ShardWriter:
    """Writes one safetensors file tensor by tensor, so a shard never has to be in memory.

    Writing and hashing run on a thread each, beside the caller's work on the next tensor; a tensor must
    not change once it was handed over. What was written goes to the disk as it comes: left to the
    system, most of it would wait for the last sync, and everybody with it.

    The format is an 8-byte little-endian length, a JSON header and the tensors' bytes in order
    (https://huggingface.co/docs/safetensors). Used as a context manager; the file appears under its
    name only if all declared tensors were written.

    Args:
        path: the file.
        tensors: dtype and shape of each, in the order that they come in.
        source: what the tensors are read from or made of, for messages.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        source: str = "",
    ) -> None:
        self.path = path
        self._source = source or str(path)
        self._temporary = path.with_name(path.name + ".tmp")
        self._pending = list(tensors.items())[::-1]
        self._header = _header(tensors)
        self._sha = hashlib.sha256()
        self._threads = ThreadPoolExecutor(max_workers=2)
        self._under_way: list[Future[None]] = []
        self._unsynced = 0

    def __enter__(self) -> "ShardWriter":
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb", buffering=0)
        self._put(self._header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; tensors come in the declared order, with declared dtype and shape.

        Raises:
            NumericalError: it holds NaN or infinity.
        """
        expected, (dtype, shape) = self._pending.pop()
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, dtype, shape):
            raise ValueError(
                f"{self.path}: expected {expected} {dtype} {shape}, got {name} "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
        require_writable(name, tensor.detach(), self._source)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            self._put(memoryview(cast(bytes, flat.view(torch.uint8).numpy())))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        complete = kind is None and not self._pending
        with writing(self.path):
            try:
                if complete:
                    self._wait()
                    os.fsync(self._file.fileno())
                    self._temporary.rename(self.path)
            finally:
                self._threads.shutdown(wait=True)
                self._file.close()
                self._temporary.unlink(missing_ok=True)
        if kind is None and not complete:
            raise ValueError(f"{self.path}: not written: {[name for name, _ in self._pending]}")

    @property
    def sha256(self) -> str:
        """Digest of the bytes written so far."""
        self._wait()
        return self._sha.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        self._wait()  # one tensor may be under way, not all of them
        self._under_way = [
            self._threads.submit(self._write, memoryview(data)),
            self._threads.submit(self._sha.update, data),
        ]

    def _wait(self) -> None:
        with writing(self.path):
            for part in self._under_way:
                part.result()

    def _write(self, data: memoryview) -> None:
        size = len(data)
        while data:  # one call writes 2 GiB at most
            data = data[self._file.write(data) :]
        self._unsynced += size
        if self._unsynced >= SYNC_BYTES:
            os.fsync(self._file.fileno())
            self._unsynced = 0


def _header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return len(text).to_bytes(8, "little") + text


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
