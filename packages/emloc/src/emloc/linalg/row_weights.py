"""Weights of a layer's outputs by how much the loss minds errors there: a root of moments of gradients.

To second order an error `E = W − W_e` of a weight costs `tr(D E G Eᵀ)`: `G = Σ x xᵀ` are the moments of the
inputs, `D = Σ g gᵀ` those of the loss's gradients at the outputs, and inputs and gradients are taken as
independent of each other (as Kronecker factors are; Martens and Grosse 2015). With `D = SᵀS` that is the
error of `S W` under `G` alone: what fits a weight fits `S W`, and `S⁻¹` takes it back.

`D` has no more directions than there are labelled tokens, so a ridge, a share of the mean of its diagonal,
says that every output matters a little.

Precision: float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.01
"""Share of the mean of the diagonal that is added to the diagonal."""

FULL_BELOW = 4096
"""Outputs from which on the diagonal alone is used."""


@dataclass(frozen=True)
class RowWeights:
    """The symmetric root of `D`, in units of its mean, and its inverse; made by `of`.

    Attributes:
        roots, inverses: of each layer of a stack, d_out × d_out, or a diagonal of d_out, float64.
        mean: of the diagonal of `D`; 0 where it is of nothing but zeros.
    """

    roots: Sequence[Tensor]
    inverses: Sequence[Tensor]
    mean: float

    @classmethod
    def of(cls, moments: Sequence[Tensor]) -> "RowWeights":
        """The weights for `D` of each layer of a stack, d_out × d_out, or its diagonal, d_out.

        Where that is of nothing but zeros, all outputs count alike.
        """
        mean = float(torch.cat([_diagonal(each).double() for each in moments]).mean())
        pairs = [_roots(each.double() / (mean or 1.0)) for each in moments]
        return cls([root for root, _ in pairs], [inverse for _, inverse in pairs], mean)

    @property
    def rows(self) -> int:
        """Outputs of the stack."""
        return sum(len(root) for root in self.roots)

    def of_layer(self, number: int) -> "RowWeights":
        """The weights of one layer's outputs in the stack."""
        return RowWeights([self.roots[number]], [self.inverses[number]], self.mean)

    def weigh(self, rows: Tensor) -> Tensor:
        """`S` times a matrix of so many rows, in its dtype."""
        return self._times(self.roots, rows)

    def unweigh(self, rows: Tensor) -> Tensor:
        """`S⁻¹` times a matrix of so many rows, in its dtype."""
        return self._times(self.inverses, rows)

    def on_both_sides(self, matrix: Tensor) -> Tensor:
        """`S M Sᵀ` of a symmetric matrix, in its dtype."""
        return self.weigh(self.weigh(matrix).T)

    def _times(self, factors: Sequence[Tensor], rows: Tensor) -> Tensor:
        parts = rows.split([len(factor) for factor in factors])
        return torch.cat([_product(factor.to(rows), part) for factor, part in zip(factors, parts)])


def row_weights_bytes(d_out: Sequence[int]) -> int:
    """Bytes of the weights of a stack of layers of so many outputs, while the largest's are made."""
    held = sum(16 * (rows**2 if rows < FULL_BELOW else rows) for rows in d_out)
    largest = max((rows for rows in d_out if rows < FULL_BELOW), default=0)
    return held + 3 * 8 * largest**2


def _diagonal(moments: Tensor) -> Tensor:
    return moments if moments.dim() == 1 else moments.diagonal()


def _product(factor: Tensor, rows: Tensor) -> Tensor:
    return factor[:, None] * rows if factor.dim() == 1 else factor @ rows


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    if moments.dim() == 1:
        root = (moments + RIDGE).sqrt()
        return root, 1 / root
    values, vectors = torch.linalg.eigh(moments)
    roots = (values.clamp(min=0) + RIDGE).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
