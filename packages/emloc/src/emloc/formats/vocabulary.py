"""A table of the vocabulary in few bits: which modules have it, and the tensors that are stored of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field

from emloc.artefacts.schema import Name, Schema, Size
from emloc.errors import CheckpointError
from emloc.formats.coded_matrix import CodedMatrix

GROUP_SIZE = 64
"""Neighbouring numbers of a row that share a scale."""


@dataclass(frozen=True)
class VocabularyTable:
    """Input embeddings, an output head, or both, where they are tied.

    Attributes:
        layers: names of the modules; of tied ones, the embeddings first.
        rows, columns: of the table.
        bits: of a number.
        stored_as: the names of its tensors in the checkpoint begin with it.
    """

    layers: tuple[str, ...]
    rows: int
    columns: int
    bits: int
    stored_as: str
    group_size: int = GROUP_SIZE

    @property
    def matrix(self) -> CodedMatrix:
        """The layout of its tensors."""
        return CodedMatrix(self.rows, self.columns, self.bits, self.group_size)

    @property
    def numel(self) -> int:
        """Elements of the dense table."""
        return self.rows * self.columns

    @property
    def sizes(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes of its tensors by their names in the checkpoint."""
        return {
            f"{self.stored_as}{name}": (kind or torch.uint8, shape)
            for name, (shape, kind) in self.matrix.stored()
        }

    @property
    def elements(self) -> int:
        """Elements of its tensors."""
        return sum(prod(shape) for _, shape in self.sizes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, on disk and while training."""
        return sum(prod(shape) * dtype.itemsize for dtype, shape in self.sizes.values())

    def as_json(self) -> dict[str, Any]:
        """The entry in an emulator's config and manifest."""
        return {**vars(self), "layers": list(self.layers)}


class _Entry(Schema):
    """A table in a config or manifest."""

    model_config = ConfigDict(extra="forbid", strict=True)

    layers: Annotated[list[Name], Field(min_length=1, max_length=2)]
    rows: Size
    columns: Size
    bits: Size
    stored_as: Name
    group_size: Size = GROUP_SIZE


def tables_of(entries: Iterable[Mapping[str, Any]] | None) -> Sequence[VocabularyTable]:
    """The tables of an emulator, from the entries of its config or manifest.

    Raises:
        CheckpointError: an entry is none.
    """
    try:
        made = [
            VocabularyTable(tuple(entry.layers), **entry.model_dump(exclude={"layers"}))
            for entry in map(_Entry.model_validate, entries or ())
        ]
        for table in made:
            _ = table.elements
        return made
    except (KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(
            "The emulator's config or manifest describes its embeddings in an unknown way; compress the "
            "base model again, or install the version of emloc that it was made with."
        ) from problem
