"""The bytes that QLoRA holds of a base: NF4 weights with scales that are quantised once more.

As bitsandbytes stores a linear layer's weight: half a byte per element; per 64 elements a scale in 8 bits,
per 256 of those a float32, and for each layer a table of 256 and one of 16 float32 with an offset. Norms,
embeddings and the head keep their dtype. To multiply, a layer's weight is made in the dtype of the products.
"""

from collections.abc import Iterable

from emloc.planning.subject import Subject

BLOCK, NESTED = 64, 256
TABLES = (256 + 16 + 1) * 4


def quantised_bytes(numel: int) -> int:
    """One weight."""
    scales = -(-numel // BLOCK)
    return -(-numel // 2) + scales + -(-scales // NESTED) * 4 + TABLES


def quantised_model(subject: Subject, layers: Iterable[str]) -> tuple[int, int]:
    """Bytes of the weights with `layers` in NF4, and of the largest of them when it is multiplied."""
    numels = [subject.shapes[name][0] * subject.shapes[name][1] for name in layers]
    others = subject.parameters - sum(numels)
    itemsize = subject.stored.itemsize
    held = others * itemsize + sum(map(quantised_bytes, numels))
    return held, max(numels, default=0) * itemsize
