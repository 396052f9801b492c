"""The memory of compress where errors are propagated (`emloc.compression.propagation`).

A call on the base and one on the emulator for every micro-batch; a block's weights, or those that were
fitted in their place; the sums of one group at a time, over inputs of the emulator, and of both; and what the
block's layers read in the base, which lies on the host.
"""

from collections.abc import Sequence
from math import prod

from emloc.compression.groups import CompressionPlan, Group
from emloc.formats.layer_format import tensor_bytes
from emloc.planning.calls import Calls, compute_itemsize
from emloc.planning.ledger import Lines, largest, lines_of
from emloc.planning.streaming import blocks_of, fitting_bytes, loaded_bytes
from emloc.planning.subject import Subject


def propagating_lines(
    subject: Subject, plan: CompressionPlan, calls: Calls | None, written: int, device: str
) -> tuple[Lines, str]:
    """The device's lines at the largest moment, and which moment that is; see `compress_lines`."""
    itemsize = compute_itemsize(subject)
    names = ("running a block", "fitting a layer", "writing")
    instants: dict[str, list[Lines]] = {name: [] for name in names}
    for block in blocks_of(subject, plan, calls):
        sums = [2 * group.shape.d_in**2 * itemsize for group in block.groups]
        stored = sum(tensor_bytes(g.shape, g.form, itemsize) for g in block.groups)
        kept = 0 if device.startswith("cuda") else _kept(block.groups, calls, itemsize)
        # What was fitted is dense memory, also where the base's weights stay in a mapped file.
        dense = sum(group.shape.numel for group in block.groups) * itemsize
        weights = max(dense, loaded_bytes(subject, block.weights, device))
        common = {"block_in_float32": weights, "inputs_of_layers": kept, "fitted_layers": stored}
        for passing in block.passings:
            suspended, working = calls.running(passing) if calls else (0, 0)
            instants["running a block"].append(
                lines_of(
                    **common,
                    suspended_calls=suspended,
                    moments=max(sums, default=0),
                    working_tensors=working,
                )
            )
        suspended = calls.behind(block.passings) if calls else 0
        for group, size in zip(block.groups, sums):
            shape = group.shape
            regression = size + 2 * shape.numel * 8
            fitting = fitting_bytes(group, itemsize)
            instants["fitting a layer"].append(
                lines_of(
                    **common,
                    suspended_calls=suspended,
                    moments=size,
                    fitting=shape.numel * itemsize + max(regression, fitting),
                )
            )
        converted = 0
        if written != itemsize:
            converted += sum(tensor_bytes(g.shape, g.form, written) for g in block.groups)
        if written != subject.stored.itemsize:
            converted += block.dense * written
        instants["writing"].append(lines_of(**common, suspended_calls=suspended, written=converted))
    sizes = {name: largest(parts) for name, parts in instants.items() if parts}
    name = max(sizes, key=lambda name: sum(sizes[name].values()))
    return sizes[name], name


def kept_inputs(subject: Subject, plan: CompressionPlan, calls: Calls | None) -> int:
    """Bytes of what the layers of one block read in the base, of the block that reads most."""
    itemsize = compute_itemsize(subject)
    blocks = blocks_of(subject, plan, calls)
    return max((_kept(block.groups, calls, itemsize) for block in blocks), default=0)


def _kept(groups: Sequence[Group], calls: Calls | None, itemsize: int) -> int:
    """The bytes of a block; at most one row per token, and of a convolution per place in the picture."""
    if calls is None:
        return 0
    read = {group.source: group.shape.d_in // prod(group.shape.kernel or (1,)) for group in groups}
    return calls.count // 2 * calls.tokens * sum(read.values()) * itemsize
