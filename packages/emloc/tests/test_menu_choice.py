"""Forms under one budget: what is not known of a layer, and what is refused."""

import pytest
import torch

from emloc.compression import menu_choice
from emloc.compression.groups import CompressionPlan, Group
from emloc.compression.menu_choice import with_chosen
from emloc.config import CompressConfig
from emloc.errors import ConfigError, NumericalError
from emloc.formats.coded_low_rank import CODED_LOW_RANK
from emloc.formats.layer_format import GroupShape
from emloc.formats.menu import menu_of
from emloc.formats.quantized import QUANTIZED
from emloc.formats.quantized_residual import QUANTIZED_RESIDUAL
from emloc.formats.trellis import TRELLIS
from emloc.formats.trellis_residual import TRELLIS_RESIDUAL
from emloc.linalg.gram import Moments
from emloc.linalg.ridged_cholesky import ridged_cholesky
from emloc.linalg.rounding import squared_output

SHAPE = GroupShape(("a",), (128,), 256)


def config_of(**options):
    return CompressConfig(model_name_or_path="m", output_dir="o", dataset="d", **options)


def test_a_layer_that_the_probe_did_not_show_counts_as_others_do():
    """An expert that only later micro-batches choose is not taken for one whose error costs nothing."""
    shapes = [GroupShape((name,), (128,), 256) for name in ("seen", "unseen")]
    plan = CompressionPlan(
        tuple(Group(s, QUANTIZED.form(2, 128), menu=(tuple(menu_of(s, 2)),)) for s in shapes), {}
    )
    forms = menu_of(SHAPE, 2)
    sizes = [2.0 ** (-2 * form.sizes["bits"]) for form in forms]
    menu = {"forms": [f.as_json() for f in forms],
            "bytes": [100 * f.sizes["bits"] + 100 / f.sizes["group_size"] for f in forms],
            "errors": sizes, "dense_bytes": 1600}  # fmt: skip
    menus = {"seen": {**menu, "sensitivity": 3.0}, "unseen": {**menu, "sensitivity": None}}
    chosen, _ = with_chosen(plan, menus, {"seen": 0.27, "unseen": 0.27})
    assert [group.form.sizes["bits"] for group in chosen.groups] == [4, 4]


def test_a_part_of_the_rows_tells_what_all_lose(monkeypatch):
    """Rows that differ much in size, and so in what they lose."""
    torch.manual_seed(0)
    weight = torch.randn(900, 96) * torch.exp(0.5 * torch.randn(900, 1))
    x = torch.randn(400, 96) * torch.exp(torch.randn(96))
    moments = Moments.of_matrix("input", "a", x.T @ x, 400)
    forms = menu_of(GroupShape(("a",), (900,), 96), 2)
    _, share, some = menu_choice.price_forms(weight, moments, forms)
    monkeypatch.setattr(menu_choice, "PRICED_ROWS", 900)
    _, same, whole = menu_choice.price_forms(weight, moments, forms)
    assert share == same
    assert some != whole
    *few, eight = zip(some, whole)
    for predicted, error in few:
        assert predicted == pytest.approx(error, rel=0.05)
    # A few rows lose most of what 8 bits lose, and that is next to nothing.
    assert eight[0] == pytest.approx(eight[1], rel=0.3)


def test_a_pattern_is_a_layers_own_budget():
    fixed = {"format": "quantized", "bits": 4}
    dense = QUANTIZED.decide(SHAPE, config_of(keep_ratio_pattern={"a": 1.0}, **fixed), 2)
    assert dense == "keep_ratio 1"
    less = QUANTIZED.decide(SHAPE, config_of(keep_ratio_pattern={"a": 0.2}, **fixed), 2)
    assert less.sizes["bits"] == 3
    assert QUANTIZED.decide(SHAPE, config_of(**fixed), 2).sizes["bits"] == 4


@pytest.mark.parametrize(("format", "options", "said"), [
    (CODED_LOW_RANK, {"format": "coded_low_rank", "factor_bits": 16}, "pass format=low_rank"),
    (QUANTIZED, {"format": "quantized", "bits": 1}, "pass format=trellis"),
    (TRELLIS, {"format": "trellis", "bits": 8}, "pass format=quantized"),
    (TRELLIS, {"format": "trellis", "bits": 8, "residual_rank": 2}, "pass format=quantized"),
    (TRELLIS, {"format": "trellis", "factor_bits": 8}, "without a residual_rank"),
    (TRELLIS_RESIDUAL, {"format": "trellis_residual", "residual_rank": 0}, "pass format=trellis"),
    (QUANTIZED, {"format": "quantized", "factor_bits": 8}, "without a residual_rank"),
    (QUANTIZED_RESIDUAL, {"format": "quantized_residual", "residual_rank": 0},
     "pass format=quantized"),
])  # fmt: skip
def test_sizes_that_mean_nothing_are_refused(format, options, said):
    with pytest.raises(ConfigError, match=said):
        format.decide(SHAPE, config_of(**options), 2)


def test_what_is_no_number_is_never_the_best():
    assert squared_output(torch.full((2, 3), torch.nan), torch.eye(3)) != 0
    moments = Moments.of_matrix("input", "a", torch.full((8, 8), 1e38), 1)
    with pytest.raises(NumericalError):
        QUANTIZED.fit(
            [torch.full((4, 8), 1e20)], moments, GroupShape(("a",), (4,), 8), QUANTIZED.form(4, 32)
        )
    with pytest.raises(NumericalError, match="hold NaN or infinity"):
        ridged_cholesky(torch.full((3, 3), torch.nan), 1.0)
