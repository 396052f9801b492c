"""Every installed family with its example on disk, for the contract that all must pass.

Tests of what `TransformersFamily` gives a family of one's own ask for those of `own_families` as well, whose
plugins are installed while their turn lasts.
"""

import os
from pathlib import Path

import pytest
from own_families import OWN

from emloc.extend.plugins import load_plugins
from emloc.testing.contract.fixtures import made_subject

os.environ["HF_HUB_OFFLINE"] = "1"

FAMILIES = sorted(load_plugins().families)


@pytest.fixture(scope="session", params=FAMILIES)
def subject(request, tmp_path_factory):
    """One family with its tiny checkpoint and data, and the folders of all stages."""
    name = request.param
    plugin = OWN.get(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        with made_subject(name, tmp_path_factory.mktemp(name), plugin=plugin) as subject:
            yield subject


@pytest.fixture(scope="session")
def family(subject):
    """The family object."""
    return subject.family


@pytest.fixture(scope="session")
def example(subject):
    """Options that every stage accepts."""
    return subject.example


@pytest.fixture(scope="session")
def stages(subject):
    """The folders of all stages."""
    return subject.stages
