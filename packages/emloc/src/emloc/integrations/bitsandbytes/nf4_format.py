"""bitsandbytes' NF4, as QLoRA holds a base: the data have no say in it.

4.13 bits per weight. Moments serve to tell the error alone.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from emloc.formats.coded_layers import LayerByLayer
from emloc.formats.coded_matrix import Kind, ReadName
from emloc.formats.layer_format import Form, GroupShape, budget_bytes, keep_ratio_of, tensor_bytes
from emloc.integrations.bitsandbytes.nf4_weight import (
    BLOCK,
    SCALES,
    NF4Weight,
    bitsandbytes,
    quantise,
)
from emloc.linalg.gram import Moments
from emloc.options.compress import SIZING, CompressConfig
from emloc.options.patterns import match_pattern

CODES, ABSMAX, NESTED = "codes", "absmax", "nested"


class NF4(LayerByLayer):
    """`LayerFormat`."""

    name = "nf4"
    options: tuple[str, ...] = ()
    size_names: tuple[str, ...] = ()

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """NF4, or the reason to stay dense where a budget or a pattern was given and is less.

        Raises:
            DependencyError: bitsandbytes is not installed.
        """
        bitsandbytes()
        form = Form(self)
        by_pattern = match_pattern(config.keep_ratio_pattern, shape.owner) is not None
        if not by_pattern and config.model_fields_set.isdisjoint(SIZING):
            return form
        if keep_ratio_of(shape.owner, config, itemsize) == 1:
            return "keep_ratio 1"
        within = tensor_bytes(shape, form, itemsize) <= budget_bytes(shape, config, itemsize)
        return form if within else "4.13 bits are more than its share"

    def layout(self, d_out: int, d_in: int, form: Form) -> "Tensors":
        """Codes, and scales on two levels.

        Raises:
            DependencyError: bitsandbytes is not installed.
        """
        bitsandbytes()
        return Tensors(d_out, d_in)

    def fit_layer(
        self, weight: Tensor, moments: Moments, form: Form
    ) -> tuple[Mapping[str, Tensor], float]:
        """Every number to its nearest code."""
        stored: dict[str, Tensor] = dict(zip((CODES, ABSMAX, NESTED), quantise(weight)))
        return self.with_cost(weight, moments, form, stored)

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """The largest weight and its decoded values in float32, beside the result."""
        return 12 * max(shape.d_out) * shape.d_in + tensor_bytes(shape, form, itemsize)

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """One dense weight, and its scales."""
        numel = max(shape.d_out) * shape.d_in
        return numel * itemsize + 8 * -(-numel // BLOCK)


class Tensors(NamedTuple):
    """The tensors of a layer."""

    d_out: int
    d_in: int

    def stored(self) -> Iterator[tuple[str, Kind]]:
        """Codes, codes of scales, and scales of these."""
        numel = self.d_out * self.d_in
        blocks = -(-numel // BLOCK)
        yield CODES, ((-(-numel // 2),), torch.uint8)
        yield ABSMAX, ((blocks,), torch.uint8)
        yield NESTED, ((-(-blocks // SCALES) + 1,), torch.int32)

    def decoded(self, read: ReadName) -> NF4Weight:
        """The weight."""
        return NF4Weight(read(CODES), read(ABSMAX), read(NESTED), (self.d_out, self.d_in))


NF4_FORMAT = NF4()
