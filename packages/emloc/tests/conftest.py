"""The core by itself in every test, and the toy family with its example and its artefacts."""

import pytest
from alone import alone

from emloc.extend.capabilities import example_of
from emloc.extend.plugins import family_named
from emloc.testing import plugin_installed
from emloc.testing.contract import Subject

PLUGIN = "emloc.testing.toy_plugin"
LOW_RANK = {"format": "low_rank", "keep_ratio": 0.5}


@pytest.fixture(autouse=True)
def _alone():
    """Tests give the same with plugins installed and without."""
    with alone():
        yield


@pytest.fixture(scope="session")
def _made(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    with alone(), plugin_installed(PLUGIN):
        (root / "example").mkdir()
        example = example_of(family_named("toy"), root / "example")
        made = Subject("toy", root / "stages", example, {"compress": LOW_RANK})
        assert made.stages
    return made


@pytest.fixture
def toy(_made):
    """The toy's `Subject`, while its plugin is installed."""
    with plugin_installed(PLUGIN):
        yield _made
