"""A format of a third party: weights rounded to bfloat16."""

import math

import torch
from torch import nn

import emloc
from emloc.formats.layer_format import (
    Fitted,
    Form,
    FormatEntry,
    StoredTensor,
    budget_bytes,
    tensor_bytes,
)
from emloc.layers.emulated_layer import EmulatedLayer
from emloc.layers.remade_weight import remade_linear
from emloc.linalg.convolution import as_matrix
from emloc.linalg.operator import Matrix

NAME = "rounded"


class RoundedLinear(EmulatedLayer, nn.Linear):
    def __init__(self, dense):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.made_in = dense.d_in, dense.d_out, dense.dtype

        def empty(*size, dtype):
            made = torch.empty(*size, dtype=dtype, device=dense.device)
            return nn.Parameter(made, requires_grad=False)

        self.rounded = empty(dense.d_out, dense.d_in, dtype=torch.bfloat16)
        self.bias = empty(dense.d_out, dtype=dense.dtype) if dense.bias else None

    @property
    def weight(self):
        return self.rounded.to(self.made_in)

    def forward(self, x):
        return remade_linear(x, lambda rounded: rounded.to(x.dtype), self.bias, self.rounded)


class Rounded:
    name, options, size_names = NAME, (), ()

    def side(self, shape):
        return "output" if shape.kernel else "input"

    def decide(self, shape, config, itemsize):
        form = Form(self)
        fits = tensor_bytes(shape, form, itemsize) <= budget_bytes(shape, config, itemsize)
        return form if fits else "16 bits are more than its share"

    def fit(self, weights, moments, shape, form):
        tensors = {
            (stored.layer, stored.name): weight.bfloat16().reshape(stored.shape)
            for stored, weight in zip(self.stored(shape, form), weights)
        }
        return Fitted(tensors, {"tokens_seen": moments.tokens})

    def stored(self, shape, form):
        sizes = zip(shape.layers, shape.d_out)
        return [StoredTensor(n, NAME, shape.weight_shape(d), torch.bfloat16) for n, d in sizes]

    def operator(self, shape, form, layer, read):
        return Matrix(as_matrix(read(layer, NAME)))

    def modules(self, layers, form):
        return [RoundedLinear(layer) for layer in layers]

    def fitting_bytes(self, shape, form, itemsize):
        return tensor_bytes(shape, form, itemsize)

    def running_bytes(self, shape, form, itemsize):
        return max(math.prod(stored.shape) for stored in self.stored(shape, form)) * itemsize


@emloc.hookimpl
def emloc_register_formats():
    return [FormatEntry(NAME, "weights in bfloat16", f"{__name__}:Rounded")]
