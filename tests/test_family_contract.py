"""The contract of every family over the installed ones.

One of a third party runs it outside of this repository (`test_contract_elsewhere.py`), and the toy family of
`emloc.testing`, which needs none of their libraries, in core's own tests.
"""

import pytest

from emloc.extend.plugins import load_plugins
from emloc.testing import FamilyContract
from emloc.testing.contract.family_laws import apart_though_shared

installed = pytest.mark.parametrize(
    "subject", sorted(load_plugins().families), indirect=True, scope="session"
)


@installed
class TestEveryFamily(FamilyContract):
    @pytest.fixture(scope="session")
    @classmethod
    def subject(cls, subject):
        """The session's, by family, so that other tests have the same artefacts."""
        return subject


def test_what_reads_one_tensor_shares_its_factor(subject):
    """Our own families do, though the contract promises it of none."""
    assert apart_though_shared(subject) == []
