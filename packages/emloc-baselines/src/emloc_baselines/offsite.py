"""Offsite-Tuning (Xiao et al. 2023, arXiv 2302.04870): the ends are trained, the middle is thinned.

The first and last `trained_blocks` blocks stay; of the L between, k stay, number `round(i·(L−1)/(k−1))`, as
many as the budget allows, and are frozen. What was trained is plugged back around the full middle. Here a
LoRA inside the trained blocks is, so that emulators are compared and not ways of training.

The authors' own settings: 2 blocks at each end. Their emulator is distilled for their main results and
merely thinned for their largest models; distillation is optional here (`distillation`), and the tables say
where it was done.
"""

from dataclasses import replace
from pathlib import Path

from pydantic import Field

from emloc.artefacts.manifest import Manifest
from emloc.config import StageConfig, build
from emloc.errors import ConfigError
from emloc.extend.methods import Task
from emloc.methods.light import train_light
from emloc.streaming.stream import UnitStream
from emloc_baselines.budget import emulator_bytes, held_bytes
from emloc_baselines.distillation import DistillationOptions, distillation
from emloc_baselines.light import LightModel, Source, build_light
from emloc_baselines.main_blocks import main_blocks
from emloc_baselines.recovery import Recovered, recover_adapter
from emloc_baselines.thinning import (
    block_bytes,
    thinned_config,
    thinned_pieces,
    uniform,
    with_derived,
)

NAME = "offsite-tuning"


class OffsiteOptions(StageConfig):
    """Options of Offsite-Tuning alone."""

    trained_blocks: int = Field(2, ge=1, description="trained blocks at each end")
    distillation: DistillationOptions = Field(
        DistillationOptions(), description="distillation of the thinned middle from the full one"
    )


class OffsiteTuning:
    """`Method`."""

    options: type[StageConfig] = OffsiteOptions

    def build(self, task: Task, out: Path) -> Path:
        """See `Method`."""
        options = build(OffsiteOptions, task.options, NAME)

        def make(source: Source) -> LightModel:
            return thinned(source, options)

        return build_light(NAME, task, out, options, make, calibrated=False)

    def train(self, task: Task, light: Path | None, out: Path) -> Path:
        """See `Method`; the LoRA lies in the blocks at both ends."""
        assert light is not None
        if "lora_layers_to_transform" in task.train:
            raise ConfigError(
                f"{NAME} adapts the blocks at both ends; leave lora_layers_to_transform out."
            )
        ends = build(OffsiteOptions, task.options, NAME).trained_blocks
        blocks = list(Manifest.read(light).layers)
        chosen = [*range(ends), *range(len(blocks) - ends, len(blocks))]
        return train_light(
            task,
            light,
            out,
            lora_layers_to_transform=chosen,
            lora_layers_pattern=[blocks[0].rpartition(".")[0]],
        )

    def recover(self, task: Task, light: Path | None, adapter: Path, out: Path) -> Path:
        """See `Method`; blocks get their numbers in the full model back."""
        assert light is not None
        original = {
            block: str(entry["original"]) for block, entry in Manifest.read(light).layers.items()
        }

        def rename(name: str) -> str:
            for block, old in original.items():
                if name.startswith(f"{block}."):
                    return old + name.removeprefix(block)
            return name

        def renamed(_: object, recovered: Recovered) -> Recovered:
            return recovered._replace(name=rename(recovered.name))

        return recover_adapter(adapter, light, out, renamed, rename)


def thinned(source: Source, options: OffsiteOptions) -> LightModel:
    """The light model with as many blocks of the middle as the budget allows.

    Raises:
        ConfigError: it allows none, or there is no middle.
    """
    stream = UnitStream(source.family, source.base, source.config.device)
    blocks = main_blocks(stream.model, stream.blocks)
    ends, depth = options.trained_blocks, len(blocks)
    target = emulator_bytes(source, stream)
    sizes = [block_bytes(stream, block) for block in blocks]
    rest = held_bytes(stream) - sum(sizes)
    for middle in range(depth - 2 * ends, 0, -1):
        between = [ends + index for index in uniform(depth - 2 * ends, middle)]
        kept = [*range(ends), *between, *range(depth - ends, depth)]
        if rest + sum(sizes[index] for index in kept) <= target:
            break
    else:
        raise ConfigError(
            f"{NAME}: the budget has no room for {2 * ends} trained blocks and one between, of the {depth} "
            f"of {source.base.name}; raise keep_ratio or lower trained_blocks."
        )
    stack = blocks[0].rpartition(".")[0]
    light = LightModel(
        config=thinned_config(with_derived(source.base.config, stream.model, depth), depth, kept),
        pieces=thinned_pieces(stream, blocks, kept),
        summary={"budget_bytes": target, "blocks": len(kept), "trained_blocks": 2 * ends},
        layers={f"{stack}.{new}": {"original": blocks[old]} for new, old in enumerate(kept)},
    )
    return replace(light, finish=distillation(source, options.distillation, blocks, between, ends))
