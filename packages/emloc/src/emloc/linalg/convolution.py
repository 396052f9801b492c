"""A convolution as a matrix.

A kernel of d_out × channels × height × width, flattened, is a matrix whose inputs are the patches that
it reads. A rank-k stand-in is then a convolution of the same kernel size to k channels (the right factor)
and one of 1 × 1 to the outputs (the left factor); a LoRA on it has the same two parts (A and B).
"""

from collections.abc import Sequence

from torch import Tensor

Size = tuple[int, ...]


def as_matrix(weight: Tensor) -> Tensor:
    """A linear layer's weight as it is, a convolution's as d_out × patch."""
    return weight.flatten(1) if weight.ndim > 2 else weight


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Shape of `as_matrix` of a weight of that shape."""
    d_in = 1
    for size in shape[1:]:
        d_in *= size
    return shape[0], d_in


def right_shape(weight: Sequence[int], rank: int) -> Size:
    """The shape in which the right factor (or A) of a weight of that shape is stored."""
    return (rank, *weight[1:])


def left_shape(weight: Sequence[int], rank: int) -> Size:
    """The shape in which the left factor (or B) of a weight of that shape is stored."""
    return (weight[0], rank, *(1 for _ in weight[2:]))


def channels_last(output: Tensor) -> Tensor:
    """The output of a convolution (… × channels × height × width), one pixel per row."""
    return output.movedim(-3, -1).flatten(0, -2)
