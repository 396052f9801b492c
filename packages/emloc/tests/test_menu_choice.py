"""Forms under one budget: what is not known of a layer, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from emloc.compression import menu_choice
from emloc.compression.groups import CompressionPlan, Group, make_plan
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
    (TRELLIS_RESIDUAL, {"format": "trellis_residual", "bits": 8}, "codes of 1, 2, 3, 4 bits, not 8"),
    (QUANTIZED_RESIDUAL, {"format": "quantized_residual", "bits": 1}, "codes of 2, 3, 4, 8 bits, not 1"),
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


def test_layers_of_one_input_may_differ_much_in_size():
    """A router's gate of one output beside its experts: the guess is a form that both may take."""
    shapes = {"wide": (64, 64), "gate": (1, 64)}
    config = config_of(format="auto", bits_per_weight=8.0)
    for order in (["wide", "gate"], ["gate", "wide"]):
        [group] = make_plan([order], shapes.__getitem__, config, lambda _: 4).groups
        assert group.guesses
        assert {form.sizes["bits"] for form in group.guesses} == {4, 8}
        sizes = [{form.sizes["bits"] for form in menu} for menu in group.menu]
        assert sizes == [{1, 2, 3, 4, 8} if name == "wide" else {4, 8} for name in order]


def test_a_pattern_may_ask_for_more_than_a_trellis_has():
    config = config_of(format="auto", keep_ratio_pattern={"a": 0.6})
    [group] = make_plan([["a"]], {"a": (256, 256)}.__getitem__, config, lambda _: 2).groups
    assert (group.form.format.name, group.form.sizes["bits"]) == ("quantized", 8)
    assert not group.menu


class _Stream:
    """A stream of one block whose layer is `weight`."""

    blocks = ("block",)
    device = torch.device("cpu")


@pytest.fixture
def priced(tmp_path, monkeypatch):
    """Prices the layer `block.a` by some tokens; gives its menu, and how often it was priced."""
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    shape = GroupShape(("block.a",), (256,), 256)
    plan = CompressionPlan(
        (Group(shape, QUANTIZED.form(8, 128), menu=(tuple(menu_of(shape, 2)),)),), {}
    )
    count = [0]

    def price(tokens):
        x = torch.randn(tokens, 256)
        moments = Moments.of_matrix("input", "block.a", x.T @ x, tokens)

        def streamed(stream, plan, batches, done, what, finish, forget, work):
            if "block" not in done:
                count[0] += 1
                probe = SimpleNamespace(sensitivity=lambda *given: 1.0)
                finish(SimpleNamespace(block="block", moments={"block.a": moments}, probe=probe))

        monkeypatch.setattr(menu_choice, "stream_moments", streamed)
        monkeypatch.setattr(menu_choice, "weights_of", lambda *given: [weight])
        menus = menu_choice.price_menus(_Stream(), plan, [], {"block.a": 2}, tmp_path)
        return menus["block.a"], count[0]

    price.folder = tmp_path
    price.plan = plan
    return price


def test_few_tokens_say_too_little_for_residuals(priced):
    """Factors would be fitted to the samples alone, and be priced as free of errors."""
    menu, _ = priced(100)
    assert {form.get("residual_rank", 0) for form in menu["forms"]} == {0, 8}
    assert len(menu["errors"]) == len(menu["bytes"]) == len(menu["forms"])
    for file in priced.folder.iterdir():
        file.unlink()
    menu, _ = priced(8)
    assert {form.get("residual_rank", 0) for form in menu["forms"]} == {0}
    assert all(error > 0 for error in menu["errors"])
    chosen, _ = with_chosen(priced.plan, {"block.a": menu}, {"block.a": 0.15})
    assert "residual_rank" not in chosen.groups[0].form.sizes


def test_prices_of_another_menu_are_not_taken_for_this_ones(priced):
    """An earlier version began the run: its places in a list would name other forms now."""
    menu, count = priced(600)
    assert priced(600) == (menu, count)
    [path] = priced.folder.iterdir()
    old = json.loads(path.read_text())
    for change in (
        lambda entry: entry.pop("offered"),
        lambda entry: entry["offered"].pop(),
        lambda entry: entry["offered"][0].update(bits=3),
    ):
        changed = json.loads(json.dumps(old))
        change(changed["block.a"])
        path.write_text(json.dumps(changed))
        assert priced(600)[1] == count + 1
        count += 1
