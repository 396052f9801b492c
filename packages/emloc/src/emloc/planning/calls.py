"""Calibration samples as the stages run that stream a base: suspended calls, one of which runs (`lockstep`).

What a call holds when it stands before a block, inside of it, and behind it, is counted by the family's
closed form or on fake tensors, with what hooks take on the way: compress folds what layers read or wrote,
correct adds a candidate's LoRA. Where the device has memory of its own, calls that wait lie on the host
(`parking`), and the device has one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from emloc.compression.groups import CompressionPlan
from emloc.extend.data_capabilities import calibration_tokens_of
from emloc.extend.family import Batch
from emloc.planning.layers import planned_layers
from emloc.planning.step import BlockKind, Passing, Precision, StepOptions, StepSizes
from emloc.planning.subject import Subject
from emloc.planning.trace import trace_forward

Matrices = Mapping[str, tuple[int, int, int]]
"""Rank, d_out and d_in by layer."""

Watched = Mapping[str, tuple[int, int]]
"""Elements per row that a hook on a layer takes, by layer, and how many more where samples are padded."""


@dataclass(frozen=True)
class Calls:
    """The calibration samples as suspended calls.

    Attributes:
        count: micro-batches.
        batch: bytes of one as it is given.
        tokens: of one micro-batch, of the longer of its sequences where it has two.
        blocks: what one holds as it passes a block, by the block's name or kind; the batch included.
        at_head: what one holds when it stands before the head.
        shared: what is counted more than once: on a CPU, candidates read the same micro-batches.
        parked: whether those that wait are in host memory.
        learnt: rows of logits that a micro-batch's loss is of, where labels say so.
    """

    count: int
    batch: int
    tokens: int
    blocks: Mapping[BlockKind, Sequence[Passing]]
    at_head: int
    shared: int = 0
    parked: bool = False
    learnt: int = 0

    def at(self, block: str, kind: BlockKind) -> Sequence[Passing]:
        """The ways through a block; those through any, where it is not known by itself."""
        passings_here = self.blocks.get(block) or self.blocks.get(kind)
        return passings_here or [
            passing for passings in self.blocks.values() for passing in passings
        ]

    def running(self, passing: Passing) -> tuple[int, int]:
        """Calls on the device while one passes a block, and what that one takes besides.

        Some stand before the block yet, others behind it.
        """
        standing = 0 if self.parked else (self.count - 1) * max(passing.before, passing.after)
        return standing + passing.before - self.shared, max(0, passing.peak - passing.before)

    def behind(self, passings: Sequence[Passing]) -> int:
        """Calls on the device when all have passed a block."""
        return 0 if self.parked else self.count * max(passing.after for passing in passings)

    @property
    def ending(self) -> int:
        """Calls on the device while one is at the head."""
        return self.at_head if self.parked else self.count * self.at_head - self.shared

    @property
    def waiting(self) -> int:
        """Calls in host memory, at most: each in torch's pinned memory, which comes in powers of two."""
        if not self.parked:
            return 0
        passings = [passing for of_block in self.blocks.values() for passing in of_block]
        largest = max(max(p.before, p.after) for p in passings)
        return self.count * (1 << (largest - 1).bit_length() if largest else 0)


def folding_elements(model: nn.Module, plan: CompressionPlan) -> Watched:
    """Elements that folding takes beside what was read and written.

    Rows without padding are copied, but not a convolution's. A bias is taken off in a copy, for outputs of
    one layer; those of several are multiplied once more, and joined. Pixels become rows in a copy.
    """
    elements: dict[str, tuple[int, int]] = {}
    for group in plan.groups:
        shape, side = group.shape, group.form.format.side(group.shape)
        biased = "bias" in dict(model.get_submodule(group.owner).named_parameters())
        if side == "input":  # patches are cut in a copy
            elements[group.owner] = (shape.d_in, 0) if shape.kernel else (0, shape.d_in)
        elif shape.kernel:
            elements[group.owner] = shape.rows * (1 + biased), 0
        elif len(group.layers) == 1:
            elements[group.owner] = shape.rows * biased, shape.rows
        else:
            elements[group.owner] = 2 * shape.rows, shape.d_in
    return elements


def adding_elements(lora: Matrices) -> Watched:
    """Elements that a candidate's LoRA takes (`limits`).

    What A reads, what B writes times the scaling, and its sum with the layer's output. Before, rows without
    padding are copied to be summed.
    """
    return {
        name: (r + 2 * d_out, max(0, d_in - 2 * d_out)) for name, (r, d_out, d_in) in lora.items()
    }


def calibration_calls(
    subject: Subject, options: Any, watched: Watched, candidates: int = 1
) -> Calls | None:
    """The suspended calls of the largest samples that the options allow; None where not known.

    Args:
        watched: what hooks take, see `folding_elements` and `adding_elements`.
    """
    family = subject.planned
    if family is None:
        return None
    size = min(options.calibration_batch_size, options.num_calibration_samples)
    batch = family.planned_batch(subject.checkpoint, options, size)
    samples: int = options.num_calibration_samples
    tokens = calibration_tokens_of(subject.family, options)
    if tokens is not None:
        samples = -(-tokens // max(1, _tokens(batch) // size))
    itemsize = compute_itemsize(subject)
    padded = _learnt(batch) > 0 or any(name.endswith("mask") for name in batch)
    elements = {name: always + more * padded for name, (always, more) in watched.items()}
    sizes = _forward(subject, options, batch, itemsize, elements)
    given = sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
    count = candidates * -(-samples // size)
    between = max(passing.before for passings in sizes.blocks.values() for passing in passings)
    at_head = between if sizes.at_head is None else sizes.at_head
    copied = options.device.startswith("cuda")
    shared = 0 if copied else (count - count // candidates) * given
    tokens, learnt = _tokens(batch), _learnt(batch)
    return Calls(count, given, tokens, sizes.blocks, at_head, shared, copied, learnt)


def compute_itemsize(subject: Subject) -> int:
    """Bytes of an element in a streamed forward."""
    return max(4, subject.stored.itemsize)


def _tokens(batch: Batch) -> int:
    """Tokens that a micro-batch reads, or writes where these are more."""
    first = next(iter(batch.values()))
    read = first.numel() if first.ndim == 2 else first[:, 0].numel()
    return max(read, _learnt(batch))


def _learnt(batch: Batch) -> int:
    """Labels, each of which may have a loss of its own; without labels of tokens, 0."""
    labels = batch.get("labels")
    return labels.numel() if labels is not None and labels.ndim == 2 else 0


def _forward(
    subject: Subject, options: Any, batch: Batch, itemsize: int, watched: Mapping[str, int]
) -> StepSizes:
    family = subject.planned
    assert family is not None
    layers = {
        name: replace(layer, watched=watched.get(name, 0))
        for name, layer in planned_layers(subject.model, subject.shapes, [], (), options).items()
    }
    on_gpu = options.device.startswith("cuda")
    precise = StepOptions(Precision(itemsize, itemsize), on_gpu=on_gpu)
    sizes = family.step_sizes(subject.model, layers, batch, precise)
    if sizes is not None:
        return sizes
    stacks = family.stacks(subject.checkpoint)
    few = family.shallow(subject.checkpoint, [min(2, n) for n in stacks]) if stacks else None
    model = subject.family.skeleton(few or subject.checkpoint, torch.float32)
    names = {name for name, _ in model.named_modules()}
    watched = {name: elements for name, elements in watched.items() if name in names}
    blocks = subject.family.blocks(model)
    return trace_forward(model, blocks, batch, subject.family.loss, watched)
