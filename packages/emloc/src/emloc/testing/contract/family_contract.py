"""All laws as one class of tests."""

from emloc.testing.contract.block_laws import BlockLaws
from emloc.testing.contract.budget_laws import BudgetLaws
from emloc.testing.contract.dtype_laws import DtypeLaws
from emloc.testing.contract.family_laws import FamilyLaws
from emloc.testing.contract.hostile_laws import HostileLaws
from emloc.testing.contract.life_laws import LifeLaws
from emloc.testing.contract.loss_laws import LossLaws
from emloc.testing.contract.scoring_laws import ScoringLaws
from emloc.testing.contract.stage_laws import StageLaws
from emloc.testing.contract.streaming_laws import StreamingLaws
from emloc.testing.contract.token_laws import TokenLaws
from emloc.testing.contract.training_laws import TrainingLaws
from emloc.testing.contract.weight_laws import WeightLaws
from emloc.testing.contract.whole_module_laws import WholeModuleLaws


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
