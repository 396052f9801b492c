"""Samples as training takes them, drawn by seed, and in micro-batches."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from emloc.extend.family import Batch

SampleT = TypeVar("SampleT")


@dataclass(frozen=True)
class TrainingData:
    """Data as training takes them.

    Attributes:
        samples: learnt from, in any form that `collate` takes.
        collate: makes a micro-batch, with labels, of samples.
        evaluation: samples that the loss is taken on every `eval_steps`; none by default.
        processing: the tokenizer or processor, saved beside the adapter; None for none.
    """

    samples: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    evaluation: Sequence[Any] = ()
    processing: Any = None


def drawn(samples: Sequence[SampleT], count: int, seed: int) -> list[SampleT]:
    """Draw so many samples in random order, all of them where there are fewer."""
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    return [samples[index] for index in order[:count]]


def in_batches(samples: Sequence[SampleT], size: int) -> Iterator[Sequence[SampleT]]:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
