"""Offsite-Tuning's distillation: the thinned middle learns to do what the full middle does.

`loss = lm_weight · L_LM + kd_weight · mean(((T − S) / rms(T))²)`, where S leaves the thinned middle, T the
full middle on the same input, and L_LM is the light model's own loss per token. Only the middle's weights
are trained. The authors' script: weights 1 and 30, 1e-4, sequences of 512 tokens; it holds the full model.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import ConfigError, DataError
from emloc.extend.family import Batch
from emloc.training.continued import ContinuedOptions, continued, train_further
from emloc_baselines.light import Source


class DistillationOptions(ContinuedOptions):
    """Options of distilling the middle; with 0 steps it is merely thinned."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    lm_weight: Annotated[float, Field(ge=0)] = 1.0
    kd_weight: Annotated[float, Field(ge=0)] = 30.0


def distillation(
    source: Source,
    options: DistillationOptions,
    blocks: Sequence[str],
    between: Sequence[int],
    ends: int,
) -> Callable[[Path], Mapping[str, Any]] | None:
    """A function that distils a thinned model in its folder; None for no steps.

    Args:
        blocks: the full model's.
        between: which of them are the thinned middle.
        ends: how many are at each end.
    """
    stack = blocks[0].rpartition(".")[0]
    thinned = [f"{stack}.{ends + index}" for index in range(len(between))]
    full = blocks[ends : len(blocks) - ends]

    def train(work: Path) -> dict[str, Any]:
        if source.base.translated:
            raise ConfigError(
                f"Distillation loads all of {source.base.name}, but transformers cannot load its layout; "
                f"convert it to transformers' own first, or leave distillation out."
            )
        device = source.config.device
        teacher = source.family.load(source.base, "float32", device).requires_grad_(False)
        student = source.family.load(Checkpoint.open(work), "float32", device)
        middle = tuple(f"{name}." for name in thinned)
        trained = {n: p for n, p in student.named_parameters() if n.startswith(middle)}

        def loss_of(batch: Batch) -> tuple[Tensor, int]:
            with _Middle(student, thinned) as seen:
                total, terms = source.family.loss(student, batch)
            assert seen.entered is not None
            assert seen.left is not None
            target = _through(
                teacher, full, seen.entered, lambda: source.family.loss(teacher, batch)
            )
            distance = (target - seen.left) / target.square().mean().sqrt()
            if terms == 0:
                raise DataError(
                    "A distillation step has no token to learn from, since its samples have one token each; "
                    "use longer ones."
                )
            language = total / terms
            return (
                options.lm_weight * language + options.kd_weight * distance.square().mean(), 1
            )  # fmt: skip

        return train_further(source, work, student, trained, loss_of, options, "distillation")

    return continued(train, options)


class _Middle:
    """The hidden states that enter the first of some blocks and leave the last, while the context is open."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self._first, self._last = (model.get_submodule(blocks[i]) for i in (0, -1))
        self._handles: list[Any] = []
        self.entered: Tensor | None = None
        self.left: Tensor | None = None

    def __enter__(self) -> "_Middle":
        def enter(_: nn.Module, inputs: Any, named: Any) -> None:
            self.entered = inputs[0] if inputs else named["hidden_states"]

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            self.left = _hidden(output)

        self._handles = [
            self._first.register_forward_pre_hook(enter, with_kwargs=True),
            self._last.register_forward_hook(leave),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class _Left(Exception):
    """The last block of the middle is done."""


@torch.no_grad()
def _through(
    teacher: nn.Module, blocks: Sequence[str], entered: Tensor, run: Callable[[], object]
) -> Tensor:
    """The hidden state behind the full middle, given what entered the thinned one.

    The teacher's own forward gives every block its mask and its positions, which differ where some attend to
    a window and others to all.

    Args:
        run: the teacher's forward on the same micro-batch.
    """
    left: list[Tensor] = []

    def enter(_: nn.Module, inputs: Any, named: Any) -> Any:
        if inputs:
            return (entered, *inputs[1:]), named
        return inputs, {**named, "hidden_states": entered}

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        left.append(_hidden(output))
        raise _Left

    first, last = (teacher.get_submodule(blocks[i]) for i in (0, -1))
    handles: list[Any] = [
        first.register_forward_pre_hook(enter, with_kwargs=True),
        last.register_forward_hook(leave),
    ]
    try:
        run()
    except _Left:
        return left[0]
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError(f"the forward of {type(teacher).__name__} never ran {blocks[-1]}")
