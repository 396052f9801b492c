"""Writers: stock safetensors reads what we write; nothing half written appears."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from emloc.artefacts.file_digest import file_sha256
from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.stage_folder import SETTINGS_NAME, stage_folder
from emloc.errors import NumericalError, OutputError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
                max_size=6))  # fmt: skip
def test_stock_safetensors_reads_it(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    tensors = {
        f"t{i}": torch.randint(0, 2, tuple(shape)).to(dtype)
        for i, (dtype, shape) in enumerate(specs)
    }
    declared = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ShardWriter(path, declared) as shard:
        for name, tensor in tensors.items():
            shard.write(name, tensor)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert shard.sha256 == file_sha256(path)


def test_a_shard_that_is_not_finished_does_not_appear(tmp_path):
    path = tmp_path / "x.safetensors"
    declared = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with pytest.raises(RuntimeError, match="boom"), ShardWriter(path, declared) as shard:
        shard.write("a", torch.ones(2))
        raise RuntimeError("boom")
    with pytest.raises(ValueError, match="not written"), ShardWriter(path, declared) as shard:
        shard.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="expected a"), ShardWriter(path, declared) as shard:
        shard.write("b", torch.ones(2))
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "nan": [0.0, float("nan")],
    "inf": [float("inf"), 1.0],
    "minus-inf": [-float("inf"), 1.0],
    "mask-with-nan": [-float("inf"), float("nan")],
}


@pytest.mark.parametrize("values", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_no_number_is_not_written(tmp_path, dtype, values):
    tensor = torch.ones(3, 2, dtype=dtype)
    tensor[1] = torch.tensor(values)
    writer = ShardWriter(tmp_path / "x.safetensors", {"a": (dtype, (3, 2))}, "the base")
    with (
        pytest.raises(NumericalError, match="a of the base is NaN or infinite in"),
        writer as shard,
    ):
        shard.write("a", tensor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_looked_at_as_well(tmp_path, dtype):
    declared = {"a": (dtype, (2, 3))}
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, declared) as shard:
        shard.write("a", torch.full((2, 3), 448.0).to(dtype))
    assert torch.equal(load_file(path)["a"].float(), torch.full((2, 3), 448.0).to(dtype).float())
    wrong = torch.full((2, 3), float("nan")).to(dtype)
    with pytest.raises(NumericalError, match="float8"), ShardWriter(path, declared) as shard:
        shard.write("a", wrong)


def test_masks_and_whole_numbers_are_written_as_they_are(tmp_path):
    """Some checkpoints hold an additive attention mask among their buffers."""
    tensors = {
        "mask": torch.full((4, 4), -float("inf")).triu(1),
        "ids": torch.tensor([[-(2**63), 2**63 - 1]]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}) as shard:
        for name, tensor in tensors.items():
            shard.write(name, tensor)
    read = load_file(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_stage_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), stage_folder(target, {"a": 1}) as work:
        (work / "done").write_text("x")
        raise RuntimeError
    assert not target.exists()
    with stage_folder(target, {"a": 1}) as work:
        assert (work / "done").exists()  # the same settings continue
    assert sorted(p.name for p in target.iterdir()) == ["done"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_results_and_interrupted_runs_are_never_overwritten(tmp_path):
    target = tmp_path / "out"
    target.mkdir()  # an empty folder may be taken
    with pytest.raises(RuntimeError), stage_folder(target, {"a": 1}) as work:
        (work / "done").write_text("x")
        raise RuntimeError
    with pytest.raises(OutputError, match="other settings"), stage_folder(target, {"a": 2}):
        pass
    assert (work / "done").read_text() == "x"
    with stage_folder(target, {"a": 1}) as work:
        assert sorted(p.name for p in work.iterdir()) == ["done", SETTINGS_NAME]
    with pytest.raises(OutputError, match="nothing is ever overwritten"), stage_folder(target, {}):
        pass
    assert [p.name for p in target.iterdir()] == ["done"]
    with pytest.raises(RuntimeError), stage_folder(tmp_path / "refused", {}):
        raise RuntimeError
    assert not (tmp_path / "refused.partial").exists()
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis").write_text("x")
    with (
        pytest.raises(OutputError, match="was not made by emloc"),
        stage_folder(tmp_path / "mine", {}),
    ):
        pass
    assert (tmp_path / "mine.partial" / "thesis").exists()


def test_two_processes_do_not_write_one_folder(tmp_path):
    target = tmp_path / "out"
    with (
        stage_folder(target, {}),
        pytest.raises(OutputError, match="Another process"),
        stage_folder(target, {}),
    ):
        pass


SMALL_FILES = """
import resource, signal, sys, torch
from pathlib import Path
from emloc.errors import OutputError
from emloc.artefacts.shard_writer import ShardWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with ShardWriter(Path(sys.argv[1]), {"a": (torch.float32, (100_000,))}) as shard:
        shard.write("a", torch.ones(100_000))
except OutputError as problem:
    print(problem)
"""


def test_a_limit_on_files_is_one_sentence_and_leaves_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    run = subprocess.run(
        [sys.executable, "-c", SMALL_FILES, str(path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(f"{path} would be larger than the limit on the size of files")
    assert os.listdir(tmp_path) == []


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError), stage_folder(tmp_path / "file" / "out", {}):
        pass


def test_a_run_that_could_not_even_begin_is_in_nobodys_way(tmp_path, monkeypatch):
    """Its settings were never written: neither the same run nor another finds an interrupted one."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match="disk is full"), stage_folder(tmp_path / "out", {}):
            pass
    (tmp_path / "out.partial" / "stage_settings.json.tmp").write_text(
        '{"a": '
    )  # as a kill leaves it
    with stage_folder(tmp_path / "out", {"a": 1}) as work:
        (work / "file").write_text("whole")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
