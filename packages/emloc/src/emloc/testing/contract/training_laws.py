"""Laws of training: options are obeyed or refused, what is learnt is what is written, and it helps."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.manifest import Manifest
from emloc.errors import ConfigError
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject

SHAPING = {"lora_r": 2, "lora_alpha": 7.0, "use_rslora": True}
"""Options that an adapter's config and tensors show."""

LEARNING = {
    "seed": 1,
    "learning_rate": 3e-3,
    "lora_dropout": 0.4,
    "weight_decay": 0.9,
    "per_device_train_batch_size": 3,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "lora_init": "gaussian",
}
"""Options that change what two steps learn, with values other than the contract's own and the defaults."""

STEPS = 12
"""Steps after which a LoRA has learnt something of the example."""


class TrainingLaws(SubjectFixture):
    """Promises of `train`. An option that a family does not know may be refused, and not ignored."""

    def test_a_lora_has_the_shape_that_is_asked_for(self, subject: Subject, tmp_path: Path) -> None:
        """The layers, their rank and the scaling that its config says are those of the options."""
        target = Adapter.open(str(subject.adapter)).layers[-1].name
        asked = {**SHAPING, "lora_target_modules": [target]}
        folder, read = _trained(subject, tmp_path / "shaped", **asked)
        layers = Adapter.open(str(folder)).layers
        if "lora_target_modules" in read:
            assert [layer.name for layer in layers] == [target]
        rank, alpha = read.get("lora_r", 3), read.get("lora_alpha", 32)
        assert {layer.rank for layer in layers} == {rank}
        scaling = alpha / (rank**0.5 if "use_rslora" in read else rank)
        assert [layer.scaling for layer in layers] == pytest.approx([scaling] * len(layers))

    @pytest.mark.parametrize("option", LEARNING)
    def test_an_option_of_training_is_obeyed_or_refused(
        self, subject: Subject, option: str, tmp_path: Path
    ) -> None:
        """Another value gives another adapter, and the same value twice the same one.

        Training that is core's own is held to that by core's own tests.
        """
        if type(subject.family).train.__module__.startswith("emloc.integrations."):
            return
        asked = {option: LEARNING[option]}
        folder, read = _trained(subject, tmp_path / "once", **asked)
        if not read:
            return
        once, plain = _tensors(folder), _tensors(subject.adapter)
        assert once.keys() == plain.keys()
        assert any(not torch.equal(once[name], plain[name]) for name in once), option
        if option in ("seed", "lora_dropout"):  # what is drawn at random is drawn by the seed
            again = _tensors(subject.train(tmp_path / "again", **asked))
            for name, tensor in once.items():
                torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-6, msg=name)

    def test_training_takes_as_many_steps_as_are_asked_for(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """`max_steps`, or as many as the epochs have without it; what the last one left is written.

        Every step is taken while the process has a limit for its data, which `PeakMemory` sets on Linux.
        """
        counted: list[int] = []
        epochs = {"max_steps": -1, "per_device_train_batch_size": 8}
        outside = _data_limit()
        for number, asked in enumerate(
            ({"max_steps": 3}, {**epochs, "num_train_epochs": 1}, {**epochs, "num_train_epochs": 2})
        ):
            with _stepped() as steps:
                folder = subject.train(tmp_path / str(number), **asked)
            counted.append(len(steps))
            assert all(step.limit != outside or outside is None for step in steps)
            for name, tensor in _tensors(folder).items():
                alike = [held for held in steps[-1].trained if held.shape == tensor.shape]
                assert any(torch.allclose(held, tensor.float(), atol=1e-6) for held in alike), name
        assert counted[0] == 3
        # An example of few samples may have one step in an epoch.
        assert counted[2] > counted[1] > 0
        assert counted[2] == pytest.approx(2 * counted[1], abs=1)

    def test_a_lora_lowers_the_loss_of_what_it_learnt(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """Names and scaling are those that it was trained with, so it helps the emulator that it is of."""
        before = _files(subject.emulator)
        adapter = subject.train(tmp_path / "learnt", max_steps=STEPS)
        assert _files(subject.emulator) == before
        emulator = {"model_name_or_path": str(subject.emulator)}
        loss = subject.evaluate(**emulator)["loss"]
        assert subject.evaluate(adapter=str(adapter), **emulator)["loss"] < loss

    def test_a_lora_is_trained_on_the_emulator(self, subject: Subject, tmp_path: Path) -> None:
        """One that the base itself is trained with is another, and training leaves it as it is."""
        entries = Manifest.read(subject.emulator).layers.values()
        model = subject.example["model_name_or_path"]
        before = _files(Path(model))
        other = _tensors(subject.train(tmp_path / "on_base", model_name_or_path=model))
        assert _files(Path(model)) == before
        ours = _tensors(subject.train(tmp_path / "on_emulator"))
        assert other.keys() == ours.keys()
        if any(entry["relative_error"] > 1e-4 for entry in entries):
            assert any(not torch.equal(other[name], ours[name]) for name in ours)


def _trained(subject: Subject, folder: Path, **asked: Any) -> tuple[Path, dict[str, Any]]:
    """An adapter that was trained with these options but for those that are refused, and which were read.

    Raises:
        ConfigError: one that names none of them.
    """
    read = dict(asked)
    while True:
        try:
            return (subject.train(folder, **read) if read else subject.adapter), read
        except ConfigError as refusal:
            refused = [name for name in read if name in str(refusal)]
            if not refused:
                raise
            for name in refused:
                del read[name]


class _Step(NamedTuple):
    """A step that an optimiser took.

    Attributes:
        trained: what the trained tensors are after it; of the last step alone.
        limit: bytes that the process may have then (`_data_limit`).
    """

    trained: list[Tensor]
    limit: int | None


@contextmanager
def _stepped() -> Iterator[list[_Step]]:
    """Steps that optimisers take while inside."""
    steps: list[_Step] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        if steps:
            steps[-1] = steps[-1]._replace(trained=[])
        trained = [p.detach().float().cpu().clone() for g in groups for p in g["params"]]
        steps.append(_Step(trained, _data_limit()))

    hook = register_optimizer_step_post_hook(note)
    try:
        yield steps
    finally:
        hook.remove()


def _data_limit() -> int | None:
    """The limit for the data of this process; None on systems that have none."""
    if not sys.platform.startswith("linux"):
        return None
    resource: Any = importlib.import_module("resource")
    return resource.getrlimit(resource.RLIMIT_DATA)[0]


def _tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of a folder's files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
