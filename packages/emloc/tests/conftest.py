"""The core by itself in every test, and the toy family with its example and its artefacts."""

import pytest
from alone import alone

from emloc.testing import plugin_installed
from emloc.testing.contract.fixtures import made_subject

PLUGIN = "emloc.testing.toy_plugin"
LOW_RANK = {"format": "low_rank", "keep_ratio": 0.5}


@pytest.fixture(autouse=True)
def _alone():
    """Tests give the same with plugins installed and without."""
    with alone():
        yield


@pytest.fixture(scope="session")
def _made(tmp_path_factory):
    folder, options = tmp_path_factory.mktemp("toy"), {"compress": LOW_RANK}
    with alone(), made_subject("toy", folder, stage_options=options, plugin=PLUGIN) as made:
        assert made.stages
    return made


@pytest.fixture
def toy(_made):
    """The toy's `Subject`, while its plugin is installed."""
    with plugin_installed(PLUGIN):
        yield _made
