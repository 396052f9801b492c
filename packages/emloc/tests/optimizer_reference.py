"""The bytes that an optimiser holds, counted."""

import torch

OPTIMISED = [(7, 30), (40, 7), (12, 1)]
"""Shapes of trained parameters."""


def held_after_a_step(optimizer, parameters):
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
