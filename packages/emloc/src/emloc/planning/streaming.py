"""The memory of the stages that stream the base: compress, correct and merge.

**Compress.** A block's weights in float32, the moments of its groups, and every micro-batch's suspended
call (`lockstep`): its hidden state and what else the forward holds between two blocks. On a GPU the card
has the call that runs, and host memory those that wait. A hook folds what a layer read or wrote as soon as
it has run, with the tokens that are padding left out. When all calls are through, the groups are fitted one
after another, each with a workspace of its own (`fitting_bytes` of its format); a group's moments go with
it, its tensors stay until the block is written. Where sizes or forms are chosen, one call's input and output
of the block are kept, and the block is run on it again. The block and the moment that take most count.

**Correct.** To choose a limit, every candidate is one more set of suspended calls, and the head is a unit
like the blocks. One of them may run on other weights than the base's, which are held beside a block's.
Writing takes one layer at a time.

**Merge.** The tensor being merged and the one being written.

Precision as in the stages: float32, float64 for a float64 base.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from emloc.compression.groups import CompressionPlan, Group
from emloc.compression.menu_choice import pricing_bytes
from emloc.compression.vocabulary import rounding_bytes
from emloc.formats.layer_format import GroupShape, tensor_bytes
from emloc.linalg.gram import Side
from emloc.linalg.merging import ROWS
from emloc.planning.calls import Calls, Matrices, compute_itemsize
from emloc.planning.ledger import Lines, largest, lines_of, total
from emloc.planning.step import Passing
from emloc.planning.subject import Subject
from emloc.planning.whole import Shapes

DOUBLE = 8


def loaded_bytes(subject: Subject, numel: int, device: str) -> int:
    """The bytes that a unit's weights take to compute in: nothing on a CPU that computes in their own
    dtype.

    Then they stay in the mapped file, whose pages the system takes back when it needs them.
    """
    itemsize = compute_itemsize(subject)
    mapped = not device.startswith("cuda") and subject.stored.itemsize == itemsize
    return 0 if mapped else numel * itemsize


def moment_bytes(side: Side, shape: GroupShape, itemsize: int) -> int:
    """A group's matrix."""
    size = shape.rows if side == "output" else shape.d_in
    return size * size * itemsize


@dataclass(frozen=True)
class Block:
    """A block as compress meets it.

    Attributes:
        weights: elements of all.
        dense: elements of those that stay as they are.
        groups: what is compressed, and whose moments are summed.
        passings: ways of a call through it.
    """

    weights: int
    dense: int
    groups: Sequence[Group]
    passings: Sequence[Passing]


def blocks_of(subject: Subject, plan: CompressionPlan, calls: Calls | None) -> Sequence[Block]:
    """Every kind of block once; equal ones take the same."""
    kinds: dict[Any, Block] = {}
    for name, kind in subject.kinds.items():
        groups = plan.within(name)
        numel = sum(p.numel() for p in subject.model.get_submodule(name).parameters())
        compressed = sum(group.shape.numel for group in groups)
        passings = tuple(calls.at(name, kind)) if calls else (Passing(0, 0, 0),)
        sizes = ((str(g.form.as_json()), replace(g.shape, layers=())) for g in groups)
        key = (numel, passings, *sizes)
        kinds.setdefault(key, Block(numel, numel - compressed, groups, passings))
    return list(kinds.values())


def compress_lines(
    subject: Subject, plan: CompressionPlan, calls: Calls | None, written: int, device: str
) -> tuple[Lines, str]:
    """The device's lines at compress's largest moment, and which moment that is.

    Args:
        written: bytes of an element of the emulator.
    """
    itemsize = compute_itemsize(subject)
    names = ("running a block", "probing", "fitting a layer", "writing")
    instants: dict[str, list[Lines]] = {name: [] for name in names}
    for block in blocks_of(subject, plan, calls):
        kept = {
            g.owner: moment_bytes(g.form.format.side(g.shape), g.shape, itemsize)
            for g in block.groups
        }
        weights = loaded_bytes(subject, block.weights, device)
        for passing in block.passings:
            suspended, working = calls.running(passing) if calls else (0, 0)
            instants["running a block"].append(
                lines_of(
                    block_in_float32=weights,
                    suspended_calls=suspended,
                    moments=sum(kept.values()),
                    working_tensors=working,
                )
            )
        suspended = calls.behind(block.passings) if calls else 0
        probed, again = _probe_bytes(block, itemsize)
        common = {"block_in_float32": weights, "suspended_calls": suspended, "probed_call": probed}
        if again:
            instants["probing"].append(
                lines_of(**common, moments=sum(kept.values()), working_tensors=again)
            )
        fitted = converted = 0
        for group in block.groups:
            shape, form = group.shape, group.form
            instants["fitting a layer"].append(
                lines_of(
                    **common,
                    moments=sum(kept.values()),
                    fitting=fitting_bytes(group, itemsize),
                    fitted_layers=fitted,
                )
            )
            kept.pop(group.owner)
            fitted += tensor_bytes(shape, form, itemsize)
            converted += 0 if written == itemsize else tensor_bytes(shape, form, written)
        converted += 0 if written == subject.stored.itemsize else block.dense * written
        instants["writing"].append(lines_of(**common, fitted_layers=fitted, written=converted))
    instants["rounding embeddings"] = [
        lines_of(working_tensors=rounding_bytes(table)) for table in plan.tables
    ]
    sizes_by_name = {name: largest(parts) for name, parts in instants.items() if parts}
    name = max(sizes_by_name, key=lambda name: sum(sizes_by_name[name].values()))
    return sizes_by_name[name], name


