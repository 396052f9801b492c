"""A LoRA that learnt beside blocks in few bits is not corrected for another rounding, nor merged unsaid."""

import pytest

import emloc
from emloc.errors import MismatchError
from emloc_llm.example import write_model, write_rows


@pytest.fixture
def options(tmp_path):
    return {
        "model_name_or_path": str(write_model(tmp_path / "base", hidden_size=64, head_dim=16)),
        "dataset": str(write_rows(tmp_path / "train.jsonl", 8, seed=1)),
        "max_length": 48, "per_device_train_batch_size": 4, "max_steps": 1, "device": "cpu", "lora_r": 2,
        "output_dir": tmp_path / "a",
    }  # fmt: skip


def test_stream_bits_are_told(tmp_path, options, capfd):
    adapter = emloc.train(stream=True, stream_from="ram", stream_bits=4, **options)
    with pytest.raises(MismatchError, match=r"with blocks in 4 bits \(stream_bits\)"):
        emloc.correct(adapter=str(adapter), output_dir=tmp_path / "c", limit=1)
    capfd.readouterr()
    emloc.merge(adapter=str(adapter), output_dir=tmp_path / "m")
    assert "was trained beside blocks in 4 bits" in capfd.readouterr().err


@pytest.mark.parametrize("option", [{"stream_from": "ram"}, {"stream_inputs": "disk"}])
def test_how_to_stream_is_told_to_do_nothing_where_nothing_streams(options, option, capfd):
    [name] = option
    emloc.train(**option, **options)
    assert (
        f"train: {name}={option[name]} does nothing without stream=true" in capfd.readouterr().err
    )
