"""Laws of files that are wrong: one sentence, and nothing is written."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.layout import layout_of
from emloc.errors import EmlocError, UnexpectedError
from emloc.extend.capabilities import native_of
from emloc.extend.plugins import load_plugins
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject

ODD: tuple[Any, ...] = (None, 7, "", [], {})
"""Values of kinds that entries of a config may have in models of other kinds."""


class HostileLaws(SubjectFixture):
    """Promises of every stage and of `recognises` about checkpoints that are not as they should be."""

    def test_wrong_files_are_one_sentence_and_nothing_is_written(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """Weights cut short, of another shape or with a NaN; a config that is no text, or another model's."""
        layer = list(subject.family.layer_groups(subject.skeleton))[-1][-1]
        stored = subject.family.stored(subject.skeleton, f"{layer}.weight", subject.checkpoint)
        assert stored is not None
        name = stored.names[0]
        changes: dict[str, Callable[[Path], None]] = {
            "cut": _cut,
            "not a number": lambda folder: _put(folder, name, lambda w: w * float("nan")),
            "shape": lambda folder: _put(folder, name, lambda w: w[:-1].contiguous()),
            "bytes": lambda folder: _write(folder, b'{"model_type": "\xff\xfe"}'),
            "other": lambda folder: _write(folder, b'{"model_type": "none-such"}'),
        }
        few = {"num_calibration_samples": 2, "format": "low_rank", "keep_ratio": 0.5}
        for what, change in changes.items():
            folder = Path(shutil.copytree(subject.example["model_name_or_path"], tmp_path / what))
            change(folder)
            with pytest.raises(EmlocError) as refused:
                subject.compress(tmp_path / "out", model_name_or_path=str(folder), **few)
            assert not isinstance(refused.value, UnexpectedError), what
            assert "\n" not in str(refused.value), what
            assert not (tmp_path / "out").exists(), what
            if what in ("cut", "shape"):
                with pytest.raises(EmlocError):
                    subject.family.load(
                        native_of(subject.family, Checkpoint.open(str(folder))), "float32", "cpu"
                    )

    def test_a_size_that_does_not_fit_is_refused_by_name(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """Every whole number of the config, one larger: the model is loaded all the same, or refused."""
        source = Path(subject.example["model_name_or_path"])
        folder = Path(shutil.copytree(source, tmp_path / "model"))
        config = json.loads(_config(folder).read_text("utf-8"))
        for change in _larger(config):
            change(1)
            _write(folder, json.dumps(config).encode())
            said = ""
            try:
                checkpoint = native_of(subject.family, Checkpoint.open(str(folder)))
                subject.family.load(checkpoint, "float32", "cpu")
            except EmlocError as refusal:
                said = str(refusal)
            assert "\n" not in said
            change(-1)

    def test_configs_of_other_models_are_not_recognised_and_break_nothing(
        self, subject: Subject
    ) -> None:
        """`recognises` sees the config of every model that anyone opens."""
        entry = load_plugins().families[subject.family.name]
        config = dict(subject.checkpoint.config)
        assert entry.recognises(config)
        assert not entry.recognises({})
        assert not entry.recognises({"model_type": "none-such", "architectures": ["NoSuchModel"]})
        for key in config:
            for value in ODD:
                entry.recognises({**config, key: value})


def _config(folder: Path) -> Path:
    """The config of the model itself."""
    return folder / layout_of(folder).config


def _write(folder: Path, content: bytes) -> None:
    """Write another config."""
    path = _config(folder)
    path.unlink()  # it may be a link
    path.write_bytes(content)


def _cut(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[: len(content) // 2])


def _put(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name])
            file.unlink()
            save_file(tensors, file, metadata={"format": "pt"})


def _larger(config: Any) -> Iterator[Callable[[int], None]]:
    """A change by so much for each whole number in a config."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if isinstance(value, (dict, list)):
            yield from _larger(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:

            def change(by: int, key: Any = key) -> None:
                config[key] += by

            yield change
