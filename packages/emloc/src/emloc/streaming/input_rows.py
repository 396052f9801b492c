"""The rows that a layer reads: tokens, or the patches of a convolution; padding left out."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emloc.streaming.real_rows import real_rows


def input_rows(
    module: nn.Module, inputs: Tensor, output: Tensor, mask: Tensor | None, what: str
) -> Iterator[Tensor]:
    """Rows × d_in of a layer's input, in parts; of a convolution one image after another, as its patches
    are several times as large.

    Args:
        mask: true where a row is real; None where all are.
        what: what reads the input, for messages.

    Raises:
        ConfigError: the mask is of another shape than the input.
    """
    if not isinstance(module, nn.Conv2d):
        yield real_rows(inputs, mask, what)
        return
    for each, image in enumerate(inputs):
        rows = patches(module, image, tuple(output.shape[-2:]))
        yield real_rows(rows[None], None if mask is None else mask[each : each + 1], what)


def patches(convolution: Any, image: Tensor, size: tuple[int, ...]) -> Tensor:
    """The patches that a convolution reads, height' × width' × (channels · kernel).

    Args:
        image: channels × height × width.
        size: height' and width' of its output.
    """
    padding, mode = convolution._reversed_padding_repeated_twice, convolution.padding_mode
    if any(padding):
        how = "constant" if mode == "zeros" else mode
        image = torch.nn.functional.pad(image[None], padding, how)[0]
    read = torch.nn.functional.unfold(
        image[None], convolution.kernel_size, convolution.dilation, 0, convolution.stride
    )
    return read[0].T.reshape(*size, -1)
