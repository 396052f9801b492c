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

try:
    import pytest
except ModuleNotFoundError as problem:
    raise ModuleNotFoundError(
        "emloc.testing.contract is a class of tests for pytest, which is not installed; pip install pytest."
    ) from problem

# Before they are imported, so that a failing law shows its values as any test does.
for _laws in (
    "block", "budget", "dtype", "family", "hostile", "life", "loss", "scoring", "stage", "streaming",
    "token", "training", "weight", "whole_module",
):  # fmt: skip
    pytest.register_assert_rewrite(f"{__name__}.{_laws}_laws")

from emloc.testing.contract.block_laws import BlockLaws  # noqa: E402
from emloc.testing.contract.budget_laws import BudgetLaws  # noqa: E402
from emloc.testing.contract.dtype_laws import DtypeLaws  # noqa: E402
from emloc.testing.contract.family_laws import FamilyLaws  # noqa: E402
from emloc.testing.contract.hostile_laws import HostileLaws  # noqa: E402
from emloc.testing.contract.life_laws import LifeLaws  # noqa: E402
from emloc.testing.contract.loss_laws import LossLaws  # noqa: E402
from emloc.testing.contract.scoring_laws import ScoringLaws  # noqa: E402
from emloc.testing.contract.stage_laws import StageLaws  # noqa: E402
from emloc.testing.contract.streaming_laws import StreamingLaws  # noqa: E402
from emloc.testing.contract.subject import Subject  # noqa: E402
from emloc.testing.contract.token_laws import TokenLaws  # noqa: E402
from emloc.testing.contract.training_laws import TrainingLaws  # noqa: E402
from emloc.testing.contract.weight_laws import WeightLaws  # noqa: E402
from emloc.testing.contract.whole_module_laws import WholeModuleLaws  # noqa: E402

__all__ = ["FamilyContract", "Subject"]


class FamilyContract(
    FamilyLaws,
    LossLaws,
    BlockLaws,
    DtypeLaws,
    TokenLaws,
    WeightLaws,
    StageLaws,
    BudgetLaws,
    TrainingLaws,
    StreamingLaws,
    WholeModuleLaws,
    ScoringLaws,
    LifeLaws,
    HostileLaws,
):
    """Tests of a family; inherit it in a class that pytest collects, and set `family`.

    All are of one `Subject`, which the fixture `subject` makes; a class that overrides the fixture may run
    them over several.
    """
