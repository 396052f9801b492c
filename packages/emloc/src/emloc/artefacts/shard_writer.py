"""Safetensors files, written tensor by tensor under a temporary name, synced and renamed when complete."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from emloc.artefacts.tensor_info import DTYPES
from emloc.artefacts.write_errors import writing
from emloc.linalg.finite import require_writable

SYNC_BYTES = 64 << 20
"""After so many bytes a shard that is being written is synced."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
        self._require_next(name, tensor.dtype, tuple(tensor.shape))
        self._append(name, tensor)

    def write_parts(self, name: str, parts: Iterable[Tensor]) -> None:
        """Append a tensor, some rows after others, as `write`."""
        rows, (dtype, shape) = 0, self._pending[-1][1]
        for part in parts:
            if part.dtype != dtype or tuple(part.shape[1:]) != shape[1:]:
                raise ValueError(f"{self.path}: {name} is of {dtype} {shape}, a part is not")
            rows += len(part)
            self._append(name, part)
        self._require_next(name, dtype, (rows, *shape[1:]))

    def _require_next(self, name: str, kind: torch.dtype, size: tuple[int, ...]) -> None:
        expected, (dtype, shape) = self._pending.pop()
        if (name, kind, size) != (expected, dtype, shape):
            raise ValueError(
                f"{self.path}: expected {expected} {dtype} {shape}, got {name} {kind} {size}"
            )

    def _append(self, name: str, tensor: Tensor) -> None:
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
