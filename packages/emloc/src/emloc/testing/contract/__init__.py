"""The contract of every family, as a class of tests that a plugin's own tests inherit; it needs pytest.

    from emloc.testing.contract import FamilyContract

    class TestMyFamily(FamilyContract):
        family = "mine"

The family is looked up among the installed plugins. What it writes as its example is compressed, trained,
corrected, merged and scored, and each of the protocol's promises is compared with plain computations. Where
a family lacks a capability, what core does instead is held to.
"""

try:
    import pytest
except ModuleNotFoundError as problem:
    raise ModuleNotFoundError(
        "emloc.testing.contract is a class of tests for pytest, which is not installed; pip install pytest."
    ) from problem

# Before they are imported, so that a failing law shows its values as any test does.
pytest.register_assert_rewrite(f"{__name__}.family_laws", f"{__name__}.stage_laws")

from emloc.testing.contract.family_laws import FamilyLaws  # noqa: E402
from emloc.testing.contract.stage_laws import StageLaws  # noqa: E402
from emloc.testing.contract.subject import Subject  # noqa: E402

__all__ = ["FamilyContract", "Subject"]


class FamilyContract(FamilyLaws, StageLaws):
    """Tests of a family; inherit it in a class that pytest collects, and set `family`.

    All are of one `Subject`, which the fixture `subject` makes; a class that overrides the fixture may run
    them over several.
    """
