"""Train a model's own weights further, whole, on the family's loss or another one.

This is done once, by whoever has the memory: the model is loaded whole, with gradients and AdamW's moments of
what is trained. Warm-up over a tenth of the steps at most, then a cosine to zero.

The new weights are written beside the old ones and take their place together: a run that is killed
begins again with the old ones, or ends what it had finished.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.durable import sync_tree
from emloc.artefacts.json_files import read_json
from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.small_files import write_json
from emloc.config import CompressConfig, StageConfig
from emloc.errors import DataError, NumericalError
from emloc.extend.capabilities import token_count
from emloc.extend.data_capabilities import read_whole_by
from emloc.extend.family import Batch, ModelFamily
from emloc.machine.memory import return_large_blocks
from emloc.machine.progress import progress_bar

Loss = Callable[[Batch], tuple[Tensor, int]]
"""A micro-batch's summed loss with its graph, and how many terms it sums."""

BESIDE = "continued"
"""The folder in which new weights lie until all of them are there."""

NOTES_NAME = "build_notes.json"
"""Figures of a training that is done; for a continuation, gone when the folder is complete."""


@dataclass(frozen=True)
class Origin:
    """A model that is trained further, or the one that it was made from.

    Attributes:
        base: the original, in its family's layout, which calibration data are drawn for.
        config: the options of compressing: calibration data, device, seed.
    """

    base: Checkpoint
    family: ModelFamily
    config: CompressConfig


class ContinuedOptions(StageConfig):
    """Options of training a model further; 0 steps: not at all."""

    steps: Annotated[int, Field(ge=0)] = 0
    dataset: str | None = None
    """The data, by default those of the calibration."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    max_length: Annotated[int, Field(ge=2)] = 512
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5


def batches_for(source: Origin, options: ContinuedOptions) -> Sequence[Batch]:
    """A micro-batch per step, drawn by seed, as long as there are samples; the loss is on every token."""
    config, elsewhere = source.config, options.dataset is not None
    given: dict[str, Any] = {
        "num_calibration_samples": options.steps * options.batch_size,
        "calibration_batch_size": options.batch_size,
        **read_whole_by(source.family, config, options.max_length, elsewhere),
    }
    if elsewhere:
        given["dataset"] = options.dataset
    chosen = config.model_copy(update=given)
    batches = list(source.family.calibration_batches(source.base, chosen))
    # Families sort samples by length; training should not see them in that order.
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(config.seed))
    return [batches[index] for index in order.tolist()]


def train_further(
    source: Origin,
    work: Path,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    loss_of: Loss,
    options: ContinuedOptions,
    what: str,
) -> dict[str, Any]:
    """Train some parameters of a loaded model and write them beside the old ones, into its folder.

    Args:
        trained: by their names.
        what: what it is called, `alignment` or `distillation`.

    Returns:
        Figures for the manifest's `measured`.

    Raises:
        NumericalError: the loss is not a number.
        DataError: a step has no token to learn from.
    """
    started, batches = time.monotonic(), batches_for(source, options)
    return_large_blocks()  # what is written around it may have asked for more
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values(), lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(options.steps))
    losses: list[float] = []
    tokens = 0
    with progress_bar("continue", options.steps) as advance, torch.enable_grad():
        for batch in _on(source.config.device, islice(cycle(batches), options.steps)):
            total, terms = loss_of(batch)
            if terms == 0:
                raise DataError(
                    f"Step {len(losses) + 1} of training the model further has no token to learn "
                    f"from; its samples are of one token each. Use longer ones."
                )
            loss = total / terms
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise NumericalError(
                    f"The loss of training the model further is {losses[-1]} at step {len(losses)}; "
                    f"use a lower learning rate."
                )
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            tokens += token_count(source.family, batch)
            advance(note=f"loss {losses[-1]:.4f}")
    figures: dict[str, Any] = {
        "continued_as": what,
        "continued_steps": options.steps,
        "continued_tokens": tokens,
        "continued_loss": [losses[0], losses[-1]],
        "continued_seconds": round(time.monotonic() - started, 3),
    }
    _write_beside(source, work, trained, figures)
    return figures


def _on(device: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _cosine(steps: int) -> Callable[[int], float]:
    warm = max(1, min(100, steps // 10))

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warm)
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))

    return factor


def _write_beside(
    source: Origin, work: Path, trained: Mapping[str, nn.Parameter], figures: Mapping[str, Any]
) -> None:
    """The folder's shards with the new weights, in a folder of their own; the notes come last."""
    beside = work / BESIDE
    shutil.rmtree(beside, ignore_errors=True)
    old = Checkpoint.open(work)
    skeleton = source.family.skeleton(old, torch.float32)  # for the names alone
    places = {
        name: parameter
        for path, parameter in trained.items()
        if (stored := source.family.stored(skeleton, path, old)) is not None
        for name in stored.names
    }
    by_file: dict[str, list[str]] = {}
    for name, info in old.tensors.items():
        by_file.setdefault(info.file, []).append(name)
    for file, names in by_file.items():
        declared = {name: (old.tensors[name].dtype, old.tensors[name].shape) for name in names}
        with ShardWriter(beside / file, declared, old.name) as shard:
            for name in names:
                new = places.get(name)
                value = old.read(name) if new is None else new.detach().cpu()
                shard.write(name, value.to(old.tensors[name].dtype))
    write_json(work / NOTES_NAME, figures)


def continued(
    train: Callable[[Path], dict[str, Any]], options: ContinuedOptions
) -> Callable[[Path], Mapping[str, Any]] | None:
    """A step that trains the model in a folder by `train`, and puts its new weights in place.

    It returns the figures, and may be called again after it was killed. None for no steps.
    """

    def finish(work: Path) -> Mapping[str, Any]:
        notes, beside = work / NOTES_NAME, work / BESIDE
        if not notes.is_file():  # else an interrupted build had trained it
            train(work)
        if beside.is_dir():
            sync_tree(beside)
            for file in sorted(beside.iterdir()):
                file.rename(work / file.name)
            beside.rmdir()
        return read_json(notes)

    return finish if options.steps else None
