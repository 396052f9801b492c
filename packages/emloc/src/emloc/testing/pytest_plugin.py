"""The pytest plugin: runs the contract of an installed family without a test file of one's own.

    pytest --pyargs emloc.testing.contract.test_family --emloc-family encoder

pip registers it with pytest; it imports nothing before it is asked for a family.
"""

import gc
import sys

import pytest

NEW_MODULES = 300
"""Imported modules that make it worth while to freeze again."""

_frozen = 0


def freeze_libraries() -> None:
    """Take imported libraries out of Python's garbage collection, once there are many new ones.

    Every stage collects before it measures memory, which takes a third of a second where a million objects of
    libraries are looked through, and longer than the stage itself on a tiny model.
    """
    global _frozen
    if len(sys.modules) > _frozen + NEW_MODULES:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


def pytest_runtest_setup() -> None:
    """Make the contract's many stages quick; other tests are left as they are."""
    if "emloc.testing.contract.fixtures" in sys.modules:
        freeze_libraries()


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
