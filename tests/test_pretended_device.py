"""Stages on a pretended CUDA device: they never mix devices, and give what they give on the CPU."""

from pathlib import Path

import pytest

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.testing import pretend_device


@pytest.fixture
def card():
    with pretend_device() as traffic:
        yield traffic


@pytest.fixture
def data(example):
    return {key: value for key, value in example.items() if key != "model_name_or_path"}


def same_weights(one, other):
    files = [path.relative_to(one) for path in Path(one).rglob("*.safetensors")]
    assert files
    for file in files:
        assert (Path(one) / file).read_bytes() == (Path(other) / file).read_bytes(), file


CARD = {"allocator slack", "CUDA context"}
"""Lines of a plan that nothing here can take."""


def test_compress_and_correct_and_merge(example, data, stages, card, tmp_path):
    emulator = emloc.compress(
        output_dir=tmp_path / "emulator", keep_ratio=0.5, device="cuda", **example
    )
    same_weights(stages["emulator"], emulator)
    corrected = emloc.correct(
        adapter=str(stages["adapter"]), emulator=str(emulator), output_dir=tmp_path / "corrected",
        limit="none", device="cuda", **data,
    )  # fmt: skip
    same_weights(stages["corrected"], corrected)
    merged = emloc.merge(adapter=str(corrected), output_dir=tmp_path / "merged")
    same_weights(stages["merged"], merged)
    assert card.live_bytes == 0
    assert card.unfinished == 0
    plan = emloc.plan(keep_ratio=0.5, device="cuda", **example)["stages"]["compress"]
    planned = sum(n for line, n in plan["device_bytes"]["lines"].items() if line not in CARD)
    measured = Manifest.read(emulator).measured["peak_bytes"]
    assert planned / 5 < measured <= planned  # the plan is of the longest samples allowed
    assert plan["host_bytes"]["lines"]["suspended calls"] > 0


def test_a_limit_is_chosen(stages, data, tmp_path):
    def choose(folder, device):
        return emloc.correct(
            adapter=str(stages["adapter"]), emulator=str(stages["emulator"]),
            output_dir=folder, limit="auto", num_calibration_samples=8, device=device, **data,
        )  # fmt: skip

    with pretend_device():
        there = choose(tmp_path / "there", "cuda")
    same_weights(choose(tmp_path / "here", "cpu"), there)


def test_a_loss_is_measured(stages, data, card):
    few = {"max_new_tokens": 0} if "max_length" in data else {"num_noise_samples": 2}
    emulator = {"model_name_or_path": str(stages["emulator"])}
    there = emloc.evaluate(device="cuda", **emulator, **data, **few)["loss"]
    assert there == emloc.evaluate(device="cpu", **emulator, **data, **few)["loss"]


def test_an_adapter_is_trained(stages, data, card, tmp_path):
    """With the family's own trainer, in bfloat16 as on a card: to numbers, on the device."""
    adapter = emloc.train(
        emulator=str(stages["emulator"]), output_dir=tmp_path / "adapter", max_steps=1,
        device="cuda", **data,
    )  # fmt: skip
    assert (adapter / "emloc.json").is_file()
    assert card.peak_bytes > 0
