"""Formats whose layers are fitted, stored and decoded one by one, and a grid within a budget."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from emloc.errors import ConfigError, MismatchError, NumericalError
from emloc.formats.coded_matrix import Kind, ReadName
from emloc.formats.layer_format import (
    DenseLayer,
    Fitted,
    Form,
    GroupShape,
    LayerFormat,
    Read,
    StoredTensor,
    budget_bytes,
    keep_ratio_of,
    tensor_bytes,
)
from emloc.layers.quantized_layers import QuantizedConv2d, QuantizedLinear
from emloc.linalg.finite import refuse_not_finite
from emloc.linalg.gram import Moments, Side
from emloc.linalg.operator import Operator
from emloc.linalg.rounding import squared_change
from emloc.options.compress import GROUP_SIZES, CompressConfig
from emloc.options.patterns import match_pattern

GRID_BITS = (2, 3, 4, 8)
"""Bits that a code on a grid may have."""

GROUP_SIZE = 64
"""Inputs of a group where only bits are given."""


def grid_within(
    shape: GroupShape,
    config: CompressConfig,
    itemsize: int,
    form_of: Callable[[int, int], Form],
    offered: Sequence[int] = GRID_BITS,
    usual_group: int = GROUP_SIZE,
) -> Form | str:
    """The form of the bits that were asked for, or of the most, in the smallest groups, within the budget.

    A ratio that a pattern gives the layer is its budget, whatever bits the others have.

    Args:
        form_of: gives the form of some bits and group size.
        offered: bits that the format has.
        usual_group: inputs of a group where only bits are given.

    Returns:
        The reason to stay dense, if nothing is within the budget or the budget is all.
    """
    by_pattern = match_pattern(config.keep_ratio_pattern, shape.owner) is not None
    if config.bits is not None and not by_pattern:
        if config.bits not in offered:
            return f"too few outputs for codes of {config.bits} bits"
        return form_of(config.bits, config.group_size or usual_group)
    if keep_ratio_of(shape.owner, config, itemsize) == 1:
        return "keep_ratio 1"
    sizes = [config.group_size] if config.group_size else GROUP_SIZES
    budget = budget_bytes(shape, config, itemsize)
    for bits, group_size in product(sorted(offered, reverse=True), sizes):
        form = form_of(bits, group_size)
        if tensor_bytes(shape, form, itemsize) <= budget:
            return form
    return f"{min(offered)} bits are more than its share"


def refuse_unknown_grid(bits: int, group_size: int) -> None:
    """Refuse sizes that no compression writes.

    Raises:
        MismatchError: there is no such grid.
    """
    if bits not in GRID_BITS or group_size < 1:
        raise MismatchError(
            f"The emulator's config gives layers {bits} bits in groups of {group_size}, which is not a "
            f"format; compress the base model again."
        )


class Layout(Protocol):
    """The tensors of one layer."""

    def stored(self) -> Iterable[tuple[str, Kind]]:
        """Shapes and dtypes by name."""
        ...

    def decoded(self, read: ReadName) -> Operator:
        """The weight that they stand for, d_out × d_in."""
        ...


class LayerByLayer(ABC):
    """The part of a `LayerFormat` that is the same wherever the layers of a group share no tensors."""

    def side(self, shape: GroupShape) -> Side:
        """The input's: rounding goes by it, and the error is told by it."""
        return "input"

    @abstractmethod
    def layout(self, d_out: int, d_in: int, form: Form) -> Layout:
        """The tensors of a layer of that size."""

    @abstractmethod
    def fit_layer(
        self, weight: Tensor, moments: Moments, form: Form
    ) -> tuple[Mapping[str, Tensor], float]:
        """The stored tensors of a finite weight, d_out × d_in, and the squared change of its outputs.

        The change is weighed if the moments are (`squared_change`).
        """

    def fit(
        self, weights: Sequence[Tensor], moments: Moments, shape: GroupShape, form: Form
    ) -> Fitted:
        """Each layer by `fit_layer`, with the relative error of their outputs together.

        Raises:
            NumericalError: a weight holds NaN or infinity, or its outputs are beyond float32.
        """
        refuse_not_finite(moments.name, weights)
        changed = whole = 0.0
        tensors: dict[tuple[str, str], Tensor] = {}
        for number, (layer, weight) in enumerate(zip(shape.layers, weights)):
            own = moments.for_layer(number)
            stored, cost = self.fit_layer(weight, own, form)
            changed += cost
            whole += squared_change(weight, own)
            tensors.update({(layer, name): tensor for name, tensor in stored.items()})
        if not (math.isfinite(changed) and math.isfinite(whole)):
            raise NumericalError(
                f"Layer {moments.name}: its outputs are too large to be squared in float32; exclude it."
            )
        return Fitted(tensors, {"relative_error": (changed / whole) ** 0.5 if whole > 0 else 0.0})

    def with_cost(
        self, weight: Tensor, moments: Moments, form: Form, stored: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], float]:
        """Stored tensors with the squared change of the outputs, for `fit_layer`."""
        stands_for = self.layout(weight.shape[0], weight.shape[1], form).decoded(stored.__getitem__)
        lost = weight.float() - stands_for.dense(torch.float32)
        return stored, squared_change(lost, moments)

    def stored(self, shape: GroupShape, form: Form) -> Sequence[StoredTensor]:
        """Each layer's tensors."""
        return [
            StoredTensor(layer, name, size, dtype)
            for layer, d_out in zip(shape.layers, shape.d_out)
            for name, (size, dtype) in self.layout(d_out, shape.d_in, form).stored()
        ]

    def operator(self, shape: GroupShape, form: Form, layer: str, read: Read) -> Operator:
        """The layer's tensors, decoded where they are multiplied."""
        d_out = shape.d_out[shape.layers.index(layer)]
        return self.layout(d_out, shape.d_in, form).decoded(lambda name: read(layer, name))

    def modules(self, layers: Sequence[DenseLayer], form: Form) -> Sequence[nn.Module]:
        """A module for each that decodes its weight.

        Raises:
            MismatchError: no compression writes such sizes.
        """
        return [self._module(layer, form) for layer in layers]

    linear: type[QuantizedLinear] = QuantizedLinear
    convolution: type[QuantizedConv2d] = QuantizedConv2d

    def _module(self, layer: DenseLayer, form: Form) -> nn.Module:
        layout = self.layout(layer.d_out, layer.d_in, form)
        tensors = dict(layout.stored())
        shown = ", ".join(f"{name}={value}" for name, value in form.sizes.items())
        if layer.convolution is not None:
            return self.convolution(layer.convolution, tensors, layout.decoded, shown)
        return self.linear(
            layer.d_in, layer.d_out, layer.bias, tensors, layout.decoded, shown, layer.dtype,
            layer.device,
        )  # fmt: skip


