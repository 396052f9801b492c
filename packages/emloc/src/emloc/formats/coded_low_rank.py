"""A weight as the product of two factors of few bits: the products of low rank at a quarter of its bytes.

Every layer has factors of its own (`emloc.formats.factor_pair`), also where others read the same input. A
convolution is factorised as a matrix of patches.
"""

from collections.abc import Mapping

from torch import Tensor

from emloc.errors import ConfigError
from emloc.formats.coded_layers import LayerByLayer
from emloc.formats.factor_pair import FactorPair
from emloc.formats.layer_format import Form, GroupShape, budget_bytes, keep_ratio_of, tensor_bytes
from emloc.formats.low_rank_bytes import factorise_bytes
from emloc.layers.coded_low_rank import CodedLowRankConv2d, CodedLowRankLinear
from emloc.linalg.gram import Moments
from emloc.linalg.refinement import fitted_bytes
from emloc.options.compress import FACTOR_BITS, CompressConfig
from emloc.options.patterns import match_pattern

RANK, BITS = "rank", "factor_bits"
SIZES: tuple[str, ...] = (RANK, BITS)

CODED_BITS = tuple(bits for bits in FACTOR_BITS if bits < 16)


class CodedLowRank(LayerByLayer):
    """`LayerFormat`, `TwoProducts` and `WeighsRows`."""

    linear = CodedLowRankLinear
    convolution = CodedLowRankConv2d

    name = "coded_low_rank"
    weighs_rows = True
    options: tuple[str, ...] = ("rank_pattern", "factor_bits")
    size_names: tuple[str, ...] = SIZES

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """The rank that was asked for, or the largest within the budget; 4 bits unless others were.

        Raises:
            ConfigError: factors of 16 bits, which `low_rank` has.
        """
        bits = config.factor_bits or CODED_BITS[0]
        if bits not in CODED_BITS:
            raise ConfigError(
                f"format={self.name} has factors of 4 or 8 bits; for {bits} pass format=low_rank."
            )
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

    def layout(self, d_out: int, d_in: int, form: Form) -> FactorPair:
        """Codes, scales and zeros of both factors.

        Raises:
            MismatchError: there are no factors of these sizes.
        """
        return FactorPair.known(d_out, d_in, form.sizes[RANK], form.sizes[BITS])

    def fit_layer(
        self, weight: Tensor, moments: Moments, form: Form
    ) -> tuple[Mapping[str, Tensor], float]:
        """See `FactorPair.fit`."""
        layout = self.layout(weight.shape[0], weight.shape[1], form)
        return self.with_cost(weight, moments, form, layout.fit(weight.float(), moments))

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """Shares that are carried on, both factors, and factorising or rounding the larger one."""
        square, rank, rows = shape.d_in**2, form.sizes[RANK], max(shape.d_out)
        one = GroupShape(shape.layers[:1], (rows,), shape.d_in, shape.kernel)
        factors = 4 * rank * (rows + shape.d_in)
        held = 4 * square + 2 * factors + 8 * rows * shape.d_in
        rounding = max(fitted_bytes(rank, shape.d_in) - 4 * square, fitted_bytes(rows, rank))
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


CODED_LOW_RANK = CodedLowRank()
