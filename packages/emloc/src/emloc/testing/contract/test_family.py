"""The contract over the families that `--emloc-family` names (`emloc.testing.pytest_plugin`)."""

from collections.abc import Iterator, Sequence

import pytest

from emloc.testing.contract import FamilyContract, Subject
from emloc.testing.contract.fixtures import made_subject


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One subject for each family that was asked for."""
    families: Sequence[str] = metafunc.config.getoption("--emloc-family") or ()
    metafunc.parametrize("subject", families, indirect=True, scope="class")


class TestFamily(FamilyContract):
    """Each family by its own example."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(
        cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Subject]:
        """The family with its example and its artefacts."""
        plugin = request.config.getoption("--emloc-plugin")
        folder = tmp_path_factory.mktemp(request.param)
        with made_subject(request.param, folder, plugin=plugin) as subject:
            yield subject
