"""The heads, head dimensions and neurons of each block that stay, and the sizes that this gives its
layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emloc_baselines.structures import Structures


class Slice(NamedTuple):
    """Rows and columns of a layer's weight that stay; None: all."""

    rows: Tensor | None
    columns: Tensor | None

    def of(self, weight: Tensor) -> Tensor:
        """The part of a weight (d_out × d_in) that stays."""
        part = weight if self.rows is None else weight[self.rows]
        return part if self.columns is None else part[:, self.columns]


@dataclass(frozen=True)
class Kept:
    """The indices that stay in one block, sorted.

    Attributes:
        groups: key-value heads.
        dims: head dimensions, of every head.
        neurons: of the MLP.
    """

    structures: Structures
    groups: Tensor
    dims: Tensor
    neurons: Tensor

    @classmethod
    def everything(cls, structures: Structures) -> "Kept":
        """The block as it is."""
        attention, mlp = structures.attention, structures.mlp
        return cls(
            structures,
            torch.arange(attention.groups),
            torch.arange(attention.head_dim),
            torch.arange(mlp.neurons),
        )

    def slices(self) -> dict[str, Slice]:
        """Kept rows and columns by layer; the same hold for the rows of biases."""
        attention, mlp = self.structures.attention, self.structures.mlp
        queries = attention.query_rows(self.groups, self.dims)
        keys = attention.key_rows(self.groups, self.dims)
        return {
            attention.query: Slice(queries, None),
            attention.key: Slice(keys, None),
            attention.value: Slice(keys, None),
            attention.output: Slice(None, queries),
            **{name: Slice(self.neurons, None) for name in mlp.inputs},
            mlp.output: Slice(None, self.neurons),
        }

    def norm_slices(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Weights of queries' and keys' norms that stay; `sizes` are those of the norms' weights."""
        attention = self.structures.attention
        rows = self.slices()
        return {
            norm: self.dims if sizes[norm] == attention.head_dim else _rows(rows[layer])
            for norm, layer in attention.norms
        }

    def as_json(self) -> dict[str, str]:
        """JSON for a manifest; `from_json` reads it."""
        return {
            "groups": as_text(self.groups),
            "dims": as_text(self.dims),
            "neurons": as_text(self.neurons),
        }

    @classmethod
    def from_json(cls, structures: Structures, content: Mapping[str, str]) -> "Kept":
        """Read what `as_json` wrote."""
        return cls(
            structures, *(from_text(content[name]) for name in ("groups", "dims", "neurons"))
        )


def _rows(part: Slice) -> Tensor:
    assert part.rows is not None
    return part.rows


def as_text(indices: Tensor) -> str:
    """`0-3,7`: sorted indices in runs."""
    runs: list[list[int]] = []
    for index in indices.tolist():
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def from_text(text: str) -> Tensor:
    """Read what `as_text` wrote."""
    return torch.tensor(numbers(text), dtype=torch.int64)


def numbers(text: str) -> list[int]:
    """The same as a list."""
    indices: list[int] = []
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        indices += range(int(first), int(last or first) + 1)
    return indices


def all_slices(kept: Iterable[Kept]) -> dict[str, Slice]:
    """The slices of all layers of all blocks."""
    return {name: kept_slice for block in kept for name, kept_slice in block.slices().items()}


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, sorted; ties go to the first."""
    order: Sequence[int] = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return torch.tensor(sorted(order[:count]), dtype=torch.int64)
