"""Weights as operators: what multiplying by a stored weight needs, without the dense weight.

Precision: products run in the columns' dtype, a few rows of a stored matrix at a time, so that no matrix is
copied into it.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from emloc.linalg.merging import ROWS


@runtime_checkable
class Operator(Protocol):
    """A weight, d_out × d_in."""

    def __matmul__(self, columns: Tensor) -> Tensor:
        """The product with columns, d_in × n, in their dtype."""
        ...

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight, multiplied out in `dtype`."""
        ...


def product(weight: Tensor, columns: Tensor) -> Tensor:
    """`weight @ columns` in the columns' precision, without a copy of the weight in it."""
    parts = [rows.to(columns.dtype) @ columns for rows in weight.split(ROWS)]
    return torch.cat(parts)


@dataclass(frozen=True)
class Product:
    """`left @ right`, d_out × k and k × d_in."""

    left: Tensor
    right: Tensor

    def __matmul__(self, columns: Tensor) -> Tensor:
        """`left @ (right @ columns)`."""
        return product(self.left, product(self.right, columns))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """`left @ right`."""
        return self.left.to(dtype) @ self.right.to(dtype)


@dataclass(frozen=True)
class Matrix:
    """A weight that is stored as it is."""

    weight: Tensor

    def __matmul__(self, columns: Tensor) -> Tensor:
        """`weight @ columns`."""
        return product(self.weight, columns)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight."""
        return self.weight.to(dtype)


@dataclass(frozen=True)
class Chain:
    """`left @ right` of two operators."""

    left: Operator
    right: Operator

    def __matmul__(self, columns: Tensor) -> Tensor:
        """`left @ (right @ columns)`."""
        return self.left @ (self.right @ columns)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """`left @ right`."""
        return self.left.dense(dtype) @ self.right.dense(dtype)


@dataclass(frozen=True)
class Sum:
    """`first + second` of two operators."""

    first: Operator
    second: Operator

    def __matmul__(self, columns: Tensor) -> Tensor:
        """`first @ columns + second @ columns`."""
        return (self.first @ columns).add_(self.second @ columns)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """`first + second`."""
        return self.first.dense(dtype).add_(self.second.dense(dtype))
