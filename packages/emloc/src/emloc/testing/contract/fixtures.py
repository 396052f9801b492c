"""The fixture that the laws have in common."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest

from emloc.extend.capabilities import example_of
from emloc.extend.plugins import family_named
from emloc.testing.contract.subject import StageOptions, Subject
from emloc.testing.installed import plugin_installed


class SubjectFixture:
    """Statements of a class of tests about its family.

    Attributes:
        family: its name.
        plugin: the module of its plugin, where that is not installed; see `plugin_installed`.
        stage_options: further options by the name of a stage.
    """

    family: ClassVar[str]
    plugin: ClassVar[str | None] = None
    stage_options: ClassVar[StageOptions] = {}

    @classmethod
    def make_example(cls, folder: Path) -> Mapping[str, Any]:
        """Write a tiny model and data; returns options that every stage accepts.

        By default the family does (`WritesExample`).
        """
        return example_of(family_named(cls.family), folder)

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        """The family with its example and its artefacts, once for all tests of the class."""
        folder = tmp_path_factory.mktemp(cls.family)
        with nullcontext() if cls.plugin is None else plugin_installed(cls.plugin):
            (folder / "example").mkdir()
            example = cls.make_example(folder / "example")
            yield Subject(cls.family, folder / "stages", example, cls.stage_options)
