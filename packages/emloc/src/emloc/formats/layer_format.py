"""A layer's emulated form: how a group of layers is stored, computed with and trained on.

A format turns the weights of a group (layers that read the same input, or one layer alone) into stored
tensors. Stages, loaders and the planner know no tensor of it by name; they ask the format. Its laws, for a
form that `decide` gave, with `W_e` the weight that the stored tensors stand for:

    fit(...).tensors.keys() == {(s.layer, s.name) for s in stored(shape, form)}, in those shapes
    operator(...) @ X == operator(...).dense(dtype) @ X
    module(x) == x @ operator(...).dense(dtype)ᵀ + bias, for a linear layer
    the bytes of stored(shape, form) <= budget_bytes(...), as far as the format can go

Further abilities are protocols of their own (`emloc.formats.abilities`), found by `isinstance`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from emloc.linalg.gram import Moments, Side
from emloc.linalg.operator import Operator
from emloc.machine.targets import imported
from emloc.options.compress import (
    DEFAULT_KEEP_RATIO,
    LOW_RANK_FORMAT,
    CompressConfig,
    with_size,
)
from emloc.options.patterns import match_pattern


@dataclass(frozen=True)
class GroupShape:
    """Layers whose weights are stacked, as matrices.

    Attributes:
        layers: names, in the order of the stack.
        d_out: outputs of each layer.
        d_in: inputs of all; of a convolution, those of a patch.
        kernel: the axes of a convolution's weight behind its channels; none for linear layers.
    """

    layers: tuple[str, ...]
    d_out: tuple[int, ...]
    d_in: int
    kernel: tuple[int, ...] = ()

    @property
    def owner(self) -> str:
        """The first layer; tensors that all share are stored under its name."""
        return self.layers[0]

    @property
    def rows(self) -> int:
        """Outputs of all layers together."""
        return sum(self.d_out)

    @property
    def numel(self) -> int:
        """Elements of the dense weights."""
        return self.rows * self.d_in

    def singles(self) -> list["GroupShape"]:
        """Each layer as a group of its own."""
        return [
            replace(self, layers=(layer,), d_out=(d_out,))
            for layer, d_out in zip(self.layers, self.d_out)
        ]

    def weight_shape(self, d_out: int) -> tuple[int, ...]:
        """Shape of a dense weight with so many outputs."""
        channels = self.d_in // prod(self.kernel)
        return (d_out, channels, *self.kernel)


@dataclass(frozen=True)
class Form:
    """One group's outcome.

    Attributes:
        format: knows what the sizes mean.
        sizes: all that the format needs to rebuild the group, as JSON.
    """

    format: "LayerFormat"
    sizes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def with_size(self, name: str, value: int) -> "Form":
        """The same form in another size."""
        return replace(self, sizes={**self.sizes, name: value})

    def as_json(self) -> dict[str, Any]:
        """The sizes, and the format's name unless it is low rank."""
        named = {} if self.format.name == LOW_RANK_FORMAT else {"format": self.format.name}
        return {**named, **self.sizes}


class StoredTensor(NamedTuple):
    """A tensor that a format writes.

    Attributes:
        layer: it is stored under this layer's name.
        name: its name within the layer, which is also that of the module's parameter or buffer.
        shape: as it is stored.
        dtype: None: that of the emulator's other weights.
    """

    layer: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


Tensors = Mapping[tuple[str, str], Tensor]
"""Tensors by layer and name."""

Read = Callable[[str, str], Tensor]
"""Gives a stored tensor by layer and name."""


class Spectrum(NamedTuple):
    """The part of a group's output that each unit of its size keeps.

    Attributes:
        values: descending, one per unit.
        total: the sum for a group that loses nothing.
    """

    values: Sequence[float]
    total: float


class Fitted(NamedTuple):
    """A group that was fitted.

    Attributes:
        tensors: in the shapes of `LayerFormat.stored`; those without a dtype of their own in the weights'.
        report: figures for the manifest.
        spectrum: of a format that can be cut down.
    """

    tensors: Tensors
    report: Mapping[str, Any]
    spectrum: Spectrum | None = None


@dataclass(frozen=True)
class DenseLayer:
    """A layer of a skeleton whose place an emulated one takes.

    Attributes:
        name: of the module.
        bias: whether it has one.
        dtype, device: of its weight.
        convolution: the module itself, if it is a convolution.
    """

    name: str
    d_in: int
    d_out: int
    bias: bool
    dtype: torch.dtype
    device: torch.device
    convolution: nn.Conv2d | None = None


