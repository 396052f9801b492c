"""A weight as the product of two factors, of a rank that its bytes buy (`emloc.linalg.lowrank`).

Layers of a group share the right factor, stored with the first of them. A convolution's factors have
four axes (`emloc.linalg.convolution`).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from emloc.errors import MismatchError
from emloc.formats.coded_low_rank import CODED_BITS, CODED_LOW_RANK
from emloc.formats.layer_format import (
    DenseLayer,
    Fitted,
    Form,
    GroupShape,
    Read,
    Spectrum,
    StoredTensor,
    keep_ratio_of,
)
from emloc.formats.low_rank_bytes import factorise_bytes
from emloc.formats.low_rank_sizes import decide, rank_range
from emloc.layers.low_rank_conv import LowRankConv2d
from emloc.layers.low_rank_linear import LowRankLinear
from emloc.linalg.convolution import as_matrix, left_shape, right_shape
from emloc.linalg.gram import Moments, Side, smaller_side
from emloc.linalg.lowrank import factorise
from emloc.linalg.operator import Operator, Product
from emloc.options.compress import LOW_RANK_FORMAT, CompressConfig

RANK = "rank"
LEFT, RIGHT = "left", "right"


class LowRank:
    """`LayerFormat`, and `Cuttable`, `TwoProducts` and `WeighsRows`."""

    name = LOW_RANK_FORMAT
    options: tuple[str, ...] = ("rank_pattern", "factor_bits")
    size_names: tuple[str, ...] = (RANK,)
    unit = RANK
    weighs_rows = True

    def side(self, shape: GroupShape) -> Side:
        """The smaller one of a single layer.

        Outputs of several layers would have to be computed once more, so they must be few to pay. A
        convolution's inputs overlap and would have to be cut into patches; its outputs are there.
        """
        if shape.kernel:
            return "output"
        if len(shape.layers) > 1:
            return "output" if 2 * shape.rows < shape.d_in else "input"
        return smaller_side(shape.rows, shape.d_in)

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """A rank; factors of few bits are a format of their own."""
        if config.factor_bits in CODED_BITS:
            return CODED_LOW_RANK.decide(shape, config, itemsize)
        decision = decide(
            shape.owner,
            shape.rows,
            shape.d_in,
            keep_ratio_of(shape.owner, config, itemsize),
            config.rank_pattern,
        )
        return decision.reason if decision.rank is None else low_rank(decision.rank)

    def fit(
        self, weights: Sequence[Tensor], moments: Moments, shape: GroupShape, form: Form
    ) -> Fitted:
        """See `emloc.linalg.lowrank`."""
        fitting = factorise(weights, moments, form.sizes[RANK])
        right, *lefts = (stored.shape for stored in self.stored(shape, form))
        parts = fitting.left.split(list(shape.d_out))
        tensors = {(shape.owner, RIGHT): fitting.right.reshape(right)}
        for layer, part, left in zip(shape.layers, parts, lefts):
            tensors[layer, LEFT] = part.reshape(left)
        report = {"relative_error": fitting.relative_error, "estimated_excess": fitting.excess}
        return Fitted(tensors, report, Spectrum(fitting.values.tolist(), fitting.total))

    def stored(self, shape: GroupShape, form: Form) -> Sequence[StoredTensor]:
        """The shared right factor, and the layers' left ones."""
        rank = form.sizes[RANK]
        right = right_shape(shape.weight_shape(shape.d_out[0]), rank)
        lefts = [left_shape(shape.weight_shape(d_out), rank) for d_out in shape.d_out]
        return [
            StoredTensor(shape.owner, RIGHT, right),
            *(StoredTensor(layer, LEFT, left) for layer, left in zip(shape.layers, lefts)),
        ]

    def operator(self, shape: GroupShape, form: Form, layer: str, read: Read) -> Operator:
        """Two products."""
        return Product(as_matrix(read(layer, LEFT)), as_matrix(read(shape.owner, RIGHT)))

    def modules(self, layers: Sequence[DenseLayer], form: Form) -> Sequence[nn.Module]:
        """`LowRankLinear`s that share a right factor, or one `LowRankConv2d`."""
        rank, made, shared = form.sizes[RANK], list[nn.Module](), None
        for layer in layers:
            if layer.convolution is not None and len(layers) > 1:
                raise MismatchError(
                    f"The emulator's config lets the convolution {layer.name} share a right factor with "
                    f"{len(layers) - 1} other layers, but only linear layers can; compress the base model "
                    f"again."
                )
            if layer.convolution is not None:
                return [LowRankConv2d.like(layer.convolution, rank)]
            module = LowRankLinear(
                layer.d_in, layer.d_out, rank, layer.bias, layer.dtype, layer.device,
                shared=shared, group_size=len(layers),
            )  # fmt: skip
            shared = module.shared
            made.append(module)
        return made

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """See `factorise_bytes`."""
        return factorise_bytes(self.side(shape), shape, form.sizes[RANK], itemsize)

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """Nothing: factors are multiplied as they are stored."""
        return 0

    def span(self, shape: GroupShape, form: Form) -> tuple[int, int]:
        """See `Cuttable`."""
        return rank_range(form.sizes[RANK], shape.rows, shape.d_in)

    def unit_cost(self, shape: GroupShape) -> int:
        """A column of each left factor and a row of the right one."""
        return shape.rows + shape.d_in

    def inner(self, form: Form) -> int:
        """The rank."""
        return form.sizes[RANK]


LOW_RANK = LowRank()


def low_rank(rank: int) -> Form:
    """Factors of that rank."""
    return Form(LOW_RANK, {RANK: rank})
