"""Codes in bytes: what is packed comes out again, in as many bytes as was said."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc.linalg.bit_packing import PLANES, pack, packed_columns, unpack


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(sorted(PLANES)),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_codes_come_out_as_they_went_in(bits, rows, columns, seed):
    drawn = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=drawn)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert torch.equal(unpack(packed, columns, bits).long(), codes)


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_no_bit_is_wasted_where_eight_divides_the_columns(bits):
    assert packed_columns(4096, bits) == 4096 * bits // 8


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="not 5"):
        pack(torch.zeros(1, 8), 5)
