"""A weight as integers of few bits on a grid, rounded with feedback (`emloc.linalg.rounding`).

Every layer of a group has a grid and codes of its own; what they share is the moments of their input and the
order of rounding. A convolution is rounded as a matrix of patches.
"""

from collections.abc import Mapping

from torch import Tensor

from emloc.formats.coded_layers import GRID_BITS, GROUP_SIZE, Codes, refuse_unknown_grid
from emloc.formats.coded_matrix import CodedMatrix
from emloc.formats.layer_format import Form, GroupShape, tensor_bytes
from emloc.formats.quantized_residual import QUANTIZED_RESIDUAL
from emloc.linalg.gram import Moments
from emloc.linalg.grid import group_count
from emloc.linalg.refinement import fitted_bytes, fitted_grid


class Quantized(Codes):
    """`LayerFormat`."""

    name = "quantized"
    known_bits = GRID_BITS
    usual_group = GROUP_SIZE
    other = "trellis"
    residual = QUANTIZED_RESIDUAL

    def layout(self, d_out: int, d_in: int, form: Form) -> CodedMatrix:
        """Codes, scales and zeros.

        Raises:
            MismatchError: there is no grid of these sizes.
        """
        bits, group_size = (form.sizes[name] for name in self.size_names)
        refuse_unknown_grid(bits, group_size)
        return CodedMatrix(d_out, d_in, bits, group_size)

    def fit_layer(
        self, weight: Tensor, moments: Moments, form: Form
    ) -> tuple[Mapping[str, Tensor], float]:
        """See `emloc.linalg.refinement`."""
        layout = self.layout(weight.shape[0], weight.shape[1], form)
        grid, codes, cost = fitted_grid(weight, moments, layout.bits, layout.group_size)
        return layout.encoded(grid, codes), cost

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """See `fitted_bytes`, of the largest layer."""
        return fitted_bytes(max(shape.d_out), shape.d_in) + tensor_bytes(shape, form, itemsize)

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """One dense weight, and its scales and zeros."""
        groups = max(shape.d_out) * group_count(shape.d_in, form.sizes["group_size"])
        return max(shape.d_out) * shape.d_in * itemsize + 8 * groups


QUANTIZED = Quantized()
