"""A weight in few bits, and dense only while it is multiplied.

Decoding runs over a few rows at a time, in float32 whatever the dtype of the product: what is between codes
and weight stays in the processor's cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emloc.layers.fused_decoding import decode_at_once
from emloc.linalg.bit_packing import padded, unpack, unpacked_parts
from emloc.linalg.grid import SCALES, ZERO_BITS, decoded_scales, decoded_zeros
from emloc.machine.pinned import pinned

ELEMENTS = {"cpu": 1 << 18}
"""Weights that are decoded at a time, by the kind of device."""

ELEMENTS_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class CodedWeight:
    """`Operator`: a weight on the grid of `emloc.linalg.grid`, d_out × d_in.

    Attributes:
        packed: d_out × packed columns, uint8 (`emloc.linalg.bit_packing`).
        scale_codes: d_out × groups, uint8.
        largest: the largest scale of each block of scales, a float32 in the bits of an int32: no cast of a
            model to another dtype reaches it.
        zero_codes: d_out × packed groups, uint8.
        columns: d_in.
        bits: of a code.
        group_size: inputs of a group.
    """

    packed: Tensor
    scale_codes: Tensor
    largest: Tensor
    zero_codes: Tensor
    columns: int
    bits: int
    group_size: int

    def to(self, device: torch.device) -> "CodedWeight":
        """The same on a device; without waiting for it where its tensors are pinned."""
        return self._with([t.to(device, non_blocking=True) for t in self._tensors])

    def pinned(self) -> "CodedWeight":
        """The same in memory from which a GPU copies while it computes."""
        return self._with([pinned(tensor) for tensor in self._tensors])

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.packed, self.scale_codes, self.largest, self.zero_codes

    def _with(self, tensors: Sequence[Tensor]) -> "CodedWeight":
        packed, scale_codes, largest, zero_codes = tensors
        return CodedWeight(
            packed, scale_codes, largest, zero_codes, self.columns, self.bits, self.group_size
        )

    def dense(self, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """The weight.

        Args:
            into: what it is written into, d_out × d_in and of this dtype; None: new memory.
        """
        weight = into
        if weight is None:
            shape = self.packed.shape[0], self.columns
            weight = torch.empty(shape, dtype=dtype, device=self.packed.device)
        if decode_at_once(self, weight):
            return weight
        for start, part in self._parts():
            weight[start : start + len(part)] = part
        return weight

    def __matmul__(self, columns: Tensor) -> Tensor:
        """The product with columns, d_in × n, in their dtype."""
        return torch.cat([part.to(columns.dtype) @ columns for _, part in self._parts()])

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight, and nothing decoded of the others.

        Args:
            index: whole numbers, one axis, on the weight's device.

        Returns:
            Rows × d_in, equal to those of `dense`.
        """
        chosen = self.scale_codes[index]
        groups = chosen.shape[1]
        places = index[:, None] * groups + torch.arange(groups, device=index.device)
        largest = self.largest.view(torch.float32)[places // SCALES]
        scales = chosen.float() * (largest / 255)
        zeros = decoded_zeros(unpack(self.zero_codes[index], groups, ZERO_BITS), self.bits)
        made = torch.empty(len(index), self.columns, dtype=dtype, device=self.packed.device)
        for start, part in self._decoded(self.packed[index], scales, zeros):
            made[start : start + len(part)] = part
        return made

    def _parts(self) -> Iterator[tuple[int, Tensor]]:
        """Some rows after others, float32; each part is gone when the next is asked for."""
        scales = decoded_scales(self.scale_codes, self.largest.view(torch.float32))
        zeros = decoded_zeros(unpack(self.zero_codes, scales.shape[1], ZERO_BITS), self.bits)
        yield from self._decoded(self.packed, scales, zeros)

    def _decoded(
        self, packed: Tensor, scales: Tensor, zeros: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """The parts of rows that are packed so."""
        rows, device = packed.shape[0], packed.device
        step = ELEMENTS.get(device.type, ELEMENTS_ELSEWHERE) // self.columns or 1
        values = torch.empty(min(step, rows), padded(self.columns), device=device)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = values[: stop - start]
            for place, codes in unpacked_parts(packed[start:stop], self.columns, self.bits):
                part[:, place] = codes
            self._place(part, scales[start:stop], zeros[start:stop])
            yield start, part[:, : self.columns]

    def _place(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Turn codes into values, in place: `(code − zero) · scale`; the last group may be shorter."""
        whole = self.columns // self.group_size
        edge = whole * self.group_size
        if whole:
            inside = codes[:, :edge].unflatten(1, (whole, self.group_size))
            inside.sub_(zeros[:, :whole, None]).mul_(scales[:, :whole, None])
        if edge < self.columns:
            codes[:, edge : self.columns].sub_(zeros[:, -1:]).mul_(scales[:, -1:])
