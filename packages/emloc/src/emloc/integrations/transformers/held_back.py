"""Samples that training holds back, to tell by their loss what it has done."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from emloc.config import TrainConfig
from emloc.machine.progress import console
from emloc.streaming.streamed_model import StreamedModel

SampleT = TypeVar("SampleT")

LARGEST_SHARE = 5
"""A fifth of the samples is held back at most."""


def hold_back(
    samples: Sequence[SampleT], config: TrainConfig
) -> tuple[list[SampleT], list[SampleT]]:
    """Split samples by seed into those to learn from, in their order, and those held back.

    A sample that a mixture has several times is held back as one, and none of it is learnt.
    """
    wanted = config.num_held_back_samples
    places = list({id(sample): at for at, sample in enumerate(samples)}.values())
    count = min(wanted, len(places) // LARGEST_SHARE)
    if count < wanted:
        console.print(
            f"num_held_back_samples={wanted}: a fifth of {len(places)} samples is held back, {count}"
        )
    held_back = [samples[at] for at in sorted(random.Random(config.seed).sample(places, count))]
    chosen = {id(sample) for sample in held_back}
    return [sample for sample in samples if id(sample) not in chosen], held_back


def mean_loss(trainer: Any, samples: Any, streamed: StreamedModel | None) -> float:
    """The mean loss of samples with the model as it is, by the trainer's own loss.

    Whatever is drawn for it, such as noise, is the same whenever it is called, and leaves training's
    generators as they were.

    Args:
        trainer: of transformers, with its model.
        samples: a data set in the form that the trainer takes.
        streamed: the model, where its blocks are in memory one at a time; they are read once.
    """
    model, cards = trainer.model, list(range(torch.cuda.device_count()))
    training = model.training
    model.eval()
    with torch.random.fork_rng(cards), torch.no_grad():
        torch.manual_seed(trainer.args.seed)
        batches = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader(samples)]
        calls = [partial(trainer.compute_loss, model, batch) for batch in batches]
        # Training's precision, which the Trainer gives the model when it begins.
        with trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
            losses = [call() for call in calls] if streamed is None else streamed.run(calls)
    model.train(training)
    getattr(trainer, "_metrics", {}).get("eval", {}).clear()  # TRL's, of its own evaluations
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    return sum(float(loss) * size for loss, size in zip(losses, sizes)) / sum(sizes)
