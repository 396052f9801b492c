"""The kernels of `emloc.layers.fused_decoding`; imported only where Triton is installed."""

# pyright: basic, reportMissingImports=false, reportUntypedFunctionDecorator=false
import triton
import triton.language as tl


@triton.jit
def _codes(
    row,
    column,
    inside,
    LOW: tl.constexpr,
    LOW_STEP: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_STEP: tl.constexpr,
):
    """Read the codes of some columns of a packed row; `bit_packing` has their places."""
    low = tl.load(row + column % LOW_STEP, mask=inside, other=0).to(tl.int32)
    code = (low >> (column // LOW_STEP * LOW)) & ((1 << LOW) - 1)
    if HIGH:
        high = tl.load(row + LOW_STEP + column % HIGH_STEP, mask=inside, other=0).to(tl.int32)
        code += ((high >> (column // HIGH_STEP)) & 1) << LOW
    return code


@triton.jit
def _scales(scale_codes, units, place, inside, SCALES: tl.constexpr):
    """Read the scales at some places among all."""
    scale = tl.load(scale_codes + place, mask=inside, other=0).to(tl.float32)
    return scale * tl.load(units + place // SCALES, mask=inside, other=0)


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
    """Write `(code − zero) · scale` of some columns of one row.

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
    code = _codes(packed + row * BYTES, column, inside, LOW, LOW_STEP, HIGH, HIGH_STEP)
    group = column // GROUP
    scale = _scales(scale_codes, units, row * GROUPS + group, inside, SCALES)
    zero = tl.load(zero_codes + row * ZERO_BYTES + group % ZERO_STEP, mask=inside, other=0)
    zero = (zero.to(tl.int32) >> (group // ZERO_STEP * 4)) & 15
    value = (code.to(tl.float32) - zero.to(tl.float32) * zero_unit) * scale
    tl.store(into + row * COLUMNS + column, value.to(into.dtype.element_ty), mask=inside)


@triton.jit
def decode_trellis(
    packed,
    scale_codes,
    units,
    levels,
    into,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BYTES: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    STEPS: tl.constexpr,
    LOW: tl.constexpr,
    LOW_STEP: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_STEP: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write `level(window) · scale` of some columns of one row.

    Args:
        levels: of all windows, float32.
        BITS, CODES: width of a code, and the codes that a window reaches into.
        STEPS: rows of a sequence.
        LOW, LOW_STEP, HIGH, HIGH_STEP, units: see `decode`.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    step = row % STEPS
    window = tl.zeros([BLOCK], dtype=tl.int32)
    for back in tl.static_range(CODES):
        earlier = row - step + (step + CODES * STEPS - back) % STEPS
        code = _codes(packed + earlier * BYTES, column, inside, LOW, LOW_STEP, HIGH, HIGH_STEP)
        window |= code << (back * BITS)
    level = tl.load(levels + (window & 255), mask=inside, other=0)
    scale = _scales(scale_codes, units, row * GROUPS + column // GROUP, inside, SCALES)
    tl.store(into + row * COLUMNS + column, (level * scale).to(into.dtype.element_ty), mask=inside)
