"""What the stages take that stream the base: compress, correct and merge.

**Compress.** A block's weights in float32, the moments of its groups, and every micro-batch's suspended
call (`lockstep`): its hidden state and what else the forward holds between two blocks. When all calls are
through, the groups are factorised one after another, each with a workspace of its own; a group's moments
go with it, its factors stay until the block is written. The block and the moment that take most count.

**Correct.** To choose a limit, every candidate is one more set of suspended calls, and the head is a unit
like the blocks. Writing takes one layer at a time.

**Merge.** The tensor being merged and the one being written.

Precision as in the stages: float32, float64 for a float64 base; eigenproblems below 1024 in float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from emloc.eigen import BLOCK, CHECKS, LARGEST
from emloc.family import Batch
from emloc.gram import Side, smaller_side
from emloc.groups import Group, Plan
from emloc.lowrank import DENSE_BELOW
from emloc.merging import ROWS
from emloc.planning.layers import planned_layers
from emloc.planning.ledger import Lines, largest, lines_of
from emloc.planning.step import Precision, StepOptions, StepSizes
from emloc.planning.subject import Subject
from emloc.planning.trace import trace_forward
from emloc.planning.training import without_lora

DOUBLE = 8


@dataclass(frozen=True)
class Calls:
    """The calibration samples as suspended calls.

    Attributes:
        count: micro-batches.
        batch: bytes of one as it is given.
        state: what one keeps between two blocks, the batch included.
        working: what one takes besides while it runs.
        tokens: of one micro-batch.
        rows: the most tokens, patches or pixels that a block reads of one.
    """

    count: int
    batch: int
    state: int
    working: int
    tokens: int
    rows: int

    @property
    def suspended(self) -> int:
        """Of all of them."""
        return self.count * self.state


def side_of(model: nn.Module, group: Group) -> Side:
    """Whose moments compress sums for a group (`compression`)."""
    outputs, several = sum(group.d_out), len(group.layers) > 1
    if isinstance(model.get_submodule(group.owner), nn.Conv2d):
        return "output"
    if several and 2 * outputs >= group.d_in:
        return "input"
    if several:
        return "output"
    return smaller_side(group.d_out[0], group.d_in)


def moment_bytes(side: Side, group: Group, itemsize: int) -> int:
    """A group's matrix."""
    size = sum(group.d_out) if side == "output" else group.d_in
    return size * size * itemsize


def factor_bytes(group: Group, itemsize: int) -> int:
    """Both factors of a group."""
    return group.rank * (group.d_in + sum(group.d_out)) * itemsize


