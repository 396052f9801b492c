"""A weight in codes along a trellis (`emloc.linalg.trellis`), and dense only while it is multiplied.

Decoding runs over a few sequences of rows at a time, in float32 whatever the dtype of the product.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from emloc.layers.coded_weight import ELEMENTS
from emloc.layers.fused_decoding import decode_trellis_at_once
from emloc.linalg.bit_packing import unpack
from emloc.linalg.grid import decoded_scales
from emloc.linalg.trellis import sequences_of, values_of, windows_of

ELEMENTS_ELSEWHERE = 1 << 22
"""Weights that are decoded at a time on other devices than CPUs; each takes some eleven bytes then."""


@dataclass(frozen=True)
class TrellisWeight:
    """`Operator`: a weight whose columns are sequences along a trellis, d_out × d_in.

    Attributes:
        packed: d_out, padded to whole sequences, × packed columns, uint8 (`emloc.linalg.bit_packing`).
        scale_codes: d_out × groups, uint8.
        largest: the largest scale of each block of scales, a float32 in the bits of an int32: no cast of a
            model to another dtype reaches it.
        columns: d_in.
        bits: of a code.
        group_size: inputs of a group.
    """

    packed: Tensor
    scale_codes: Tensor
    largest: Tensor
    columns: int
    bits: int
    group_size: int

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight."""
        shape = self.scale_codes.shape[0], self.columns
        weight = torch.empty(shape, dtype=dtype, device=self.packed.device)
        if decode_trellis_at_once(self, weight):
            return weight
        for start, part in self._parts():
            weight[start : start + len(part)] = part
        return weight

    def __matmul__(self, columns: Tensor) -> Tensor:
        """The product with columns, d_in × n, in their dtype."""
        return torch.cat([part.to(columns.dtype) @ columns for _, part in self._parts()])

    def _parts(self) -> Iterator[tuple[int, Tensor]]:
        """Some rows after others, float32."""
        rows, device = self.scale_codes.shape[0], self.packed.device
        scales = decoded_scales(self.scale_codes, self.largest.view(torch.float32))
        count, steps = sequences_of(rows)
        elements = ELEMENTS.get(device.type, ELEMENTS_ELSEWHERE)
        several = max(1, elements // (steps * self.columns)) * steps
        for start in range(0, count * steps, several):
            codes = unpack(self.packed[start : start + several], self.columns, self.bits)
            windows = windows_of(codes.unflatten(0, (-1, steps)), self.bits).flatten(0, 1)
            stop = min(start + several, rows)
            values = values_of(windows[: stop - start], self.bits)
            self._scale(values, scales[start:stop])
            yield start, values

    def _scale(self, values: Tensor, scales: Tensor) -> None:
        """Multiply by the scale of each row and group, in place; the last group may be shorter."""
        whole = self.columns // self.group_size
        edge = whole * self.group_size
        if whole:
            inside = values[:, :edge].unflatten(1, (whole, self.group_size))
            inside.mul_(scales[:, :whole, None])
        if edge < self.columns:
            values[:, edge:].mul_(scales[:, -1:])
