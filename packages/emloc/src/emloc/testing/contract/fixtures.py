"""The fixtures that the laws have in common."""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest

from emloc.extend.capabilities import example_of
from emloc.extend.plugins import family_named
from emloc.testing.contract.subject import StageOptions, Subject
from emloc.testing.installed import plugin_installed

NEW_MODULES = 300
"""Imported modules that make it worth while to take them out of the garbage collection."""

_seen = 0


@contextmanager
def made_subject(
    family: str,
    folder: Path,
    example: Callable[[Path], Mapping[str, Any]] | None = None,
    stage_options: StageOptions | None = None,
    plugin: str | None = None,
) -> Iterator[Subject]:
    """A family with an example in `folder`, while its plugin is installed.

    Args:
        example: writes a tiny model and data into a folder; by default the family does.
        plugin: the module of its hooks; None: pip installed it.
    """
    with nullcontext() if plugin is None else plugin_installed(plugin):
        place = folder / "example"
        place.mkdir()
        options = example_of(family_named(family), place) if example is None else example(place)
        yield Subject(family, folder / "stages", options, stage_options)


class SubjectFixture:
    """Statements of a class of tests about its family.

    Attributes:
        family: its name.
        plugin: the module of its plugin, where that is not installed; see `plugin_installed`.
        stage_options: further options by the name of a stage.
        seed: of the example.
    """

    family: ClassVar[str]
    plugin: ClassVar[str | None] = None
    stage_options: ClassVar[StageOptions] = {}
    seed: ClassVar[int] = 0

    def example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """Write a tiny model and data; returns options that every stage accepts.

        By default the family does (`WritesExample`). At least 8 samples, and 3 blocks where blocks are many.
        """
        return example_of(family_named(self.family), folder, seed)

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        """The family with its example and its artefacts, once for all tests of the class."""

        def example(place: Path) -> Mapping[str, Any]:
            return cls().example(place, cls.seed)

        folder = tmp_path_factory.mktemp(cls.family)
        with made_subject(cls.family, folder, example, cls.stage_options, cls.plugin) as subject:
            yield subject

    @pytest.fixture(autouse=True)
    def _without_libraries(self) -> None:
        """Take imported libraries out of Python's garbage collection.

        Every stage collects before it measures memory, which takes longer than the stage itself on a tiny
        model where a million objects of libraries are looked through.
        """
        global _seen
        if len(sys.modules) > _seen + NEW_MODULES:
            gc.collect()
            gc.freeze()
            _seen = len(sys.modules)
