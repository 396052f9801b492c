"""UPop (Shi et al., ICML 2023, arXiv 2301.13741): masks over all structures, ranked and closed step by step.

Of every attention head dimensions go, the same ones in all heads of a layer; of every MLP neurons; in all
towers of a model. In each of `search_steps` steps t a micro-batch adds to the masks' gradients G, and all
masks are ranked by G, largest first, since where the loss grows with a mask, closing it helps. z-scores make
attentions and MLPs comparable, each over all layers. The best-ranked share `π_t` of what must go gets the
value `1 − π_t`, the others 1, where

    π_t = sqrt((1 − cos(π (t+1) / T)) / 2)

rises to 1. What is closed at the end is cut out. Weights are frozen, so that the search fits where the
model can only be run; masks' gradients come block by block (`masks`). LoRA is trained on the small model
and scattered back (`scatter`).

As in the authors' code: gradients add up over the search and are never cleared; the least-ranked entry of
every mask stays. Their sparsity loss adds the same number to all gradients of one kind, which z-scores take
away again, and is left out. Their fixed weight of an attention's entry (36 neurons of BLIP) is, for any
model, what the entry takes in bytes.

Unlike theirs, the weights do not learn to live with the masks meanwhile. `rank_by=magnitude` is to see what
that makes of the criterion: it closes first what moves the loss least, in either direction.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from emloc.config import StageConfig, build
from emloc.errors import ConfigError
from emloc.extend.methods import Task
from emloc.methods.light import train_light
from emloc.streaming.stream import UnitStream
from emloc_baselines.budget import emulator_bytes, held_bytes
from emloc_baselines.kept import Kept
from emloc_baselines.light import LightModel, Source, build_light
from emloc_baselines.masks import Masks, accumulate_gradients
from emloc_baselines.pruning import pruned_model, sliced_bytes
from emloc_baselines.scatter import scatter_adapter
from emloc_baselines.structures import Structures, find_structures, require_free_dimensions

NAME = "upop"


class UpopOptions(StageConfig):
    """Options of UPop alone."""

    search_steps: int = Field(16, ge=1, description="steps of the search, one micro-batch each")
    rank_by: Literal["gradient", "magnitude"] = Field(
        "gradient",
        description="which masks close first: those with the largest gradients (the authors') or the "
        "smallest |gradients|",
    )


class Upop:
    """`Method`."""

    options: type[StageConfig] = UpopOptions

    def build(self, task: Task, out: Path) -> Path:
        """See `Method`."""
        options = build(UpopOptions, task.options, NAME)

        def make(source: Source) -> LightModel:
            return searched(source, options)

        return build_light(NAME, task, out, options, make, calibrated=True)

    def train(self, task: Task, light: Path | None, out: Path) -> Path:
        """See `Method`."""
        return train_light(task, light, out)

    def recover(self, task: Task, light: Path | None, adapter: Path, out: Path) -> Path:
        """See `Method`; among zeros."""
        assert light is not None
        return scatter_adapter(adapter, light, out)


class Entry(NamedTuple):
    """Bytes that one entry of a block's masks takes: a head dimension (or pair), a neuron."""

    dims: int
    neurons: int


