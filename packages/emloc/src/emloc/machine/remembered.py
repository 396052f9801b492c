"""Answers that a process has worked out already, kept for whoever asks the same again."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """A few answers by what they depend on; the oldest goes first.

    Args:
        kept: answers at most.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._answers: dict[Hashable, T] = {}

    def answer(self, to: Hashable, work_out: Callable[[], T]) -> T:
        """The answer that is known, or what `work_out` returns; what it raises is not kept."""
        if to not in self._answers:
            answer = work_out()
            if len(self._answers) == self._kept:
                del self._answers[next(iter(self._answers))]
            self._answers[to] = answer
        return self._answers[to]