@runtime_checkable
class LayerFormat(Protocol):
    """One form of a layer. A format holds no state; sizes are in `Form`.

    Attributes:
        name: as registered.
        options: those of compress that this format alone takes.
        size_names: the keys of a form's sizes, which are whole numbers.
    """

    name: str
    options: tuple[str, ...]
    size_names: tuple[str, ...]

    def side(self, shape: GroupShape) -> Side:
        """The side whose second moments `fit` wants."""
        ...

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """The form that the options' budget buys, or the reason for which the group stays dense.

        Args:
            itemsize: bytes of an element of the emulator's own dtype (`budget_bytes`).
        """
        ...

    def fit(
        self, weights: Sequence[Tensor], moments: Moments, shape: GroupShape, form: Form
    ) -> Fitted:
        """Fit the weights (d_out × d_in, float32 or float64) to what the layers read or write.

        Raises:
            NumericalError: a weight holds NaN or infinity.
        """
        ...

    def stored(self, shape: GroupShape, form: Form) -> Sequence[StoredTensor]:
        """The tensors of a group, in place of its weights."""
        ...

    def operator(self, shape: GroupShape, form: Form, layer: str, read: Read) -> Operator:
        """One layer's weight as an operator, d_out × d_in, made of the group's stored tensors."""
        ...

    def modules(self, layers: Sequence[DenseLayer], form: Form) -> Sequence[nn.Module]:
        """Empty trainable modules for a group, each an `EmulatedLayer` and of the dense module's kind.

        Tensors of `stored` are their frozen parameters or buffers. Nothing that a module makes of them is
        kept for the backward (`emloc.layers.remade_weight`).

        Raises:
            MismatchError, ConfigError: the format knows no such group of layers.
        """
        ...

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """The most that `fit` holds beside weights and moments, its result included.

        Args:
            itemsize: bytes of an element of the weights that are fitted.
        """
        ...

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """The most that one module of the group makes for a moment while it runs, outputs left out.

        Args:
            itemsize: bytes of an element in which it multiplies.
        """
        ...


def tensor_bytes(shape: GroupShape, form: Form, itemsize: int) -> int:
    """Bytes of a group's stored tensors.

    Args:
        itemsize: of tensors without a dtype of their own.
    """
    return sum(
        prod(stored.shape) * (stored.dtype.itemsize if stored.dtype else itemsize)
        for stored in form.format.stored(shape, form)
    )


def stored_elements(shape: GroupShape, form: Form) -> int:
    """Elements of a group's stored tensors."""
    return sum(prod(stored.shape) for stored in form.format.stored(shape, form))


def budget_bytes(shape: GroupShape, config: CompressConfig, itemsize: int) -> int:
    """Bytes that a group may take: a share of those that it would take dense, or so many bits per weight."""
    return int(keep_ratio_of(shape.owner, config, itemsize) * shape.numel * itemsize)


def keep_ratio_of(layer: str, config: CompressConfig, itemsize: int) -> float:
    """The share of its bytes that a layer may keep, at most 1.

    Args:
        itemsize: bytes of an element of the emulator's own dtype, which turns `bits_per_weight` into a share.
    """
    ratio = match_pattern(config.keep_ratio_pattern, layer)
    if ratio is not None:
        return ratio
    sized = with_size(config)
    if sized.bits_per_weight is not None:
        return min(1.0, sized.bits_per_weight / (8 * itemsize))
    return DEFAULT_KEEP_RATIO if sized.keep_ratio is None else sized.keep_ratio


@dataclass(frozen=True)
class FormatEntry:
    """A format as a plugin registers it, without importing it.

    Attributes:
        name: for example `low_rank`; compress's option `format`.
        summary: one line.
        target: `module:attribute` of the `LayerFormat` object or class.
        plugin: filled in by core.
    """

    name: str
    summary: str
    target: str
    plugin: str = ""

    def load(self) -> LayerFormat:
        """Import the format."""
        return cast(LayerFormat, imported(self.target))

    def owned_by(self, plugin: str) -> "FormatEntry":
        """The same entry with its plugin's name."""
        return replace(self, plugin=plugin)


CORE_FORMATS = (
    FormatEntry(
        LOW_RANK_FORMAT, "the product of two factors", "emloc.formats.low_rank:LOW_RANK", "emloc"
    ),
    FormatEntry(
        "trellis",
        "codes of 1 to 4 bits, each decoded with those before it, chosen for the data",
        "emloc.formats.trellis:TRELLIS",
        "emloc",
    ),
    FormatEntry(
        "trellis_residual",
        "the same, and a product of two factors for what is lost",
        "emloc.formats.trellis_residual:TRELLIS_RESIDUAL",
        "emloc",
    ),
    FormatEntry(
        "quantized",
        "integers of 2, 3, 4 or 8 bits, rounded for the data",
        "emloc.formats.quantized:QUANTIZED",
        "emloc",
    ),
    FormatEntry(
        "quantized_residual",
        "the same, and a product of two factors for what is lost",
        "emloc.formats.quantized_residual:QUANTIZED_RESIDUAL",
        "emloc",
    ),
    FormatEntry(
        "coded_low_rank",
        "the product of two factors in few bits",
        "emloc.formats.coded_low_rank:CODED_LOW_RANK",
        "emloc",
    ),
    FormatEntry(
        "nf4",
        "QLoRA's 4 bits (bitsandbytes)",
        "emloc.integrations.bitsandbytes.nf4_format:NF4_FORMAT",
        "emloc",
    ),
)
