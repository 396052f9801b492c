"""A weight as the product of two factors of few bits: the products of low rank at a quarter of its bytes.

Every layer has factors of its own (`emloc.formats.factor_pair`), also where others read the same input. A
convolution is factorised as a matrix of patches.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from emloc.formats.coded_layers import layer_tensors
from emloc.formats.factor_pair import FactorPair
from emloc.formats.layer_format import (
    DenseLayer,
    Fitted,
    Form,
    GroupShape,
    Read,
    StoredTensor,
    budget_bytes,
    keep_ratio_of,
    tensor_bytes,
)
from emloc.formats.low_rank_bytes import factorise_bytes
from emloc.layers.coded_low_rank import CodedLowRankConv2d, CodedLowRankLinear
from emloc.linalg.finite import refuse_not_finite
from emloc.linalg.gram import Moments, Side
from emloc.linalg.operator import Operator
from emloc.linalg.rounding import Feedback, squared_output
from emloc.options.compress import FACTOR_BITS, CompressConfig
from emloc.options.patterns import match_pattern

RANK, BITS = "rank", "factor_bits"
SIZES: tuple[str, ...] = (RANK, BITS)

CODED_BITS = tuple(bits for bits in FACTOR_BITS if bits < 16)


class CodedLowRank:
    """`LayerFormat`, and `TwoProducts`."""

    name = "coded_low_rank"
    options: tuple[str, ...] = ("rank_pattern", "factor_bits")
    size_names: tuple[str, ...] = SIZES

    def side(self, shape: GroupShape) -> Side:
        """The input's, for which the right factor is rounded."""
        return "input"

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """The rank that was asked for, or the largest within the budget; 4 bits unless others were."""
        bits = config.factor_bits if config.factor_bits in CODED_BITS else CODED_BITS[0]
        most = min(*shape.d_out, shape.d_in)
        explicit = match_pattern(config.rank_pattern, shape.owner)
        if explicit is not None:
            return self._form(min(explicit, most), bits)
        if keep_ratio_of(shape.owner, config, itemsize) == 1:
            return "keep_ratio 1"
        budget = budget_bytes(shape, config, itemsize)
        least, beyond = 0, most + 1  # the largest rank within the budget lies in [least, beyond)
        while beyond - least > 1:
            middle = (least + beyond) // 2
            fits = tensor_bytes(shape, self._form(middle, bits), itemsize) <= budget
            least, beyond = (middle, beyond) if fits else (least, middle)
        return self._form(least, bits) if least else "rank 1 is more than its share"

    def fit(
        self, weights: Sequence[Tensor], moments: Moments, shape: GroupShape, form: Form
    ) -> Fitted:
        """See `FactorPair.fit`.

        Raises:
            NumericalError: a weight holds NaN or infinity.
        """
        refuse_not_finite(moments.name, weights)
        feedback, changed, whole = Feedback.of(moments), 0.0, 0.0
        tensors: dict[tuple[str, str], Tensor] = {}
        for layer, weight in zip(shape.layers, weights):
            pair = self._pair(len(weight), shape.d_in, form)
            stored = pair.fit(weight.float(), moments, feedback)
            product = pair.operator(stored.__getitem__).dense(weight.dtype)
            changed += squared_output(weight - product, moments.matrix)
            whole += squared_output(weight, moments.matrix)
            tensors.update({(layer, name): tensor for name, tensor in stored.items()})
        return Fitted(tensors, {"relative_error": (changed / whole) ** 0.5 if whole > 0 else 0.0})

    def stored(self, shape: GroupShape, form: Form) -> Sequence[StoredTensor]:
        """Codes, scales and zeros of each layer's factors."""
        return layer_tensors(shape, lambda d_out: self._pair(d_out, shape.d_in, form).stored())

    def operator(self, shape: GroupShape, form: Form, layer: str, read: Read) -> Operator:
        """Two products."""
        pair = self._pair(shape.d_out[shape.layers.index(layer)], shape.d_in, form)
        return pair.operator(lambda name: read(layer, name))

    def modules(self, layers: Sequence[DenseLayer], form: Form) -> Sequence[nn.Module]:
        """A `CodedLowRankLinear` or `CodedLowRankConv2d` for each."""
        return [self._module(layer, form) for layer in layers]

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """The carried errors, both factors, and the greater of factorising and rounding the larger one."""
        square, rank, rows = shape.d_in**2, form.sizes[RANK], max(shape.d_out)
        one = GroupShape(shape.layers[:1], (rows,), shape.d_in, shape.kernel)
        factors = 4 * rank * (rows + shape.d_in)
        held = 4 * square + 2 * factors + 8 * rows * shape.d_in
        rounding = max(16 * square, 26 * rank * max(rows, shape.d_in))
        factorising = factorise_bytes("input", one, rank, 4)
        return held + max(rounding, factorising) + tensor_bytes(shape, form, itemsize)

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """The larger factor, and the numbers between the products are counted as outputs."""
        return form.sizes[RANK] * max(*shape.d_out, shape.d_in) * itemsize

    def inner(self, form: Form) -> int:
        """The rank."""
        return form.sizes[RANK]

    def _form(self, rank: int, bits: int) -> Form:
        return Form(self, {RANK: rank, BITS: bits})

    def _pair(self, d_out: int, d_in: int, form: Form) -> FactorPair:
        return FactorPair(d_out, d_in, form.sizes[RANK], form.sizes[BITS])

    def _module(self, layer: DenseLayer, form: Form) -> nn.Module:
        pair = self._pair(layer.d_out, layer.d_in, form)
        tensors, shown = dict(pair.stored()), f"rank={pair.rank}, factor_bits={pair.bits}"
        if layer.convolution is not None:
            return CodedLowRankConv2d(layer.convolution, tensors, pair.operator, shown)
        return CodedLowRankLinear(
            layer.d_in, layer.d_out, layer.bias, tensors, pair.operator, shown, layer.dtype,
            layer.device,
        )  # fmt: skip


CODED_LOW_RANK = CodedLowRank()
