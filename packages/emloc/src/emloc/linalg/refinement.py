"""Improve a rounded weight: codes one input at a time, and scales one group at a time.

Rounding with feedback (`emloc.linalg.rounding`) lets later inputs make up for earlier ones and never looks
back. With all others fixed, the cost `e G eᵀ` of a row's error `e` is least where

    the code of input k is the nearest to         q_k + (e G)_k / G_kk        (coordinate descent)
    the scale of group g moves by                 (e G)_g u_g / (u_g G_gg u_gᵀ)

where `u` are a row's codes less their zeros, and `q = scale · u`. Each of these steps lowers the cost or
leaves it. Scales and codes, once each after rounding with feedback, take 8 % off the error (SmolLM2-135M:
relative errors of outputs 0.212 to 0.195 at 2 bits, 0.120 to 0.112 at 3, 0.061 to 0.058 at 4); another round
would take off 2 % more.

Precision: float32.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from emloc.linalg.gram import Moments
from emloc.linalg.grid import Grid, choose_grid, encode_scales, nearest_codes
from emloc.linalg.rounding import Feedback, squared_output

BLOCK = 128
"""Inputs whose `e G` is kept up to date together."""


def fitted_grid(
    weight: Float[Tensor, "rows columns"], moments: Moments, bits: int, group_size: int
) -> tuple[Grid, UInt8[Tensor, "rows columns"]]:
    """A grid and the codes on it: rounded with feedback, then improved; the nearest to the data of all that.

    Args:
        moments: of the inputs.
    """
    matrix, feedback = moments.matrix, Feedback.of(moments)
    grid = choose_grid(weight, matrix.diagonal(), bits, group_size)
    codes = feedback.round(weight, grid)
    best = (squared_output(weight.float() - grid.values(codes), matrix), grid, codes)
    for step in ("scales", "codes"):
        if step == "codes":
            codes = improve_codes(weight, matrix, feedback.ridge, grid, codes)
        else:
            grid = improve_scales(weight, matrix, feedback.ridge, grid, codes)
        cost = squared_output(weight.float() - grid.values(codes), matrix)
        if cost < best[0]:
            best = (cost, grid, codes)
    return best[1:]


def improve_codes(
    weight: Float[Tensor, "rows columns"],
    moments: Float[Tensor, "columns columns"],
    ridge: float,
    grid: Grid,
    codes: UInt8[Tensor, "rows columns"],
) -> UInt8[Tensor, "rows columns"]:
    """Codes after one round of coordinate descent under `moments + ridge`."""
    scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()
    turned = codes.T.contiguous()  # columns × rows: each step works on one contiguous row
    values = grid.values(codes).T.contiguous()
    errors = weight.float().T - values
    columns = len(values)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        slopes = (moments[start:stop].float() @ errors).add_(errors[start:stop], alpha=ridge)
        within = moments[start:stop, start:stop].to(torch.float32, copy=True)
        within.diagonal().add_(ridge)
        curvatures = within.diagonal().tolist()
        for k in range(stop - start):
            at = start + k
            if curvatures[k] <= 0:
                continue
            scale, zero = scales[at // grid.group_size], zeros[at // grid.group_size]
            target = torch.add(values[at], slopes[k], alpha=1 / curvatures[k])
            code = nearest_codes(target, scale, zero, grid.levels)
            moved = (code - zero).mul_(scale).sub_(values[at])
            turned[at] = code.to(torch.uint8)
            values[at] += moved
            errors[at] -= moved
            slopes.addr_(within[:, k], moved, alpha=-1)
    return turned.T.contiguous()


def improve_scales(
    weight: Float[Tensor, "rows columns"],
    moments: Float[Tensor, "columns columns"],
    ridge: float,
    grid: Grid,
    codes: UInt8[Tensor, "rows columns"],
) -> Grid:
    """The grid with scales fitted to the codes, group after group, under `moments + ridge`."""
    scales, zeros, size = grid.scales.clone(), grid.zeros, grid.group_size
    errors = weight.float() - grid.values(codes)
    for group in range(scales.shape[1]):
        inside = slice(group * size, min((group + 1) * size, grid.columns))
        offsets = codes[:, inside].float() - zeros[:, group, None]
        square = moments[inside, inside].to(torch.float32, copy=True)
        square.diagonal().add_(ridge)
        slopes = (errors @ moments[:, inside].float()).add_(errors[:, inside], alpha=ridge)
        gain = (slopes * offsets).sum(1)
        curvature = (offsets @ square * offsets).sum(1)
        step = torch.where(curvature > 0, gain / curvature, 0.0)
        step = torch.maximum(step, -0.5 * scales[:, group])  # a scale stays positive
        scales[:, group] += step
        errors[:, inside] -= step[:, None] * offsets
    coded, largest = encode_scales(scales)
    return replace(grid, scale_codes=coded, largest=largest)