def fitting_bytes(group: Group, itemsize: int) -> int:
    """The most that fitting a group takes beside weights and moments, and pricing its menu, if it has one."""
    shape, form = group.shape, group.form
    if not group.menu:
        return form.format.fitting_bytes(shape, form, itemsize)
    return max(
        pricing_bytes(shape), *(f.format.fitting_bytes(shape, f, itemsize) for f in group.guesses)
    )


def _probe_bytes(block: Block, itemsize: int) -> tuple[int, int]:
    """The call that `BlockProbe` keeps of a block, and what running the block on it again takes besides.

    Nothing of either, where no size or form is chosen.
    """
    if not any(group.wide or group.menu for group in block.groups):
        return 0, 0
    kept = max(passing.before + passing.after for passing in block.passings)
    again = max(passing.peak + passing.after for passing in block.passings)
    replaced = max(max(group.shape.d_out) * group.shape.d_in for group in block.groups)
    return kept, again + replaced * itemsize


def correct_lines(
    subject: Subject,
    calls: Calls | None,
    lora: Matrices,
    candidates: int,
    head: tuple[int, int] | None,
    device: str,
    in_few_bits: bool = False,
) -> tuple[Lines, str]:
    """The device's lines at correct's largest moment.

    Args:
        calls: those of all candidates; None without `limit="auto"`.
        lora: of the adapted layers.
        head: d_out × d_in of the layer that makes the logits.
        in_few_bits: whether the base's weights in few bits are made anew: a layer's beside its own and,
            for the candidate that runs on them, a block's.
    """
    itemsize = compute_itemsize(subject)
    stored = subject.stored.itemsize
    widest = max((d_out * d_in for _, d_out, d_in in lora.values()), default=0)
    writing = lines_of(
        layer=widest * stored,
        the_same_in_few_bits=widest * (stored + 1) if in_few_bits else 0,
        working_tensors=max(
            ((4 * r * d_in + 5 * d_out * r) * DOUBLE for r, d_out, d_in in lora.values()), default=0
        )
        + ROWS * max((d_in for _, _, d_in in lora.values()), default=0) * itemsize,
    )
    if calls is None:
        return writing, "writing"
    running: list[Lines] = []
    for name, kind in subject.kinds.items():
        numel = sum(p.numel() for p in subject.model.get_submodule(name).parameters())
        beside = sum(
            (r * d_in + candidates * d_out * r) * itemsize
            for layer, (r, d_out, d_in) in lora.items()
            if layer.startswith(f"{name}.")
        )
        for passing in calls.at(name, kind):
            suspended, working = calls.running(passing)
            running.append(
                lines_of(
                    block_in_float32=loaded_bytes(subject, numel, device),
                    suspended_calls=suspended,
                    dequantised_block=numel * itemsize if in_few_bits else 0,
                    LoRA_of_every_candidate=beside,
                    # Candidates that fit the data are made inside a call.
                    working_tensors=working + total(writing),
                )
            )
    instants = {"running a block": largest(running), "writing": writing}
    if head is not None:
        logits = 3 * (calls.learnt or calls.tokens) * head[0] * itemsize
        instants["the head"] = lines_of(
            head_in_float32=loaded_bytes(subject, head[0] * head[1], device),
            suspended_calls=calls.ending,
            logits_and_loss=logits,
        )
    name = max(instants, key=lambda name: sum(instants[name].values()))
    return instants[name], name


def merge_lines(subject: Subject, lora: Matrices, whole: Shapes) -> Lines:
    """The machine's memory while tensors are merged."""
    stored = subject.stored.itemsize
    sizes = [d_out * d_in for _, d_out, d_in in lora.values()]
    sizes = sorted([*sizes, *(torch.Size(s).numel() for s in whole.values())], reverse=True)
    widest = max((d_in for _, _, d_in in lora.values()), default=0)
    return lines_of(
        merged_tensors=sum(sizes[:2]) * stored,
        working_tensors=3 * ROWS * widest * 4,
    )
