"""Train a LoRA on pictures, DreamBooth's way (Ruiz et al. 2023), with transformers' `Trainer`.

The Trainer brings what it has for text: accelerate, schedules, exact resuming, trackers. What is of
diffusion is here: a step draws latents, noise and timesteps, and with pictures of the class adds the
prior-preservation loss.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from emloc.adapters.going_on import goes_on_from
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.locate import locate
from emloc.errors import ConfigError
from emloc.extend.family import Batch, ModelFamily
from emloc.integrations.transformers.lora_training import train_lora as train_with
from emloc.integrations.transformers.lora_training import training_arguments
from emloc.integrations.transformers.streamed_training import frozen_model
from emloc.machine.memory import PeakMemory, return_large_blocks
from emloc_diffusion.data.prompts import check_unique_token
from emloc_diffusion.denoising_loss import squared_errors
from emloc_diffusion.encode.text import load_tokenizer
from emloc_diffusion.objective import Objective, objective_of
from emloc_diffusion.samples import Samples, encode_samples
from emloc_diffusion.text_training import TextTraining
from emloc_diffusion.validation import DrawValidation


class Turns(Dataset[dict[str, int]]):
    """Pictures of the subject in turn, each beside the next one of the class where there are any.

    Args:
        learnt: positions of the subject's pictures.
        prior: positions of the class's.
        count: turns; the shorter list comes again.
    """

    def __init__(self, learnt: Sequence[int], prior: Sequence[int], count: int) -> None:
        self._learnt, self._prior, self._count = learnt, prior, count

    def __len__(self) -> int:
        """The number of turns."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, int]:
        """The positions of one turn: `position`, and `prior` where there is a class."""
        turn = {"position": self._learnt[index % len(self._learnt)]}
        if self._prior:
            turn["prior"] = self._prior[index % len(self._prior)]
        return turn


class TrackedConfig(FrozenDict):
    """diffusers' config with the two methods by which the Trainer's trackers log one of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """A plain copy."""
        return dict(self)

    def to_json_string(self) -> str:
        """The configuration as text, for logs."""
        return json.dumps(dict(self), default=str)


class DenoiserTrainer(Trainer):
    """The Trainer with a denoiser's loss.

    Args:
        samples: the encoded pictures.
        objective: what noise, and what to predict.
        prior_weight: of the loss on pictures of the class.
        text: text encoders in training; None where prompts are encoded already.
    """

    def __init__(
        self,
        samples: Samples,
        objective: Objective,
        prior_weight: float,
        text: TextTraining | None,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self._samples, self._objective = samples, objective
        self._text = text
        # A micro-batch's loss is a mean, which accumulation divides whatever the model's forward takes.
        self.model_accepts_loss_kwargs = False
        self._prior_weight = prior_weight

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        """Mean squared error; noise comes from torch's own generator, whose state is resumed."""
        chosen = [int(position) for position in inputs["position"]]
        count = len(chosen)
        chosen += [int(position) for position in inputs.get("prior", ())]
        drawn = self._samples.batch(chosen, self._objective, torch.default_generator)
        if self._text is not None:
            drawn |= self._text.conditions(chosen)
        batch = {name: tensor.to(self.args.device) for name, tensor in drawn.items()}
        losses = squared_errors(model, batch).flatten(1).mean(1)
        prior = losses[count:].mean() * self._prior_weight if len(chosen) > count else 0.0
        return losses[:count].mean() + prior


def train_lora(config: Any, work: Path, family: ModelFamily) -> dict[str, Any]:
    """Train into `work`; returns figures for the manifest.

    Raises:
        DataError, ConfigError, NumericalError: see their messages.
    """
    return_large_blocks()
    with PeakMemory(config.device, mapped=not config.stream, limit=config.memory) as peak:
        figures = _train(config, work, family)
    return {**figures, **peak.figures()}


