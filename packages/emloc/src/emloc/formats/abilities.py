"""Abilities that some formats have."""

from typing import Protocol, runtime_checkable

import torch

from emloc.formats.layer_format import Form, GroupShape


@runtime_checkable
class Cuttable(Protocol):
    """A `LayerFormat` whose form can be made smaller after it was fitted.

    The tensors of a smaller size are the leading parts of a larger one's along every axis, and a fitted
    group has a `Spectrum` over that size.

    Attributes:
        unit: the key of `Form.sizes` that counts what can be left out.
    """

    unit: str

    def span(self, shape: GroupShape, form: Form) -> tuple[int, int]:
        """Least and largest size that allocation may give a group in place of `form`'s."""
        ...

    def unit_cost(self, shape: GroupShape) -> int:
        """Parameters of one unit."""
        ...


@runtime_checkable
class TwoProducts(Protocol):
    """A `LayerFormat` whose modules make two products, the first of which a group shares."""

    def inner(self, form: Form) -> int:
        """Numbers per token between the two products."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """A `LayerFormat` whose fit has something to get ready, which takes memory that no layer does."""

    def prepare(self, device: torch.device) -> None:
        """Get it ready, before memory is measured or limited.

        Args:
            device: that layers are fitted on.
        """
        ...


@runtime_checkable
class WeighsRows(Protocol):
    """A `LayerFormat` whose fit heeds how much the loss minds errors of each output (`Moments.rows`)."""

    weighs_rows: bool
