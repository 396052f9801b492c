"""Samples drawn by seed, and micro-batches of samples."""

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

SampleT = TypeVar("SampleT")


def drawn(samples: Sequence[SampleT], count: int, seed: int) -> list[SampleT]:
    """So many samples in random order, all of them where there are fewer."""
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    return [samples[index] for index in order[:count]]


def in_batches(samples: Sequence[SampleT], size: int) -> Iterator[Sequence[SampleT]]:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
