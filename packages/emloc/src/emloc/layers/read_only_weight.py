"""The weight of an emulated layer as a tensor whose values are made only where they are read.

Libraries that know dense layers ask a weight for its shape, dtype and device many times, for its values
seldom, and to be written only when an adapter is merged into it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

READ_ONLY = (
    "This layer belongs to an emulator: its weight is computed from what is stored and cannot be written. "
    "To merge, correct the adapter (emloc correct) and merge it into the original model; for PiSSA or "
    "OLoRA, train with emloc (lora_init)."
)


def _is_of_rows(given: Sequence[Any]) -> bool:
    """Return whether a slice's arguments (axis, start, stop, step) mean neighbouring rows."""
    axis, step = [*given, 0][0], [*given, *(None,) * 4][3]
    return axis == 0 and step in (None, 1)


class ReadOnlyWeight(torch.Tensor):
    """A weight with shape, dtype and device, whose values are made when an operation needs them.

    PEFT asks weights for their dtype and device many times per layer; at the size of a large model making
    each would take a second. Writing to it would be lost without a word, so it is refused.
    """

    make: Callable[[], Tensor]
    rows: "Callable[[Tensor], Tensor] | None"

    @staticmethod
    def __new__(
        cls: Any,
        make: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        rows: "Callable[[Tensor], Tensor] | None" = None,
    ) -> "ReadOnlyWeight":
        """A tensor without values.

        Args:
            make: gives the values, in as many elements as `shape` has.
            rows: gives the values of some rows (one axis of whole numbers), of a matrix in which they are
                looked up, or that is read in tiles of neighbouring rows.
        """
        made: ReadOnlyWeight = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device
        )
        made.make, made.rows = make, rows
        # By this transformers knows, also in the parent's initialisation, not to draw values.
        made._is_hf_initialized = True  # pyright: ignore
        return made

    @classmethod
    def of_product(
        cls, left: Tensor, right: Tensor, shape: Sequence[int] | None = None
    ) -> "ReadOnlyWeight":
        """`left @ right`.

        Args:
            left: d_out × rank; axes of size 1 may follow.
            right: rank × d_in; d_in may be several axes, as in a convolution.
            shape: of the weight; None: d_out × d_in.
        """
        made = tuple(shape or (left.shape[0], right.shape[1]))
        return cls(lambda: left.flatten(1) @ right.flatten(1), made, left.dtype, left.device)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError(READ_ONLY)

        def product(value: Any) -> Any:
            return value.product() if isinstance(value, cls) else value

        if func is torch.ops.aten.detach.default:
            held = args[0]
            return cls(held.make, held.shape, held.dtype, held.device, held.rows)
        if isinstance(args[0], cls) and args[0].rows is not None:
            if func is torch.ops.aten.embedding.default:
                return args[0].rows(args[1].reshape(-1)).view(*args[1].shape, args[0].shape[1])
            if func is torch.ops.aten.slice.Tensor and not kwargs and _is_of_rows(args[1:]):
                return args[0].between(*args[2:4])
        return func(*tree_map(product, args), **tree_map(product, kwargs or {}))

    def between(self, start: int | None = None, stop: int | None = None) -> "ReadOnlyWeight":
        """The weight of neighbouring rows, of which alone the values are made; as Python slices."""
        rows = self.rows
        assert rows is not None
        first, last, _ = slice(start, stop).indices(self.shape[0])
        last, device = max(first, last), self.device

        def make() -> Tensor:
            return rows(torch.arange(first, last, device=device))

        def some(index: Tensor) -> Tensor:
            return rows(index + first)

        shape = (last - first, *self.shape[1:])
        return ReadOnlyWeight(make, shape, self.dtype, device, some)

    def product(self) -> Tensor:
        """The values, as a plain tensor of this shape."""
        return self.make().view(self.shape)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"ReadOnlyWeight({tuple(self.shape)}, {self.dtype})"

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """A plain copy, for reading."""
        with torch.no_grad():
            return self.product().data  # autograd refuses to change a view made here in place

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(READ_ONLY)
