"""LoRAM (Zhang et al., ICLR 2025, arXiv 2502.13533): train the LoRA on a pruned model, use it on the whole.

Key-value heads with their query heads, and neurons, are taken out of the middle blocks, at random
(LoRAM-RAND) or those of least first-order importance (LoRAM-STRU, `importance`); the LoRA is trained on the
small dense model and its matrices are scattered back among zeros (`scatter`).

Where the paper leaves a choice, the authors' own: the first 4 and last 2 blocks stay whole (their script
prunes blocks 4 to 78 of 80), every block loses the same share, ranked within the block. Pruning ratios are
chosen here to meet the budget. The alignment, continued pre-training of the pruned model by its publisher,
is optional (`alignment`); where it was done, tables say so.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field

from emloc.config import StageConfig, build
from emloc.errors import ConfigError
from emloc.extend.methods import Task
from emloc.methods.light import train_light
from emloc.streaming.stream import UnitStream
from emloc.training.continued import ContinuedOptions
from emloc_baselines.alignment import alignment
from emloc_baselines.budget import emulator_bytes, held_bytes
from emloc_baselines.importance import Importance, first_order
from emloc_baselines.kept import Kept, best
from emloc_baselines.light import LightModel, Source, build_light
from emloc_baselines.main_blocks import main_blocks
from emloc_baselines.pruning import Sizes, fit, prices, pruned_model
from emloc_baselines.scatter import scatter_adapter
from emloc_baselines.structures import Structures, find_structures


class LoramOptions(StageConfig):
    """Options of LoRAM alone."""

    protected_first: int = Field(4, ge=0, description="first blocks that are not pruned")
    protected_last: int = Field(2, ge=0, description="last blocks that are not pruned")
    alignment: ContinuedOptions = Field(
        ContinuedOptions(), description="continued pre-training of the pruned model"
    )


class LoramStru:
    """`Method`: what matters least to the loss goes."""

    name = "loram-stru"
    options: type[StageConfig] = LoramOptions
    calibrated = True

    def build(self, task: Task, out: Path) -> Path:
        """See `Method`."""
        options = build(LoramOptions, task.options, self.name)

        def make(source: Source) -> LightModel:
            return self._pruned(source, options)

        return build_light(self.name, task, out, options, make, self.calibrated)

    def train(self, task: Task, light: Path | None, out: Path) -> Path:
        """See `Method`."""
        return train_light(task, light, out)

    def recover(self, task: Task, light: Path | None, adapter: Path, out: Path) -> Path:
        """See `Method`; among zeros."""
        assert light is not None
        return scatter_adapter(adapter, light, out)

    def _pruned(self, source: Source, options: LoramOptions) -> LightModel:
        stream = UnitStream(source.family, source.base, source.config.device)
        structures = find_structures(stream.model, _middle(stream, options))
        total, target = held_bytes(stream), emulator_bytes(source, stream)
        costs = [prices(stream, here) for here in structures]
        sizes = fit(structures, costs, total - target)
        scores = self._scores(source, stream, structures, sizes)
        kept = [
            Kept(
                here,
                best(scores[here.block].groups, size.groups),
                torch.arange(here.attention.head_dim),
                best(scores[here.block].neurons, size.neurons),
            )
            for here, size in zip(structures, sizes)
        ]
        light = pruned_model(source, stream, kept, budget_bytes=target)
        return replace(light, finish=alignment(source, options.alignment))

    def _scores(
        self,
        source: Source,
        stream: UnitStream,
        structures: Sequence[Structures],
        sizes: Sequence[Sizes],
    ) -> dict[str, Importance]:
        if all(_is_whole(here, size) for here, size in zip(structures, sizes)):
            return _drawn(structures, 0)  # nothing is to be taken out, whatever it is worth
        return first_order(stream, source.batches, structures)


class LoramRand(LoramStru):
    """`Method`: what goes is drawn."""

    name = "loram-rand"
    calibrated = False

    def _scores(
        self,
        source: Source,
        stream: UnitStream,
        structures: Sequence[Structures],
        sizes: Sequence[Sizes],
    ) -> dict[str, Importance]:
        return _drawn(structures, source.config.seed)


def _drawn(structures: Sequence[Structures], seed: int) -> dict[str, Importance]:
    draw = torch.Generator().manual_seed(seed)
    return {
        here.block: Importance(
            torch.rand(here.attention.groups, generator=draw),
            torch.rand(here.mlp.neurons, generator=draw),
        )
        for here in structures
    }


def _is_whole(here: Structures, size: Sizes) -> bool:
    return size == Sizes(here.attention.groups, here.mlp.neurons)


def _middle(stream: UnitStream, options: LoramOptions) -> list[str]:
    """The language model's blocks that are pruned."""
    blocks = main_blocks(stream.model, stream.blocks)
    middle = blocks[options.protected_first : len(blocks) - options.protected_last]
    if not middle:
        raise ConfigError(
            f"{stream.checkpoint.name} has {len(blocks)} blocks, of which protected_first="
            f"{options.protected_first} and protected_last={options.protected_last} leave none to prune; "
            f"lower them."
        )
    return middle
