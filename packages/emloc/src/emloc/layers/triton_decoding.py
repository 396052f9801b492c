"""The kernel of `emloc.layers.fused_decoding`; imported only where Triton is installed."""

# pyright: basic, reportMissingImports=false, reportUntypedFunctionDecorator=false
import triton
import triton.language as tl


@triton.jit
def decode(
    packed,
    scale_codes,
    units,
    zero_codes,
    into,
    zero_unit,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BYTES: tl.constexpr,
    ZERO_BYTES: tl.constexpr,
    LOW: tl.constexpr,
    LOW_STEP: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write `(code − zero) · scale` of some columns of one row; `bit_packing` has the places of codes.

    Args:
        units: a 255th of the largest scale of each `SCALES` neighbouring ones, float32.
        zero_unit: what a code of a zero is multiplied with.
        LOW, LOW_STEP: width of the first plane, and its bytes in a row.
        HIGH, HIGH_STEP: whether there is a plane of one bit behind it, and its bytes.
        ZERO_STEP: bytes of a row of zeros, of 4 bits each.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    codes = packed + row * BYTES
    low = tl.load(codes + column % LOW_STEP, mask=inside, other=0).to(tl.int32)
    code = (low >> (column // LOW_STEP * LOW)) & ((1 << LOW) - 1)
    if HIGH:
        high = tl.load(codes + LOW_STEP + column % HIGH_STEP, mask=inside, other=0).to(tl.int32)
        code += ((high >> (column // HIGH_STEP)) & 1) << LOW
    group = column // GROUP
    place = row * GROUPS + group
    scale = tl.load(scale_codes + place, mask=inside, other=0).to(tl.float32)
    scale *= tl.load(units + place // SCALES, mask=inside, other=0)
    zero = tl.load(zero_codes + row * ZERO_BYTES + group % ZERO_STEP, mask=inside, other=0)
    zero = (zero.to(tl.int32) >> (group // ZERO_STEP * 4)) & 15
    value = (code.to(tl.float32) - zero.to(tl.float32) * zero_unit) * scale
    tl.store(into + row * COLUMNS + column, value.to(into.dtype.element_ty), mask=inside)
