"""A weight along a trellis plus a product of two factors; see `emloc.formats.quantized_residual`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from emloc.formats.coded_layers import Layout
from emloc.formats.layer_format import Form, GroupShape
from emloc.formats.quantized_residual import BITS, GROUP, QuantizedResidual
from emloc.formats.trellis_matrix import TrellisMatrix, trellis_bits_of
from emloc.linalg.gram import Moments
from emloc.linalg.refinement import fitted_bytes
from emloc.linalg.trellis import TRELLIS_BITS
from emloc.linalg.trellis_rounding import fitted_trellis_bytes
from emloc.linalg.trellis_search import prepare_search

GROUP_SIZE = 128
"""Inputs of a group where only bits are given."""


class TrellisResidual(QuantizedResidual):
    """`LayerFormat`, `Prepares`, and `WeighsRows`: factors do, and the choice of an order; codes do not."""

    name = "trellis_residual"
    without = "trellis"
    usual_group = GROUP_SIZE
    known_bits: tuple[int, ...] = TRELLIS_BITS

    def bits_of(self, shape: GroupShape) -> Sequence[int]:
        """The bits for which every layer has enough outputs."""
        return trellis_bits_of(shape.d_out)

    def codes_of(self, d_out: int, d_in: int, bits: int, group_size: int) -> Layout:
        """The tensors of the codes.

        Raises:
            MismatchError: there are no codes of these sizes.
        """
        return TrellisMatrix.known(d_out, d_in, bits, group_size)

    def round(
        self, target: Tensor, moments: Moments, form: Form
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """The tensors of codes that are fitted to a weight, and what they stand for, float32."""
        rows, columns = target.shape
        matrix = TrellisMatrix(rows, columns, form.sizes[BITS], form.sizes[GROUP])
        tensors, _ = matrix.fit(target, moments)
        return tensors, matrix.decoded(tensors.__getitem__).dense(target.dtype)

    def prepare(self, device: torch.device) -> None:
        """See `Prepares`."""
        prepare_search(device)

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """The bytes of fitting with a grid, and those that a trellis takes beyond it."""
        rows, columns = max(shape.d_out), shape.d_in
        beyond = fitted_trellis_bytes(rows, columns) - fitted_bytes(rows, columns)
        stood = 6 * rows * columns
        return super().fitting_bytes(shape, form, itemsize) + beyond + stood


TRELLIS_RESIDUAL = TrellisResidual()