def _train(config: Any, work: Path, family: ModelFamily) -> dict[str, Any]:
    if config.class_data_dir is None and "prior_loss_weight" in config.model_fields_set:
        raise ConfigError(
            "train: prior_loss_weight is set without class_data_dir, whose pictures it weighs; leave it out."
        )
    if config.stream and config.validation_prompt is not None:
        raise ConfigError(
            "train: validation_prompt is drawn by the whole model, which is never in memory with "
            "stream=true; pass stream=false, or leave it out."
        )
    # Gradients are checkpointed by diffusers' own switch, below.
    plain = config.model_copy(update={"gradient_checkpointing": False})
    arguments = training_arguments(TrainingArguments, plain, work, remove_unused_columns=False)
    checkpoint = Checkpoint.open(locate(config.emulator or str(config.model_name_or_path)))
    if config.instance_prompt is not None:
        tokenizer = load_tokenizer(checkpoint.path)
        check_unique_token(config.instance_prompt, config.class_prompt, tokenizer)
    samples = encode_samples(
        checkpoint.path, config, config.device, prompts=not config.train_text_encoder
    )
    torch.manual_seed(config.seed)
    model = frozen_model(family, checkpoint, config, work)
    model._internal_dict = TrackedConfig(model.config)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    plain = plain.model_copy(update={"lora_target_modules": _targets(checkpoint, config, family)})
    text = None
    if config.train_text_encoder:
        captions = [picture.caption for picture in samples.pictures]
        text = TextTraining(
            checkpoint.path, captions, model.dtype, config.device, config.gradient_checkpointing
        )
    learnt, prior = (samples.indices(prior=of_class) for of_class in (False, True))
    # A subject has a few pictures, all of which are learnt: what is held back is noise.
    held_back = Turns(learnt, prior, config.num_held_back_samples)
    make_trainer = partial(
        _make_trainer,
        _validation(checkpoint, config, work, text),
        samples=samples,
        objective=objective_of(checkpoint.path),
        prior_weight=config.prior_loss_weight,
        text=text,
        args=arguments,
        train_dataset=Turns(learnt, prior, max(len(learnt), len(prior))),
        data_collator=_collate,
    )
    parts = text.parts if text else {}
    figures = train_with(
        plain,
        work,
        model,
        make_trainer,
        _noised(samples, checkpoint, config),
        parts=parts,
        family=family,
        adapter=goes_on_from(config, family, checkpoint),
        held_back=held_back or None,
    )
    figures["summary"] |= {"samples": len(samples.pictures)}
    return figures


def _noised(samples: Samples, checkpoint: Checkpoint, config: Any) -> Iterator[Batch]:
    """Micro-batches of the pictures in turn, each time with other noise, without end."""
    objective, generator = objective_of(checkpoint.path), torch.Generator().manual_seed(config.seed)
    turn = cycle(samples.indices(prior=False))
    while True:
        chosen = [next(turn) for _ in range(config.per_device_train_batch_size)]
        yield samples.batch(chosen, objective, generator)


def _make_trainer(more: list[Any], callbacks: list[Any], **options: Any) -> DenoiserTrainer:
    return DenoiserTrainer(callbacks=[*callbacks, *more], **options)


def _validation(
    checkpoint: Checkpoint, config: Any, work: Path, text: TextTraining | None
) -> list[Any]:
    if config.validation_prompt is None:
        return []
    return [
        DrawValidation(
            checkpoint.path,
            checkpoint.layout.folder.rstrip("/"),
            config.validation_prompt,
            config.num_validation_images,
            config.resolution,
            config.num_inference_steps,
            config.validation_steps,
            work,
            "tensorboard" in config.report_to,
            text.modules if text else {},
        )
    ]


def _collate(turns: Sequence[dict[str, int]]) -> dict[str, Tensor]:
    return {name: torch.tensor([turn[name] for turn in turns]) for name in turns[0]}


def _targets(checkpoint: Checkpoint, config: Any, family: ModelFamily) -> list[str]:
    """Names as given; for `all-linear`, the linear layers of the blocks, and their convolutions if asked.

    Raises:
        ConfigError: convolutions are asked for beside names.
    """
    if config.lora_target_modules != ["all-linear"]:
        if config.lora_conv:
            raise ConfigError(
                f"train: lora_conv=true adds convolutions to all-linear, but lora_target_modules names "
                f"{','.join(config.lora_target_modules)}; name the convolutions there too, or leave one out."
            )
        return config.lora_target_modules
    model = family.skeleton(checkpoint, torch.float32)  # an emulator's too has the dense layers
    kinds = (nn.Linear, nn.Conv2d) if config.lora_conv else nn.Linear
    names = [name for group in family.layer_groups(model) for name in group]
    return [name for name in names if isinstance(model.get_submodule(name), kinds)]
