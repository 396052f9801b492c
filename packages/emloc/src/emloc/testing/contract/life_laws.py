"""Laws of a family's work over time: interrupted training, changed data, whichever formats are installed."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import TrainConfig, build
from emloc.errors import DependencyError, EmlocError, Interrupted
from emloc.extend.family import Batch
from emloc.extend.losses import loss_sum
from emloc.extend.plugin_options import of_family, with_plugin_options
from emloc.extend.plugins import load_plugins
from emloc.layers.emulated_layer import EmulatedLayer
from emloc.stages.data_digest import data_digests
from emloc.streaming.stream import UnitStream
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject

FILES = 3
"""Data files of one kind in one folder that are changed in turn."""


class LifeLaws(SubjectFixture):
    """Promises of a family whose stages are interrupted, of its data and of `load`."""

    def test_an_interrupted_compress_goes_on_to_the_same_emulator(
        self, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C in the last block leaves no emulator; the same call then writes that of an unbroken run."""
        last, hold = subject.family.blocks(subject.skeleton)[-1], UnitStream.holding

        def interrupt(stream: UnitStream, unit: str, values: list[Tensor]) -> Any:
            if unit == last:
                raise KeyboardInterrupt
            return hold(stream, unit, values)

        folder = tmp_path / "emulator"
        with monkeypatch.context() as patch:
            patch.setattr(UnitStream, "holding", interrupt)
            with pytest.raises((KeyboardInterrupt, Interrupted)):
                subject.compress(folder, **subject.compressed_to)
        assert not folder.exists()
        subject.compress(folder, **subject.compressed_to)
        again, unbroken = (Checkpoint.open(str(path)) for path in (folder, subject.emulator))
        assert again.tensors.keys() == unbroken.tensors.keys()
        for name in unbroken.tensors:
            assert torch.equal(again.read(name), unbroken.read(name)), name

    def test_interrupted_training_goes_on_to_the_same_adapter(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """Ctrl-C in the last step leaves no adapter, and the same call makes the one of an unbroken run."""
        steps = 0

        def interrupt(*_: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == 2:
                raise KeyboardInterrupt

        hook = register_optimizer_step_post_hook(interrupt)
        try:
            with pytest.raises((KeyboardInterrupt, Interrupted)):
                subject.train(tmp_path / "adapter")
        finally:
            hook.remove()
        assert not (tmp_path / "adapter").exists()
        again = load_file(subject.train(tmp_path / "adapter") / "adapter_model.safetensors")
        unbroken = load_file(subject.adapter / "adapter_model.safetensors")
        assert again.keys() == unbroken.keys()
        for name, tensor in unbroken.items():
            torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-6, msg=name)

    def test_a_changed_data_file_is_other_data(self, subject: Subject) -> None:
        """Every file of the example that samples are made of belongs to the digest of the data.

        An adapter that was trained on pictures which were exchanged since would else be called complete.
        """
        kind: type[TrainConfig] = with_plugin_options(TrainConfig)
        given = {"output_dir": "unused", **subject.example}
        options = of_family(build(kind, given, "train"), subject.family)
        before, digests = subject.calibration(), data_digests(options, subject.family)
        read: list[Path] = []
        for file in _data_files(subject.example):
            with _spoilt(file):
                try:
                    now: object = data_digests(options, subject.family)
                except EmlocError:  # rows that name files may be what is spoilt
                    now = None
                try:
                    same = _equal(subject.calibration(), before)
                except EmlocError:  # a picture that is none any more
                    same = False
            if not same:
                read.append(file)
                assert now != digests, f"{file} was changed, and its data are called the same"
        assert read, "no file of the example is read"

    def test_every_installed_format_is_loaded_and_computes(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """Emulators of each, of the last block alone: its layers in their form, a loss that is a number."""
        family, batch = subject.family, subject.batches[0]
        layers = [name for group in family.layer_groups(subject.skeleton) for name in group]
        blocks = [f"{block}." for block in family.blocks(subject.skeleton)]
        last = next(block for block in blocks if f"{layers[-1]}.".startswith(block))
        others = [f"^{re.escape(name)}$" for name in layers if not f"{name}.".startswith(last)]
        for name in load_plugins().formats:
            few = {
                "num_calibration_samples": 4,
                "format": name,
                "keep_ratio": 0.5,
                "exclude": others,
            }
            residual = {"residual_rank": 2} if name.endswith("residual") else {}
            try:
                folder = subject.compress(tmp_path / name, **few, **residual)
            except DependencyError:  # of a format that needs a library
                continue
            emulator = family.load(Checkpoint.open(str(folder)), "float32", "cpu")
            formed = [n for entry in Manifest.read(folder).layers.values() for n in entry["layers"]]
            assert formed, name
            for layer in formed:
                assert isinstance(emulator.get_submodule(layer), EmulatedLayer), (name, layer)
            with torch.no_grad():
                loss = loss_sum(family, emulator, batch)
            assert loss.terms > 0
            assert torch.isfinite(torch.tensor(loss.total)), name


def _data_files(example: Any) -> list[Path]:
    """Files that lie beside the example's model or below, some of each kind in each folder."""
    model = Path(example["model_name_or_path"]).absolute()
    kinds: dict[tuple[Path, str], list[Path]] = {}
    for file in sorted(path for path in model.parent.rglob("*") if path.is_file()):
        if not file.is_relative_to(model):
            kinds.setdefault((file.parent, file.suffix), []).append(file)
    return [file for files in kinds.values() for file in files[:FILES]]


@contextmanager
def _spoilt(file: Path) -> Iterator[None]:
    """Other bytes in the middle of a file while inside."""
    whole = file.read_bytes()
    middle = len(whole) // 2
    try:
        file.write_bytes(
            whole[:middle] + bytes(b ^ 1 for b in whole[middle : middle + 8]) + whole[middle + 8 :]
        )
        yield
    finally:
        file.write_bytes(whole)


def _equal(some: Sequence[Batch], others: Sequence[Batch]) -> bool:
    return len(some) == len(others) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(some, others)
    )