def factorise_bytes(side: Side, group: Group, itemsize: int) -> int:
    """The most that `lowrank.factorise` holds beside weights and moments, its factors included."""
    m, d, k = sum(group.d_out), group.d_in, group.rank
    size = m if side == "output" else min(m, d)
    small = size < DENSE_BELOW
    high = DOUBLE if small else itemsize
    weights = m * d * high if small else 0
    matrix = (m if side == "output" else d) ** 2 * high if small else 0
    symmetric, made = size * size * high, [0]
    root = 0
    if side == "input" and m <= d:
        weights += m * d * high  # stacked
        made.append(matrix + m * d * high + symmetric)
        matrix = symmetric
    elif side == "input":
        root = d * d * high
        diagonal = 3 * min(d, max(256, -(-d // 8))) ** 2 * high  # mirrored, block by block
        made += [matrix + 2 * root + diagonal, matrix + root + 2 * d * d * high + diagonal]
        matrix = symmetric
    if not root:
        made.append(matrix + 2 * symmetric)
        matrix = symmetric
    made.append(matrix + _eigen_bytes(size, k, high, small))
    vectors = size * k * high
    right = k * d * high
    left = 2 * m * k * high + d * k * high if root else vectors
    made.append(vectors + right + left)
    return weights + root + max(made)


def _eigen_bytes(size: int, count: int, itemsize: int, small: bool) -> int:
    """Beside the matrix: eigenvectors and LAPACK's workspace, or a Krylov basis with its projection."""
    dense = 3 * size * size * itemsize + size * count * itemsize
    if small:
        return dense
    sizes = [max(blocks, -(-int(factor * count) // BLOCK)) * BLOCK for factor, blocks in CHECKS]
    sizes = [found for found in sizes if found <= LARGEST * size]
    if not sizes:
        return dense
    basis = sizes[-1] * size * itemsize
    projected = sizes[-1] ** 2 * itemsize
    found = sizes[0] ** 2 * 3 * itemsize + 2 * size * count * itemsize
    return basis + projected + found


def calibration_calls(subject: Subject, options: Any, candidates: int = 1) -> Calls | None:
    """The suspended calls of the largest samples that the options allow; None where not known."""
    family = subject.planned
    if family is None:
        return None
    size = min(options.calibration_batch_size, options.num_calibration_samples)
    batch = family.planned_batch(subject.checkpoint, options, size)
    samples: int = options.num_calibration_samples
    if options.num_calibration_tokens is not None:
        per_sample = max(1, _tokens(batch) // size)
        samples = -(-options.num_calibration_tokens // per_sample)
    itemsize = compute_itemsize(subject)
    sizes = _forward(subject, options, batch, itemsize)
    given = sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
    peak = max(moment.total for moment in sizes.phases.values())
    count = candidates * -(-samples // size)
    tokens = _tokens(batch)
    working = max(0, peak - sizes.between)
    return Calls(count, given, sizes.between, working, tokens, max(sizes.rows, tokens))


def compute_itemsize(subject: Subject) -> int:
    """Bytes of an element in a streamed forward."""
    return max(4, subject.stored.itemsize)


def _tokens(batch: Batch) -> int:
    first = next(iter(batch.values()))
    return first.numel() if first.ndim == 2 else first[:, 0].numel()


def _forward(subject: Subject, options: Any, batch: Batch, itemsize: int) -> StepSizes:
    family = subject.planned
    assert family is not None
    layers = without_lora(planned_layers(subject.model, subject.shapes, [], (), options))
    on_gpu = options.device.startswith("cuda")
    precise = StepOptions(Precision(itemsize, itemsize), on_gpu=on_gpu)
    sizes = family.step_sizes(subject.model, layers, batch, precise)
    if sizes is not None:
        return replace(sizes, phases={"forward": sizes.phases["forward"]})
    stacks = family.stacks(subject.checkpoint)
    few = family.shallow(subject.checkpoint, [min(2, n) for n in stacks]) if stacks else None
    model = subject.family.skeleton(few or subject.checkpoint, torch.float32)
    return trace_forward(model, subject.family.blocks(model), batch, subject.family.forward_loss)


@dataclass(frozen=True)
class Block:
    """A block as compress meets it."""

    weights: int
    dense: int
    groups: Sequence[tuple[Side, Group]]


def blocks_of(subject: Subject, plan: Plan, itemsize: int) -> Sequence[Block]:
    """Every kind of block once; equal ones take the same."""
    found: dict[Any, Block] = {}
    for name in subject.blocks:
        groups: list[tuple[Side, Group]] = [
            (side_of(subject.model, group), group) for group in plan.within(name)
        ]
        numel = sum(p.numel() for p in subject.model.get_submodule(name).parameters())
        compressed = sum(sum(group.d_out) * group.d_in for _, group in groups)
        key = (numel, *((side, g.rank, g.d_out, g.d_in) for side, g in groups))
        found.setdefault(key, Block(numel * itemsize, numel - compressed, groups))
    return list(found.values())


def compress_lines(
    subject: Subject, plan: Plan, calls: Calls | None, written: int
) -> tuple[Lines, str]:
    """The device's lines at compress's largest moment, and which moment that is.

    Args:
        written: bytes of an element of the emulator.
    """
    itemsize = compute_itemsize(subject)
    suspended = calls.suspended if calls else 0
    moments: dict[str, list[Lines]] = {"running a block": [], "factorising": [], "writing": []}
    for block in blocks_of(subject, plan, itemsize):
        kept = {g.owner: moment_bytes(side, g, itemsize) for side, g in block.groups}
        working = max(calls.working, _folding(block, calls, itemsize)) if calls else 0
        common = {"block_in_float32": block.weights, "suspended_calls": suspended}
        moments["running a block"].append(
            lines_of(**common, moments=sum(kept.values()), working_tensors=working)
        )
        factors = 0
        for side, group in block.groups:
            moments["factorising"].append(
                lines_of(
                    **common,
                    moments=sum(kept.values()),
                    eigenproblem=factorise_bytes(side, group, itemsize),
                    factors=factors,
                )
            )
            kept.pop(group.owner)
            factors += factor_bytes(group, itemsize)
        converted = 0 if written == itemsize else factors // itemsize * written
        converted += 0 if written == subject.stored.itemsize else block.dense * written
        moments["writing"].append(lines_of(**common, factors=factors, written=converted))
    found = {name: largest(parts) for name, parts in moments.items()}
    name = max(found, key=lambda name: sum(found[name].values()))
    return found[name], name


def _folding(block: Block, calls: Calls, itemsize: int) -> int:
    """A layer's inputs and outputs, and what is folded of them: without padding, without the bias."""
    widest = max((2 * g.d_in + 3 * sum(g.d_out) for _, g in block.groups), default=0)
    return calls.rows * widest * itemsize


def correct_lines(
    subject: Subject,
    calls: Calls | None,
    lora: Mapping[str, tuple[int, int, int]],
    candidates: int,
    head: tuple[int, int] | None,
) -> tuple[Lines, str]:
    """The device's lines at correct's largest moment.

    Args:
        calls: those of all candidates; None without `limit="auto"`.
        lora: rank, d_out and d_in of the adapted layers.
        head: d_out × d_in of the layer that makes the logits.
    """
    itemsize = compute_itemsize(subject)
    stored = subject.stored.itemsize
    widest = max((d_out * d_in for _, d_out, d_in in lora.values()), default=0)
    writing = lines_of(
        layer=widest * stored,
        working_tensors=max(
            ((4 * r * d_in + 5 * d_out * r) * DOUBLE for r, d_out, d_in in lora.values()), default=0
        )
        + ROWS * max((d_in for _, _, d_in in lora.values()), default=0) * itemsize,
    )
    if calls is None:
        return writing, "writing"
    running: list[Lines] = []
    for name in subject.blocks:
        numel = sum(p.numel() for p in subject.model.get_submodule(name).parameters())
        beside = sum(
            (r * d_in + candidates * d_out * r) * (itemsize + DOUBLE)
            for layer, (r, d_out, d_in) in lora.items()
            if layer.startswith(f"{name}.")
        )
        running.append(
            lines_of(
                block_in_float32=numel * itemsize,
                suspended_calls=calls.suspended,
                LoRA_of_every_candidate=beside,
                working_tensors=calls.working,
            )
        )
    moments = {"running a block": largest(running), "writing": writing}
    if head is not None:
        logits = 3 * calls.tokens * head[0] * itemsize
        moments["the head"] = lines_of(
            head_in_float32=head[0] * head[1] * itemsize,
            suspended_calls=calls.suspended,
            logits_and_loss=logits,
        )
    name = max(moments, key=lambda name: sum(moments[name].values()))
    return moments[name], name


def merge_lines(subject: Subject, lora: Mapping[str, tuple[int, int, int]]) -> Lines:
    """The machine's memory while tensors are merged."""
    stored = subject.stored.itemsize
    sizes = sorted((d_out * d_in for _, d_out, d_in in lora.values()), reverse=True)
    widest = max((d_in for _, _, d_in in lora.values()), default=0)
    return lines_of(
        merged_tensors=sum(sizes[:2]) * stored,
        working_tensors=3 * ROWS * widest * 4,
    )
