"""The contract of every family over the installed ones, and over one of a third party.

The toy family of `emloc.testing`, which needs none of their libraries, is run through it in core's own tests.
"""

import pytest

from emloc.testing.contract import FamilyContract


class TestEveryFamily(FamilyContract):
    @pytest.fixture(scope="session")
    @classmethod
    def subject(cls, subject):
        """The session's, by family, so that other tests have the same artefacts."""
        return subject
