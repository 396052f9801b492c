"""Low-rank convolutions with values of their own, and dense ones that equal them."""

import torch
from torch import nn

from emloc.layers.low_rank_conv import LowRankConv2d


def filled(dense, rank=3, seed=0):
    """A low-rank layer of the dense one's sizes, with values of its own."""
    layer = LowRankConv2d.like(dense, rank)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        fan_in = max(1, parameter[0].numel())
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(values / fan_in**0.5)
    return layer


def dense_twin(layer):
    """An `nn.Conv2d` of the same values."""
    twin = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, bias=layer.bias is not None, padding_mode=layer.padding_mode,
        dtype=layer.left.dtype,
    )  # fmt: skip
    with torch.no_grad():
        twin.weight.copy_(layer.weight.data)
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin
