"""A kill or a loss of power at any moment: what has its name is whole, and nothing else stays behind."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from emloc.artefacts.durable import sync_folder, sync_tree
from emloc.artefacts.intact import require_intact
from emloc.artefacts.kinds import EMULATOR
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.artefacts.output_lock import output_lock
from emloc.errors import OutputError
from emloc.stages.frame import Artefact, Figures, Written, digests

BASE = ModelReference(name_or_path="base", digest="0" * 64)
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
"""What is audited of a process that changes files."""


def make(out, **settings):
    def work(folder):
        (folder / "inner").mkdir(exist_ok=True)
        (folder / "inner/tokenizer.json").write_text("{}")  # as a library writes it, unsynced
        (folder / "weights").write_bytes(b"values")
        (folder / "block").write_text("for a continued run")
        (folder / "later").write_text("for a continued run")
        return Written(digests(folder, ["weights"]), leftovers=["block", "later"])

    return Artefact("make", EMULATOR, out, {"rank": 3, **settings}, "toy", BASE).write(work)


def killed(function, moment):
    """Run in a process that is killed at a change of files, the `moment`th; False where it ended before."""
    child = os.fork()
    if child == 0:
        count = 0

        def audit(event, _):
            nonlocal count
            count += event in EVENTS
            if count == moment:
                os._exit(9)

        try:
            sys.addaudithook(audit)
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_at_any_moment_leaves_nothing_behind(tmp_path, monkeypatch):
    """Between any two changes of files, renames among them; the same command then ends as if never killed."""
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    out, complete, moment = tmp_path / "place/out", 0, 1
    while killed(lambda: make(out), moment):
        if out.exists():
            complete += 1
            require_intact(out, Manifest.read(out), every=True, fresh=True)
            names = {path.name for path in out.iterdir()}
            assert names == {"inner", "weights", "emloc.json"}, moment
        make(out)
        require_intact(out, Manifest.read(out), every=True, fresh=True)
        assert {path.name for path in out.iterdir()} == {"inner", "weights", "emloc.json"}, moment
        assert [path.name for path in out.parent.iterdir()] == ["out"], moment
        shutil.rmtree(tmp_path / "place")
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        moment += 1
    assert moment > 20
    assert complete  # some came after the last rename


def test_a_finished_artefact_that_lacks_its_name_is_not_made_again(tmp_path):
    """Whatever the next run asks for: another one is refused as it would have been."""
    out = make(tmp_path / "out")
    out.rename(tmp_path / "out.partial")
    with pytest.raises(OutputError, match="rank 3, now 4"):
        make(tmp_path / "out", rank=4)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shutil.move(out, tmp_path / "out.partial")
    (tmp_path / "out.partial/thesis").write_text("somebody's own")
    with pytest.raises(OutputError, match="was not made by emloc"):
        make(out)
    assert (tmp_path / "out.partial/thesis").is_file()


def test_all_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    """Files and folders, whoever wrote them; afterwards the folder that holds the name."""
    synced, real, rename = set(), os.fsync, os.rename
    seen = []

    def fsync(handle):
        synced.add(os.fstat(handle).st_ino)
        real(handle)

    def check(source, target, *more, **named):
        if Path(target).name == "out":
            every = [Path(source), *Path(source).rglob("*")]
            seen.extend(path.name for path in every)
            assert [path.name for path in every if path.stat().st_ino not in synced] == []
            synced.clear()
        rename(source, target, *more, **named)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", check)
    make(tmp_path / "out")
    assert {"inner", "tokenizer.json", "weights", "emloc.json"} <= set(seen)
    assert tmp_path.stat().st_ino in synced
    synced.clear()
    Figures("evaluate", tmp_path / "scores/evaluation.json", {}).write(lambda: {"loss": 1.0})
    place = tmp_path / "scores"
    assert {place.stat().st_ino, (place / "evaluation.json").stat().st_ino} <= synced


def test_a_disk_that_cannot_sync_a_folder_is_no_error_and_one_that_fails_is(tmp_path, monkeypatch):
    def refuses(code):
        def fsync(handle):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    refuses(22)  # EINVAL
    sync_folder(tmp_path)
    refuses(5)  # EIO
    with pytest.raises(OSError, match="Input/output"):
        sync_tree(tmp_path)
    with pytest.raises(OutputError, match="(?i)input/output error"):
        make(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["out", "sub/../out", "link/out", "other TMPDIR"])
def test_two_names_of_one_output_meet_at_its_lock(tmp_path, monkeypatch, name):
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (home / "link").symlink_to(home)
    with output_lock(home / "out"):
        assert [path.name for path in home.glob("out*")] == ["out.partial.lock"]
        if name == "other TMPDIR":
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
            name = "out"
        with pytest.raises(OutputError, match="Another process is writing"):
            make(home / name)
    assert make(home / name).is_dir()
    assert sorted(path.name for path in home.iterdir()) == ["link", "out", "sub"]


def test_a_lock_that_a_killed_process_left_holds_nobody_up(tmp_path):
    (tmp_path / "out.partial.lock").write_text("")
    make(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
