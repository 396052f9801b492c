"""A weight as integers of few bits on a grid, rounded with feedback (`emloc.linalg.rounding`).

Every layer of a group has a grid and codes of its own; what they share is the moments of their input and the
order of rounding. A convolution is rounded as a matrix of patches.
"""

from collections.abc import Mapping

from torch import Tensor

from emloc.errors import ConfigError
from emloc.formats.coded_layers import (
    FACTORS_OF_NOTHING,
    GRID_BITS,
    LayerByLayer,
    grid_within,
    refuse_unknown_grid,
)
from emloc.formats.coded_matrix import CodedMatrix
from emloc.formats.layer_format import Form, GroupShape, tensor_bytes
from emloc.formats.quantized_residual import QUANTIZED_RESIDUAL
from emloc.linalg.gram import Moments
from emloc.linalg.grid import group_count
from emloc.linalg.refinement import fitted_bytes, fitted_grid
from emloc.options.compress import CompressConfig

SIZES: tuple[str, ...] = ("bits", "group_size")


class Quantized(LayerByLayer):
    """`LayerFormat`."""

    name = "quantized"
    options: tuple[str, ...] = (*SIZES, "residual_rank", "factor_bits")
    size_names: tuple[str, ...] = SIZES

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """The bits that were asked for; else the most, in the smallest groups, that the share allows.

        Raises:
            ConfigError: there are no codes of so many bits, or `factor_bits` without a residual.
        """
        if config.bits is not None and config.bits not in GRID_BITS:
            raise ConfigError(
                f"format={self.name} has codes of 2, 3, 4 or 8 bits; for {config.bits} pass format=trellis."
            )
        if config.residual_rank:
            return QUANTIZED_RESIDUAL.decide(shape, config, itemsize)
        if config.factor_bits is not None:
            raise ConfigError(FACTORS_OF_NOTHING.format(name=self.name))
        return grid_within(shape, config, itemsize, self.form)

    def layout(self, d_out: int, d_in: int, form: Form) -> CodedMatrix:
        """Codes, scales and zeros.

        Raises:
            MismatchError: there is no grid of these sizes.
        """
        bits, group_size = (form.sizes[name] for name in SIZES)
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

    def form(self, bits: int, group_size: int) -> Form:
        """A form of these sizes."""
        return Form(self, {"bits": bits, "group_size": group_size})


QUANTIZED = Quantized()
