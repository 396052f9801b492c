"""kill -9 at random writes of every stage, then the same command again: the result is the same bytes."""

import random
import signal

import pytest
from warm_python import run_python

KILLER = """
import os, random, signal, sys
import emloc

kill_at, count = int(sys.argv[1]), 0
real = os.fsync

def fsync(handle):
    # Every file that a stage writes is synced before it gets its name.
    global count
    count += 1
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)

os.fsync = fsync
stage, *pairs = sys.argv[2:]
getattr(emloc, stage)(**dict(pair.split("=", 1) for pair in pairs))
print(count)
"""


def run(kill_at, stage, options):
    pairs = [f"{key}={value}" for key, value in options.items()]
    return run_python("-c", KILLER, kill_at, stage, *pairs)


@pytest.mark.parametrize("case", ["compress", "allocate", "train", "correct", "merge"])
def test_killed_and_run_again(case, tiny, tmp_path):
    common = {"dataset": tiny.data, "max_length": 96}
    ratio = {"model_name_or_path": tiny.base, "format": "low_rank", "keep_ratio": 0.5, **common}
    options, expected = {
        "compress": (ratio, tiny.emulator),
        "allocate": ({**ratio, "keep_ratio_allocation": "error"}, None),
        "train": (tiny.train_options, tiny.adapter),
        "correct": ({**tiny.correct_options, "limit": "none"}, tiny.corrected),
        "merge": ({"adapter": tiny.corrected}, None),
    }[case]
    stage = {"allocate": "compress"}.get(case, case)
    output = tmp_path / "out"
    draw = random.Random(f"{case} 0")
    # compress writes the settings, then a shard and a report per block, and the rest; where ranks are
    # allocated it writes all shards and reports once more, of which the 9th write is a report.
    first, last = {"compress": (2, 12), "allocate": (9, 9), "train": (2, 2), "correct": (2, 4),
                   "merge": (2, 5)}[case]  # fmt: skip
    killed = run(draw.randint(first, last), stage, {**options, "output_dir": output})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    left = list((tmp_path / "out.partial").iterdir())
    assert left
    again = run(0, stage, {**options, "output_dir": output})
    assert again.returncode == 0, again.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    if expected is None:
        expected = tmp_path / "whole"
        assert run(0, stage, {**options, "output_dir": expected}).returncode == 0
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    assert names == sorted(path.name for path in output.glob("*.safetensors"))
    for name in names:
        assert (output / name).read_bytes() == (expected / name).read_bytes()
    assert not list(output.rglob("*.tmp"))


def test_finished_blocks_are_not_factorised_again(tiny, tmp_path, monkeypatch):
    """What a killed run finished is kept: its shard is not written a second time."""
    import emloc
    from emloc.formats.low_rank import LowRank

    options = {"model_name_or_path": str(tiny.base), "dataset": str(tiny.data), "max_length": 96,
               "format": "low_rank", "keep_ratio": 0.5, "output_dir": tmp_path / "e"}  # fmt: skip
    real, done = LowRank.fit, []

    def stop_in_the_second_block(self, weights, moments, *others):
        if moments.name.startswith("model.layers.1"):
            raise KeyboardInterrupt
        return real(self, weights, moments, *others)

    def note(self, weights, moments, *others):
        done.append(moments.name)
        return real(self, weights, moments, *others)

    monkeypatch.setattr(LowRank, "fit", stop_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        emloc.compress(**options)
    monkeypatch.setattr(LowRank, "fit", note)
    folder = emloc.compress(**options)
    assert {name.split(".")[2] for name in done} == {"1", "2"}
    for shard in tiny.emulator.glob("*.safetensors"):
        assert (folder / shard.name).read_bytes() == shard.read_bytes()
