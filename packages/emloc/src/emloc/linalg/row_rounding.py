"""Round a table of many rows to its nearest levels, some rows after others.

Rows are looked up one by one, so no row can make up for the errors of another, and there are no moments to
weight errors by: each number becomes the nearest level of the grid that is best for its group.
Parts end where 256 neighbouring scales do (`emloc.linalg.grid`), so that the parts of the grid, one after
another, are the grid of all.

Precision: float32.
"""

from collections.abc import Iterator
from math import gcd

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from emloc.linalg.grid import SCALES, Grid, choose_grid, group_count

PART = 1 << 22
"""About the number of elements that are in float32 at a time."""


def part_rows(columns: int, group_size: int) -> int:
    """Rows of a part: about `PART` elements, and whole blocks of scales."""
    whole = SCALES // gcd(group_count(columns, group_size), SCALES)
    return max(1, PART // (columns * whole)) * whole


def rounded_parts(
    table: Float[Tensor, "rows columns"], bits: int, group_size: int
) -> Iterator[tuple[Grid, UInt8[Tensor, "rows columns"]]]:
    """The grid and the codes of some rows after others.

    Args:
        table: of any floating dtype and finite; it may lie in a mapped file.
    """
    alike = torch.ones(table.shape[1], device=table.device)
    for part in table.split(part_rows(table.shape[1], group_size)):
        values = part.float()
        grid = choose_grid(values, alike, bits, group_size)
        yield grid, nearest_codes(values, grid)


def nearest_codes(
    values: Float[Tensor, "rows columns"], grid: Grid
) -> UInt8[Tensor, "rows columns"]:
    """The codes of the levels that are nearest to the values."""
    _, inverses, zeros = grid.by_group()
    size = grid.group_size
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for group in range(inverses.shape[1]):
        inside = slice(group * size, (group + 1) * size)
        places = torch.addcmul(zeros[:, group, None], values[:, inside], inverses[:, group, None])
        codes[:, inside] = places.round_().clamp_(0, grid.levels)
    return codes
