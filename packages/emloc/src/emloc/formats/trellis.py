"""A weight in codes of 1 to 4 bits along a trellis (`emloc.linalg.trellis_rounding`).

At the same bytes its errors are about half of a grid's (`emloc.formats.quantized`); finding the codes takes
longer, and decoding them looks each number up in a table.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from emloc.formats.coded_layers import Codes
from emloc.formats.layer_format import Form, GroupShape, tensor_bytes
from emloc.formats.trellis_matrix import TrellisMatrix, trellis_bits_of
from emloc.formats.trellis_residual import GROUP_SIZE, TRELLIS_RESIDUAL
from emloc.linalg.gram import Moments
from emloc.linalg.grid import group_count
from emloc.linalg.trellis import TRELLIS_BITS
from emloc.linalg.trellis_rounding import fitted_trellis_bytes
from emloc.linalg.trellis_search import prepare_search


class Trellis(Codes):
    """`LayerFormat`, and `Prepares`."""

    name = "trellis"
    known_bits = TRELLIS_BITS
    usual_group = GROUP_SIZE
    other = "quantized"
    residual = TRELLIS_RESIDUAL

    def bits_of(self, shape: GroupShape) -> Sequence[int]:
        """The bits for which every layer has enough outputs."""
        return trellis_bits_of(shape.d_out)

    def layout(self, d_out: int, d_in: int, form: Form) -> TrellisMatrix:
        """Codes and scales.

        Raises:
            MismatchError: there are no codes of these sizes.
        """
        return TrellisMatrix.known(d_out, d_in, *(form.sizes[name] for name in self.size_names))

    def fit_layer(
        self, weight: Tensor, moments: Moments, form: Form
    ) -> tuple[Mapping[str, Tensor], float]:
        """See `emloc.linalg.trellis_rounding`."""
        return self.layout(weight.shape[0], weight.shape[1], form).fit(weight, moments)

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """See `fitted_trellis_bytes`, of the largest layer."""
        most = fitted_trellis_bytes(max(shape.d_out), shape.d_in)
        return most + tensor_bytes(shape, form, itemsize)

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """One dense weight, and its scales."""
        groups = max(shape.d_out) * group_count(shape.d_in, form.sizes["group_size"])
        return max(shape.d_out) * shape.d_in * itemsize + 4 * groups

    def prepare(self, device: torch.device) -> None:
        """See `Prepares`."""
        prepare_search(device)


TRELLIS = Trellis()
