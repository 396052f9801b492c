"""The pytest plugin: runs the contract of an installed family without a test file of one's own.

    pytest --pyargs emloc.testing.contract.test_family --emloc-family encoder

pip registers it with pytest; it imports nothing before it is asked for a family.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("emloc", "the contract of model families")
    group.addoption(
        "--emloc-family",
        action="append",
        default=[],
        metavar="NAME",
        help="a family that emloc.testing.contract.test_family runs; may be given several times",
    )
    group.addoption(
        "--emloc-plugin",
        metavar="MODULE",
        help="the module of its hooks, where its plugin is not installed",
    )
