"""Layers in few bits: values and gradients against the dense weight that their codes stand for."""

import pytest
import torch

from emloc.layers import coded_weight
from emloc.layers.coded_weight import CodedWeight
from emloc.layers.remade_weight import remade_convolution, remade_linear
from emloc.linalg.bit_packing import pack
from emloc.linalg.grid import ZERO_BITS, choose_grid


def coded(rows, columns, bits, group_size):
    torch.manual_seed(rows + columns)
    weight = torch.randn(rows, columns)
    grid = choose_grid(weight, torch.ones(columns), bits, group_size)
    codes = torch.randint(0, grid.levels + 1, weight.shape)
    zeros = pack(grid.zero_codes, ZERO_BITS)
    largest = grid.largest.view(torch.int32)
    packed = CodedWeight(
        pack(codes, bits), grid.scale_codes, largest, zeros, columns, bits, group_size
    )
    return packed, grid.values(codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 32), (577, 128), (20, 32), (576, 128)])
def test_codes_are_decoded_to_their_values(bits, columns, group_size, monkeypatch):
    monkeypatch.setitem(coded_weight.ELEMENTS, "cpu", 5 * columns)  # several rounds
    packed, dense = coded(13, columns, bits, group_size)
    assert torch.equal(packed.dense(torch.float32), dense)
    assert torch.equal(packed.dense(torch.bfloat16), dense.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_and_gradients_are_the_dense_ones(dtype):
    packed, dense = coded(24, 70, 3, 32)
    x = torch.randn(2, 9, 70, dtype=dtype, requires_grad=True)
    bias = torch.randn(24, dtype=dtype)
    y = remade_linear(x, lambda codes: packed.dense(x.dtype), bias, packed.packed)
    y.backward(given := torch.randn_like(y))
    other = x.detach().clone().requires_grad_()
    expected = torch.nn.functional.linear(other, dense.to(dtype), bias)
    expected.backward(given)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("options", [(1, 1, 1), (2, 0, 1), ((1, 2), (2, 1), (1, 2))])
def test_convolutions_and_gradients_are_the_dense_ones(options):
    packed, dense = coded(6, 5 * 9, 4, 32)
    kernel = dense.view(6, 5, 3, 3)
    x = torch.randn(2, 5, 9, 11, requires_grad=True)
    y = remade_convolution(
        x, lambda codes: packed.dense(x.dtype).view(kernel.shape), None, options, packed.packed
    )
    y.backward(given := torch.randn_like(y))
    other = x.detach().clone().requires_grad_()
    torch.nn.functional.conv2d(other, kernel, None, *options).backward(given)
    torch.testing.assert_close(x.grad, other.grad)


def test_between_forward_and_backward_no_dense_weight_is_held():
    packed, _ = coded(64, 512, 4, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(3, 512, requires_grad=True)
        remade_linear(x, lambda codes: packed.dense(x.dtype), None, packed.packed)
    assert [tensor.dtype for tensor in kept] == [torch.uint8]


def test_products_with_columns_need_no_dense_weight():
    packed, dense = coded(30, 90, 4, 32)
    columns = torch.randn(90, 4, dtype=torch.float64)
    torch.testing.assert_close(packed @ columns, dense.double() @ columns)
