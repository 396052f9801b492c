"""The compared methods on a pretended CUDA device: each builds its light model and puts its LoRA back."""

import pytest

import emloc_llm.training  # noqa: F401  # libraries look for CUDA as they are imported
from emloc.extend.methods import Task
from emloc.extend.plugins import method_named
from emloc.testing import pretend_device
from emloc_llm.example import write_model, write_rows

ENDS = {"protected_first": 1, "protected_last": 1}
METHODS = {
    "lora": {},
    "loram-rand": {**ENDS, "alignment": {"steps": 1, "batch_size": 2, "max_length": 64}},
    "loram-stru": ENDS,
    "offsite-tuning": {
        "trained_blocks": 1,
        "distillation": {"steps": 1, "batch_size": 2, "max_length": 64},
    },
    "upop": {"search_steps": 2},
    "svd": {},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return write_model(root / "base", num_hidden_layers=5), write_rows(
        root / "rows.jsonl", 8, seed=1
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_on_the_device(name, text, tmp_path):
    base, rows = text
    few = {"dataset": str(rows), "max_length": 96, "device": "cuda"}
    calibration = {**few, "num_calibration_samples": 4, "calibration_batch_size": 2}
    train = {**few, "max_steps": 1, "lora_r": 2}
    task = Task(
        str(base), 0.75, 0, calibration, train,
        {**calibration, "limit": "none"}, METHODS[name],
    )  # fmt: skip
    method = method_named(name).load()
    with pretend_device():
        light = method.build(task, tmp_path / "light")
        adapter = method.train(task, light, tmp_path / "adapter")
        recovered = method.recover(task, light, adapter, tmp_path / "recovered")
    assert list(recovered.rglob("*.safetensors"))
