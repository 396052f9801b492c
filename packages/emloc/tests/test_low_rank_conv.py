"""The low-rank convolution against the dense one in float64."""

import copy

import pytest
import torch
from convolution_reference import dense_twin, filled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import conv2d, pad

from emloc.errors import ConfigError
from emloc.layers.low_rank_conv import LowRankConv2d

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def product(layer):
    left, right = layer.left.double().flatten(1), layer.right.double().flatten(1)
    return (left @ right).view(layer.out_channels, layer.in_channels, *layer.kernel_size)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    kernel=st.tuples(*[st.integers(1, 3)] * 2),
    stride=st.tuples(*[st.integers(1, 3)] * 2),
    padding=st.tuples(*[st.integers(0, 2)] * 2),
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    bias=st.booleans(),
    dtype=st.sampled_from(sorted(TOLERANCES, key=str)),
    seed=st.integers(0, 10**6),
)
def test_is_the_dense_convolution(sizes, kernel, stride, padding, dilation, bias, dtype, seed):
    d_in, d_out, rank = sizes
    dense = nn.Conv2d(d_in, d_out, kernel, stride, padding, dilation, bias=bias, dtype=dtype)
    layer = filled(dense, rank, seed)
    x = torch.randn(2, d_in, 7, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = conv2d(
        x.double(), product(layer), None if layer.bias is None else layer.bias.double(),
        stride, padding, dilation,
    )  # fmt: skip
    ours = layer(x)
    assert ours.dtype == dtype
    torch.testing.assert_close(
        ours.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * (1 + rank)
    )


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode):
    dense = nn.Conv2d(3, 5, (3, 2), padding=(1, 2), padding_mode=mode, dtype=torch.float64)
    layer = filled(dense)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    expected = conv2d(pad(x, (2, 2, 1, 1), mode=mode), product(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_same_padding_by_name():
    layer = filled(nn.Conv2d(3, 5, 3, padding="same", dtype=torch.float64))
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv2d(x, product(layer), layer.bias, padding="same"))


def test_gradients_of_the_input_and_frozen_factors():
    layer = filled(nn.Conv2d(3, 5, 3, 2, 1, dtype=torch.float64))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).sin().sum(), x)[0],
        torch.autograd.grad(dense_twin(layer)(x).sin().sum(), x)[0],
    )


def test_weight_knows_its_shape_and_refuses_to_be_written():
    layer = filled(nn.Conv2d(3, 5, (3, 2), dtype=torch.float64))
    weight = layer.weight
    assert weight.shape == weight.detach().shape == (5, 3, 3, 2)
    assert "(5, 3, 3, 2)" in repr(weight)
    assert "rank=3" in repr(layer)
    torch.testing.assert_close(weight.data, product(layer))
    torch.testing.assert_close(weight * 1, product(layer))
    torch.testing.assert_close(weight.detach() + 0, product(layer))
    for write in (
        lambda: weight.add_(1),
        lambda: weight.zero_(),
        lambda: setattr(weight, "data", torch.zeros(5, 3, 3, 2)),
    ):
        with pytest.raises(RuntimeError, match="cannot be written"):
            write()
    assert sorted(layer.state_dict()) == ["bias", "left", "right"]


def test_groups_are_refused():
    with pytest.raises(ConfigError, match="2 groups"):
        LowRankConv2d.like(nn.Conv2d(4, 6, 3, groups=2), 2)


def test_copies_meta_and_casts():
    layer = filled(nn.Conv2d(3, 5, 3, padding=1))
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 3, 4, 5)
    torch.testing.assert_close(twin(x), layer(x))
    assert twin.left.data_ptr() != layer.left.data_ptr()
    assert twin.bfloat16().weight.dtype == torch.bfloat16
    empty = LowRankConv2d.like(nn.Conv2d(3, 5, 3, device="meta", dtype=torch.float16), 2)
    assert empty.weight.device.type == "meta"
    assert {parameter.dtype for parameter in empty.parameters()} == {torch.float16}


def test_channels_last():
    layer = filled(nn.Conv2d(6, 5, 3, padding=1, dtype=torch.float64))
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    before = layer(x)
    layer.to(memory_format=torch.channels_last)
    assert layer.right.is_contiguous(memory_format=torch.channels_last)
    after = layer(x.to(memory_format=torch.channels_last))
    assert after.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(layer.weight.data, product(layer))
