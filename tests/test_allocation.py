"""Ranks allocated by error, in every family: all stages work with a rank per layer."""

import pytest

import emloc
from emloc.artefacts.manifest import Manifest


@pytest.fixture(scope="module")
def emulator(family, example, tmp_path_factory):
    root = tmp_path_factory.mktemp(f"{family.name}-allocated")
    return emloc.compress(
        output_dir=root / "emulator",
        format="low_rank",
        keep_ratio=0.5,
        keep_ratio_allocation="error",
        **example,
    )


def test_no_more_parameters_are_kept_and_less_error_is_predicted(emulator):
    manifest = Manifest.read(emulator)
    layers = manifest.layers.values()
    cost = [sum(entry["d_out"]) + entry["d_in"] for entry in layers]
    left = sum(c * (e["uniform_rank"] - e["rank"]) for c, e in zip(cost, layers))
    assert 0 <= left < max(cost)
    assert any(entry["rank"] != entry["uniform_rank"] for entry in layers)
    errors = manifest.summary["predicted_error"]
    assert 0 < errors["allocated"] < errors["uniform"]
    assert all(entry["sensitivity"] > 0 for entry in layers)
    assert emloc.verify(path=emulator)["kind"] == "emulator"


def test_it_is_trained_on_and_corrected_for(emulator, example, tmp_path):
    data = {key: value for key, value in example.items() if key != "model_name_or_path"}
    adapter = emloc.train(
        emulator=str(emulator), output_dir=tmp_path / "adapter", max_steps=2, learning_rate=1e-2,
        lora_r=3, **data,
    )  # fmt: skip
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(emulator), output_dir=tmp_path / "corrected",
        limit="none", **data,
    )  # fmt: skip
    for name, entry in Manifest.read(corrected).layers.items():
        assert entry["residual_before"] > 0, name
        assert entry["residual_after"] < 1e-3 * entry["residual_before"], name
    assert emloc.verify(path=corrected)["kind"] == "corrected_adapter"
