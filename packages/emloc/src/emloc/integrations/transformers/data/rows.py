"""Rows that know where they stand, all at once or as they come."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np


class Row(dict[str, Any]):
    """One row: its cells by column, as they are written.

    Attributes:
        where: file and line, or data set and row, for messages.
        folder: where paths in it begin.
    """

    def __init__(self, cells: Mapping[str, Any], where: str, folder: Path) -> None:
        super().__init__(cells)
        self.where = where
        self.folder = folder


class Rows(list[Row]):
    """All rows of a data set."""

    def take(self, count: int) -> "Rows":
        """The first so many."""
        return Rows(self[:count])

    def shuffled(self, seed: int) -> "Rows":
        """Rows in the order that `datasets.Dataset.shuffle` gives by the same seed."""
        order = np.random.default_rng(seed).permutation(len(self))
        return Rows(self[index] for index in order)


class RowStream:
    """Rows that are read anew each time they are gone through, and stored nowhere."""

    def __init__(self, read: Callable[[], Iterable[Row]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Row]:
        return iter(self._read())

    def take(self, count: int) -> "RowStream":
        """The first so many."""
        return RowStream(lambda: islice(self, count))

    def shuffled(self, seed: int, buffer_size: int = 1000) -> "RowStream":
        """Rows in the order that `datasets.Dataset.shuffle` gives by the same seed."""

        def read() -> Iterator[Row]:
            draw = np.random.default_rng(seed)
            buffer: list[Row] = []
            for row in self:
                if len(buffer) < buffer_size:
                    buffer.append(row)
                    continue
                index = int(draw.integers(buffer_size))
                yield buffer[index]
                buffer[index] = row
            yield from (buffer[index] for index in draw.permutation(len(buffer)))

        return RowStream(read)


AnyRows: TypeAlias = Rows | RowStream


def where_of(row: Mapping[str, Any]) -> str:
    """The place of a row, for messages."""
    return row.where if isinstance(row, Row) else "A row"
