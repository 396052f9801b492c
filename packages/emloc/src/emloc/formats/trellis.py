"""A weight in codes of 1 to 4 bits along a trellis (`emloc.linalg.trellis_rounding`).

At the same bytes its errors are about half of a grid's (`emloc.formats.quantized`); finding the codes takes
longer, and decoding them looks each number up in a table.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from emloc.errors import ConfigError, MismatchError
from emloc.formats.coded_layers import FACTORS_OF_NOTHING, LayerByLayer, grid_within
from emloc.formats.layer_format import Form, GroupShape, tensor_bytes
from emloc.formats.trellis_matrix import TrellisMatrix
from emloc.linalg.gram import Moments
from emloc.linalg.grid import group_count
from emloc.linalg.trellis import TRELLIS_BITS, least_steps
from emloc.linalg.trellis_rounding import fitted_trellis, fitted_trellis_bytes
from emloc.linalg.trellis_search import compiled_search
from emloc.machine.progress import warn
from emloc.options.compress import CompressConfig

SIZES: tuple[str, ...] = ("bits", "group_size")

GROUP_SIZE = 128
"""Inputs of a group where only bits are given."""


class Trellis(LayerByLayer):
    """`LayerFormat`."""

    name = "trellis"
    options: tuple[str, ...] = (*SIZES, "residual_rank", "factor_bits")
    size_names: tuple[str, ...] = SIZES

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """The bits that were asked for; else the most, in the smallest groups, that the share allows.

        Raises:
            ConfigError: there are no codes of so many bits, or `factor_bits` without a residual.
        """
        if config.bits is not None and config.bits not in TRELLIS_BITS:
            raise ConfigError(
                f"format={self.name} has codes of {TRELLIS_BITS[0]} to {TRELLIS_BITS[-1]} bits; for "
                f"{config.bits} pass format=quantized."
            )
        if config.residual_rank:
            from emloc.formats.trellis_residual import TRELLIS_RESIDUAL  # which imports this module

            return TRELLIS_RESIDUAL.decide(shape, config, itemsize)
        if config.factor_bits is not None:
            raise ConfigError(FACTORS_OF_NOTHING.format(name=self.name))
        offered = self.bits_of(shape)
        return grid_within(shape, config, itemsize, self.form, offered, GROUP_SIZE)

    def bits_of(self, shape: GroupShape) -> list[int]:
        """The bits for which every layer has enough outputs."""
        return [bits for bits in TRELLIS_BITS if min(shape.d_out) >= least_steps(bits)]

    def layout(self, d_out: int, d_in: int, form: Form) -> TrellisMatrix:
        """Codes and scales.

        Raises:
            MismatchError: there are no codes of these sizes.
        """
        bits, group_size = (form.sizes[name] for name in SIZES)
        if bits not in TRELLIS_BITS or group_size < 1 or d_out < least_steps(bits):
            raise MismatchError(
                f"The emulator's config gives layers of {d_out} outputs {bits} bits in groups of "
                f"{group_size} along a trellis, which is no format; compress the base model again."
            )
        return TrellisMatrix(d_out, d_in, bits, group_size)

    def fit_layer(
        self, weight: Tensor, moments: Moments, form: Form
    ) -> tuple[Mapping[str, Tensor], float]:
        """See `emloc.linalg.trellis_rounding`."""
        advise(weight.device)
        layout = self.layout(weight.shape[0], weight.shape[1], form)
        rounded = fitted_trellis(weight, moments, layout.bits, layout.group_size)
        return layout.encoded(rounded), rounded.cost

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """See `fitted_trellis_bytes`, of the largest layer."""
        most = fitted_trellis_bytes(max(shape.d_out), shape.d_in)
        return most + tensor_bytes(shape, form, itemsize)

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """One dense weight, and its scales."""
        groups = max(shape.d_out) * group_count(shape.d_in, form.sizes["group_size"])
        return max(shape.d_out) * shape.d_in * itemsize + 4 * groups

    def form(self, bits: int, group_size: int) -> Form:
        """A form of these sizes."""
        return Form(self, {"bits": bits, "group_size": group_size})


def advise(device: torch.device) -> None:
    """Say once what would make finding the codes faster."""
    if device.type == "cpu" and compiled_search() is None:
        _say_numba()


@cache
def _say_numba() -> None:
    warn(
        "codes along a trellis are found some twenty times as fast with Numba, which is not installed: "
        "pip install 'emloc[numba]'"
    )


TRELLIS = Trellis()