def searched(source: Source, options: UpopOptions) -> LightModel:
    """The base with what the search closes cut out."""
    stream = UnitStream(source.family, source.base, source.config.device)
    structures = find_structures(stream.model, stream.blocks)
    for here in structures:
        require_free_dimensions(stream.model, here.attention)
    total, target = held_bytes(stream), emulator_bytes(source, stream)
    excess, steps = total - target, options.search_steps
    weights = [entry_bytes(stream, here) for here in structures]
    _require_feasible(structures, weights, excess)
    like = torch.zeros((), dtype=stream.dtype, device=stream.device)
    masks = [Masks.ones(here, like) for here in structures]
    closed = [
        torch.zeros_like(part, dtype=torch.bool) for m in masks for part in (m.dims, m.neurons)
    ]
    for step in range(steps if excess > 0 else 0):
        batch = source.batches[step % len(source.batches)]
        accumulate_gradients(stream, [batch], masks)
        share = schedule(step, steps)
        gradients = _gradients(masks)
        if options.rank_by == "magnitude":
            gradients = [-gradient.abs() for gradient in gradients]
        closed = rank(gradients, weights, share * excess)
        for mask, dims, neurons in zip(masks, closed[::2], closed[1::2]):
            mask.set(*((~gone).to(like) + gone.to(like) * (1 - share) for gone in (dims, neurons)))
    kept = [
        Kept(
            here,
            torch.arange(here.attention.groups),
            here.attention.dims_of((~dims).nonzero().reshape(-1).cpu()),
            (~neurons).nonzero().reshape(-1).cpu(),
        )
        for here, dims, neurons in zip(structures, closed[::2], closed[1::2])
    ]
    return pruned_model(source, stream, kept, budget_bytes=target, search_steps=steps)


def schedule(step: int, steps: int) -> float:
    """`π_t`: the share of what must go that goes in this step."""
    return math.sqrt((1 - math.cos(math.pi * (step + 1) / steps)) / 2)


def entry_bytes(stream: UnitStream, structures: Structures) -> Entry:
    """The bytes that one entry of each mask takes."""
    attention, mlp = structures.attention, structures.mlp
    whole = Kept.everything(structures)
    total = sliced_bytes(stream, whole)
    one_dim = Kept(structures, whole.groups, attention.dims_of(torch.arange(1)), whole.neurons)
    one_neuron = Kept(structures, whole.groups, whole.dims, torch.arange(1))
    return Entry(
        (total - sliced_bytes(stream, one_dim)) // (attention.units - 1),
        (total - sliced_bytes(stream, one_neuron)) // (mlp.neurons - 1),
    )


def _gradients(masks: Sequence[Masks]) -> list[Tensor]:
    """Gradients of the masks of attention and MLP in turn, block by block; zeros for a block that nothing
    reached.
    """
    return [
        torch.zeros_like(part) if part.grad is None else part.grad
        for mask in masks
        for part in (mask.dims, mask.neurons)
    ]


def rank(gradients: Sequence[Tensor], weights: Sequence[Entry], excess: float) -> list[Tensor]:
    """Choose the entries to close, true where they are, so that they take at least `excess` bytes.

    Args:
        gradients: of attention and MLP in turn, block by block.
        weights: bytes of an entry of each, by block.
    """
    scores: list[Tensor] = [torch.empty(0)] * len(gradients)
    for kind in (0, 1):
        together = torch.cat([part.double() for part in gradients[kind::2]])
        mean, spread = together.mean(), together.std()
        for index in range(kind, len(gradients), 2):
            scores[index] = (gradients[index].double() - mean) / spread.clamp_min(1e-30)
    order = torch.cat(scores).argsort(descending=True, stable=True).tolist()
    owner = [index for index, part in enumerate(scores) for _ in range(len(part))]
    first = [sum(len(part) for part in scores[:index]) for index in range(len(scores))]
    spared = {first[index] + int(part.argmin()) for index, part in enumerate(scores)}
    closed = [torch.zeros_like(part, dtype=torch.bool) for part in gradients]
    saved = 0.0
    for place in order:
        if saved >= excess:
            break
        if place in spared:
            continue
        index = owner[place]
        closed[index][place - first[index]] = True
        saved += weights[index // 2][index % 2]
    return closed


def _require_feasible(
    structures: Sequence[Structures], weights: Sequence[Entry], excess: int
) -> None:
    most = sum(
        w.dims * (s.attention.units - 1) + w.neurons * (s.mlp.neurons - 1)
        for s, w in zip(structures, weights)
    )
    if excess > most:
        raise ConfigError(
            f"{NAME}: the budget cannot be met even with one head dimension and one neuron per block; "
            f"raise keep_ratio."
        )
