"""The contract of every family, as a class of tests that a plugin's own tests inherit; it needs pytest.

    from emloc.testing import FamilyContract

    class TestMyFamily(FamilyContract):
        family = "mine"

        def example(self, folder, seed):  # where the family itself writes none
            ...

The family is looked up among the installed plugins. What it writes as its example is compressed, trained,
corrected, merged and scored, and each of the protocol's promises is compared with plain computations. Where
a family lacks a capability, what core does instead is held to.
"""

from pathlib import Path

try:
    import pytest
except ModuleNotFoundError as problem:
    raise ModuleNotFoundError(
        "emloc.testing.contract is a class of tests for pytest, which is not installed; pip install pytest."
    ) from problem

# Before any of them is imported, so that a failing law shows its values as any test does.
pytest.register_assert_rewrite(
    *(f"{__name__}.{path.stem}" for path in Path(__file__).parent.glob("*_laws.py"))
)

from emloc.testing.contract.family_contract import FamilyContract  # noqa: E402 (asserts are rewritten before)
from emloc.testing.contract.subject import Subject  # noqa: E402 (likewise)

__all__ = ["FamilyContract", "Subject"]
