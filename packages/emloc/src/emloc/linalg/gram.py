"""Second moments of what a layer reads or writes, summed over calibration tokens.

The best rank-k stand-in for a weight `W` (d_out × d_in) depends on the data only through
`W G Wᵀ`, `G = Σ x xᵀ` (EMLoC, arXiv 2506.12015, section 3.2). Since `W G Wᵀ = Σ (Wx)(Wx)ᵀ`, one
may sum over outputs instead of inputs; `Moments` keeps whichever matrix is smaller, so a
convolution with d_in = 9 × channels or a wide-to-narrow projection costs d_out² and not d_in².

Precision: tokens are folded in float32, float64 if the activations are float64.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emloc.errors import NumericalError
from emloc.linalg.row_weights import RowWeights
from emloc.linalg.symmetric import add_gram, mirror_upper

Side = Literal["input", "output"]


def smaller_side(d_out: int, d_in: int) -> Side:
    """The side whose moments are the smaller matrix; outputs on a tie, as they are `W G Wᵀ` itself."""
    return "output" if d_out <= d_in else "input"


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that moments of `dtype` activations are summed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Moments:
    """The running sum `Σ t tᵀ` over tokens `t` of one side of a layer.

    Args:
        side: whether the tokens are the layer's inputs or its outputs without the bias.
        name: the layer or group of layers, for messages.

    Attributes:
        derived: what was computed from the sum and is of use again; empty after another token.
        rows: how much the loss minds errors of what is fitted next; None: of all outputs alike.
    """

    side: Side
    name: str
    tokens: int = 0
    derived: dict[str, Any] = field(default_factory=dict[str, Any])
    rows: RowWeights | None = None
    _upper: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    _mirrored: bool = True

    @classmethod
    def of_matrix(cls, side: Side, name: str, matrix: Tensor, tokens: int) -> "Moments":
        """A sum that is known, d × d."""
        return cls(side, name, tokens, _upper=matrix)

    def fold(self, values: Float[Tensor, "tokens d"]) -> None:
        """Add tokens, one per row; padding must have been taken out before.

        Raises:
            NumericalError: a value is NaN or infinite.
        """
        values = values.to(moment_dtype(values.dtype))
        if self._upper.numel() == 0:
            self._upper = values.new_zeros(values.shape[1], values.shape[1])
        add_gram(self._upper, values)
        self._mirrored = False
        self.derived.clear()
        # An overflow or a NaN anywhere in a token reaches the diagonal.
        if not bool(torch.isfinite(self._upper.diagonal()).all()):
            raise NumericalError(
                f"Layer {self.name}: its {self.side}s hold NaN or infinity on the calibration data; "
                f"check the base model's weights (emloc verify) and its dtype."
            )
        self.tokens += values.shape[0]

    def for_layer(self, number: int) -> "Moments":
        """The same sum for one layer of a stack, with the weights of its outputs alone."""
        if self.rows is None:
            return self
        own = self.of_matrix(self.side, self.name, self.matrix, self.tokens)
        own.derived, own.rows = self.derived, self.rows.of_layer(number)
        return own

    @property
    def matrix(self) -> Tensor:
        """The sum, d × d, symmetric; 0 × 0 before the first token."""
        if not self._mirrored:
            mirror_upper(self._upper)
            self._mirrored = True
        return self._upper
