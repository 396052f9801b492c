"""Formats side by side in one budget: the one with the least error wins, and what was asked for stays."""

import itertools

import pytest

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.config import PlanConfig, build
from emloc.extend.plugin_options import with_plugin_options
from emloc.planning.choices import KNOWN_ERRORS, choose, products_share, typical_error
from emloc.planning.fitting import device_bytes
from emloc.planning.setting import Setting, with_options
from emloc.planning.subject import Subject
from emloc.stages.registry import planned_stages
from emloc_llm.example import write_model

SIZES = dict(hidden_size=512, intermediate_size=1408, num_attention_heads=8, head_dim=64)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("wide"), num_hidden_layers=4, **SIZES)
    return Subject.of(str(folder), "auto")


def setting_of(subject, **options):
    given = {"model_name_or_path": "x", "max_length": 512, "device": "cuda", **options}
    return Setting(subject, build(with_plugin_options(PlanConfig), given, "plan"))


def most(setting):
    return max(device_bytes(setting, stage) for stage in planned_stages().values())


def test_bits_win_in_the_same_budget(wide):
    setting = setting_of(wide, gradient_checkpointing=True, per_device_train_batch_size=1)
    budget = most(with_options(setting, format="low_rank", keep_ratio=0.25))
    plan = choose(setting, budget, planned_stages())
    auto, low_rank = plan.choices
    assert (auto["format"], low_rank["format"]) == ("auto", "low_rank")
    assert plan.fits
    assert plan.setting.options.format == "auto"
    assert most(plan.setting) == auto["device_bytes"] <= budget
    assert low_rank["device_bytes"] <= budget
    assert auto["typical_error"] < low_rank["typical_error"]
    assert auto["products"] == 1
    assert low_rank["products"] < 1


def test_products_are_those_of_the_factors(wide):
    """Queries, keys and values share a right factor, as do gate and up."""
    setting = with_options(setting_of(wide), format="low_rank", keep_ratio=0.3)
    made = dense = 0
    for group in setting.emulator.groups:
        rank = group.form.sizes["rank"]
        made += rank * group.shape.d_in + sum(rank * d_out for d_out in group.shape.d_out)
        dense += sum(d_out * group.shape.d_in for d_out in group.shape.d_out)
    assert products_share(setting) == pytest.approx(made / dense)
    assert products_share(with_options(setting, format="auto")) == 1


@pytest.mark.parametrize(
    "asked",
    [{"format": "low_rank"}, {"keep_ratio": 0.4}, {"share_factors": False},
     {"format": "low_rank", "rank_pattern": {"q_proj": 8}}, {"format": "quantized", "bits": 3}],
)  # fmt: skip
def test_what_was_asked_for_stays(wide, asked):
    plan = choose(setting_of(wide, **asked), 4 << 30, planned_stages())
    assert [choice["format"] for choice in plan.choices] == [asked.get("format", "auto")]
    for name, value in asked.items():
        assert getattr(plan.setting.options, name) == value


def test_where_nothing_fits_it_is_the_least_that_counts(wide):
    plan = choose(setting_of(wide), 1 << 20, planned_stages())
    assert not plan.fits
    assert plan.smallest == min(choice["device_bytes"] for choice in plan.choices)


def test_errors_fall_with_bits():
    for name, known in KNOWN_ERRORS.items():
        errors = [typical_error(name, bits / 10) for bits in range(10, 130)]
        assert all(more >= less > 0 for more, less in itertools.pairwise(errors))
        assert [typical_error(name, bits) for bits in known] == pytest.approx(list(known.values()))
    assert typical_error("somebody's own", 4.0) is None


def test_compress_takes_the_choice(tmp_path, tiny):
    options = {"model_name_or_path": str(tiny.base), "dataset": str(tiny.data), "max_length": 96}
    manifest = Manifest.read(emloc.compress(output_dir=tmp_path / "e", memory="200MiB", **options))
    assert manifest.settings["format"] == "auto"
    assert manifest.measured["planned_bytes"] >= manifest.measured["peak_bytes"]