class Codes(LayerByLayer):
    """The part of a `LayerFormat` that is the same for codes on a grid and along a trellis.

    Attributes:
        known_bits: that a code may have.
        usual_group: inputs of a group where only bits are given.
        other: the format that has other bits.
        residual: the format of the same codes with a product of factors.
    """

    options: tuple[str, ...] = ("bits", "group_size", "residual_rank", "factor_bits")
    size_names: tuple[str, ...] = ("bits", "group_size")
    name: str
    known_bits: tuple[int, ...]
    usual_group: int
    other: str
    residual: LayerFormat

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """The bits that were asked for; else the most, in the smallest groups, that the share allows.

        Raises:
            ConfigError: there are no codes of so many bits, or `factor_bits` without a residual.
        """
        if config.bits is not None and config.bits not in self.known_bits:
            bits = ", ".join(map(str, self.known_bits))
            raise ConfigError(
                f"format={self.name} has codes of {bits} bits; for {config.bits} bits pass "
                f"format={self.other}."
            )
        if config.residual_rank:
            return self.residual.decide(shape, config, itemsize)
        if config.factor_bits is not None:
            raise ConfigError(
                f"factor_bits means nothing to format={self.name} without a residual_rank; pass both or "
                f"neither."
            )
        offered = self.bits_of(shape)
        return grid_within(shape, config, itemsize, self.form, offered, self.usual_group)

    def bits_of(self, shape: GroupShape) -> Sequence[int]:
        """The bits that codes of such layers may have."""
        return self.known_bits

    def form(self, bits: int, group_size: int) -> Form:
        """A form of these sizes."""
        return Form(cast(LayerFormat, self), {"bits": bits, "group_size": group_size})
