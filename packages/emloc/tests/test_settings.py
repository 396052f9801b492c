"""What decides that an artefact is complete, and what is said where it is not."""

import pytest

from emloc import config as configs
from emloc.artefacts.intact import is_complete
from emloc.artefacts.kinds import EMULATOR, MERGED_MODEL
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.artefacts.settings import difference, same
from emloc.artefacts.stage_folder import stage_folder
from emloc.errors import OutputError
from emloc.options.marks import without_effect

BASE = ModelReference(name_or_path="m", digest="d" * 64)
NOW = {"keep_ratio": 0.3, "seed": 0, "data_digest": "b"}


def write(folder, settings, kind="emulator"):
    folder.mkdir()
    Manifest(kind=kind, family="toy", base_model=BASE, settings=settings).write(folder)
    return folder


def test_options_without_effect_are_told_where_they_are_declared():
    assert without_effect(configs.TrainConfig) == {
        "device", "family", "memory", "gradient_checkpointing", "logging_steps", "save_steps",
        "save_total_limit", "resume_from_checkpoint", "report_to", "stream_from", "stream_inputs",
    }  # fmt: skip
    for kind in (configs.CompressConfig, configs.CorrectConfig):
        assert without_effect(kind) == {"device", "family", "memory"}
    assert without_effect(configs.EvaluateConfig) == {"allow_mismatch", "device", "family"}


def test_an_artefact_of_before_is_complete_on_another_device(tmp_path, capsys):
    out = write(tmp_path / "out", {**NOW, "device": "cpu", "gradient_checkpointing": True})
    assert is_complete("compress", EMULATOR, out, NOW, "toy")
    assert "complete already" in capsys.readouterr().err
    assert not is_complete("compress", EMULATOR, tmp_path / "none", NOW, "toy")


def test_another_plugin_that_recognises_the_model_changes_nothing(tmp_path):
    """Settings name the family only where there is a choice; the manifest always does."""
    out = write(tmp_path / "out", NOW)
    assert is_complete("compress", EMULATOR, out, {**NOW, "family": "toy"}, "toy")
    assert same({**NOW, "family": "toy"}, NOW)
    assert not same({**NOW, "family": "a"}, {**NOW, "family": "b"})
    with pytest.raises(OutputError, match="made with the family toy, now other"):
        is_complete("compress", EMULATOR, out, {**NOW, "family": "other"}, "other")


def test_options_of_text_were_once_recorded_for_every_family():
    """At their defaults they said nothing; a family of text still compares them."""
    before = {**NOW, "packing": False, "answer": "auto", "num_answers": None, "max_length": 1024,
              "max_new_tokens": 0, "column_map": {}, "eval_data_digest": None}  # fmt: skip
    assert same(before, NOW)
    assert not same({**before, "max_length": 64}, NOW)
    assert not same(before, {**before, "max_new_tokens": 256})
    assert not same({**before, "packing": True}, NOW)
    assert not same(NOW, {**NOW, "packing": False})
    assert not same(before, {**before, "packing": True})


def test_a_folder_of_other_settings_says_which_differ(tmp_path):
    out = write(tmp_path / "out", {"keep_ratio": 0.4, "seed": 0, "data_digest": "a", "old": None})
    with pytest.raises(OutputError) as problem:
        is_complete("compress", EMULATOR, out, NOW, "toy")
    assert str(problem.value) == (
        f"{out} was made with keep_ratio 0.4, now 0.3; old null, now not given; other data. Choose "
        f"another output_dir or remove it; nothing is ever overwritten."
    )
    with pytest.raises(OutputError, match="of another kind"):
        is_complete("merge", MERGED_MODEL, out, NOW, "toy")


def test_an_interrupted_run_of_other_settings_says_which_differ(tmp_path):
    def interrupted(settings):
        with pytest.raises(KeyboardInterrupt), stage_folder(tmp_path / "out", settings) as work:
            (work / "done").write_text("x")
            raise KeyboardInterrupt

    interrupted({**NOW, "device": "cuda"})
    interrupted(NOW)  # goes on in it
    with (
        pytest.raises(
            OutputError, match=r"other settings: it was made with keep_ratio 0\.3, now 0\.4\. "
        ),
        stage_folder(tmp_path / "out", {**NOW, "keep_ratio": 0.4}),
    ):
        pass


def test_many_differences_and_long_values_are_cut():
    now = {f"option{i}": "x" * 200 for i in range(6)}
    said = difference({}, now)
    assert said.startswith("option0 not given, now xxx")
    assert "other values of 4 more options" in said
    assert len(said) < 250
    assert same({"a": (1, 2)}, {"a": [1, 2]})
    assert same({"a": 1, "path": "x"}, {"a": 1, "path": "y"}, {"path"})


def test_the_order_of_patterns_counts_and_that_of_other_mappings_does_not():
    one = {**NOW, "rank_pattern": {"a": 1, "b": 2}, "column_map": {"a": "x", "b": "y"}}
    assert same(one, {**one, "column_map": {"b": "y", "a": "x"}})
    other = {**one, "rank_pattern": {"b": 2, "a": 1}}
    assert not same(one, other)
    assert difference(one, other) == 'rank_pattern {"a": 1, "b": 2}, now {"b": 2, "a": 1}'


def test_a_digest_that_was_not_recorded_says_nothing():
    assert same(NOW, {**NOW, "companions_digest": "c"})
    assert not same({**NOW, "companions_digest": "a"}, {**NOW, "companions_digest": "c"})


def test_the_folder_of_pictures_was_once_recorded_beside_their_digest():
    assert same({**NOW, "instance_data_dir": "/pictures"}, NOW)
