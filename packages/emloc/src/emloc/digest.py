"""Identity of data: what settings record beside a path, so that a changed file is noticed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from emloc.family import Batch
from emloc.output import file_sha256


def batches_digest(batches: Sequence[Batch]) -> str:
    """SHA-256 of all tensors of the micro-batches, names and shapes included."""
    sha = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            sha.update(f"{name}{tuple(tensor.shape)}".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def dataset_sha256(dataset: str | None) -> str | None:
    """SHA-256 of a data set that is a local file; None for a folder or a hub id."""
    return file_sha256(Path(dataset)) if dataset and Path(dataset).is_file() else None
