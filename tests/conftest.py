"""Every installed family with its example on disk, for the contract that all must pass."""

import os

import pytest

from emloc.extend.plugins import load_plugins

os.environ["HF_HUB_OFFLINE"] = "1"

FAMILIES = sorted(load_plugins().families)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    """One family object."""
    return load_plugins().families[request.param].load()


@pytest.fixture(scope="session")
def example(family, tmp_path_factory):
    """The family's own tiny checkpoint and data: options that every stage accepts."""
    return dict(family.write_example(tmp_path_factory.mktemp(f"{family.name}-example"), seed=0))
