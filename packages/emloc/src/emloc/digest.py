"""Identity of calibration data: what settings record instead of a path."""

import hashlib
from collections.abc import Sequence

import torch

from emloc.family import Batch


def batches_digest(batches: Sequence[Batch]) -> str:
    """SHA-256 of all tensors of the micro-batches, names and shapes included."""
    sha = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            sha.update(f"{name}{tuple(tensor.shape)}".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
