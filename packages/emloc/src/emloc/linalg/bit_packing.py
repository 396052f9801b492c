"""Codes of 1 to 8 bits in bytes, so that unpacking writes long runs.

A row of codes is cut into as many equal parts as codes fit into a byte; byte i holds the i-th code of every
part, the first part in its lowest bits. Codes of 3 bits are two such planes: their two low bits and their
high bit. Rows are padded with zeros to a multiple of 8 codes, which every plane divides.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

MULTIPLE = 8
"""Codes by whose number a row is padded."""

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Widths of the planes that codes of so many bits are split into, the lowest bits first."""


def padded(columns: int) -> int:
    """The number of codes that a row of `columns` codes takes, padding included."""
    return -(-columns // MULTIPLE) * MULTIPLE


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of a packed row."""
    return sum(padded(columns) * width // 8 for width in PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of codes.

    Args:
        codes: rows × columns, of any integer dtype, each below `2 ** bits`.

    Returns:
        rows × `packed_columns`, uint8.

    Raises:
        ValueError: `bits` is none of `PLANES`.
    """
    if bits not in PLANES:
        raise ValueError(f"codes have 1, 2, 3, 4 or 8 bits, not {bits}")
    columns = codes.shape[1]
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, padded(columns) - columns))
    packed: list[Tensor] = []
    shift = 0
    for width in PLANES[bits]:
        plane = (codes >> shift) & ((1 << width) - 1)
        parts = plane.chunk(8 // width, dim=1)
        whole = parts[0].clone()
        for index, part in enumerate(parts[1:], start=1):
            whole |= part << (index * width)
        packed.append(whole)
        shift += width
    return torch.cat(packed, dim=1)


def unpack(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Undo `pack`: rows × columns, uint8."""
    codes = packed.new_empty(packed.shape[0], padded(columns))
    for place, part in unpacked_parts(packed, columns, bits):
        codes[:, place] = part
    return codes[:, :columns]


def unpacked_parts(packed: Tensor, columns: int, bits: int) -> Iterator[tuple[slice, Tensor]]:
    """The codes of packed rows, part after part.

    Yields:
        The columns of a part, among the padded ones, and its codes as uint8.
    """
    width, *more = PLANES[bits]
    size = padded(columns)
    low = packed[:, : size * width // 8]
    step = low.shape[1]
    for index in range(8 // width):
        place = slice(index * step, (index + 1) * step)
        part = _bits_of(low, index * width, width)
        if more:
            part = part | (_high_bits(packed[:, step:], place, size) << width)
        yield place, part


def _bits_of(plane: Tensor, shift: int, width: int) -> Tensor:
    if width == 8:
        return plane
    part = plane >> shift if shift else plane
    return part if shift + width == 8 else part & ((1 << width) - 1)


def _high_bits(plane: Tensor, place: slice, size: int) -> Tensor:
    """One bit for each of the columns of `place`, which span whole parts of the plane."""
    step = size // 8
    shifts = range(place.start // step, place.stop // step)
    return torch.cat([_bits_of(plane, shift, 1) for shift in shifts], dim=1)
