"""The contract of every family on the toy, which needs nothing but the core."""

import pytest

from emloc.testing.contract import FamilyContract


class TestToy(FamilyContract):
    @pytest.fixture
    def subject(self, toy):
        """The session's, so that other tests have the same artefacts."""
        return toy
