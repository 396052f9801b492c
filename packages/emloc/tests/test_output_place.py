"""Where results may go is found out before any work, by the system's own answers."""

import os

import pytest

import emloc
from emloc.artefacts.output_place import require_apart, require_folder, require_new
from emloc.errors import OutputError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("name", [".", "..", "/", "x/..", "x/../.."])
def test_the_folder_that_one_is_in_is_no_new_one(name):
    from pathlib import Path

    with pytest.raises(OutputError, match="a stage makes a new folder"):
        require_new(Path(name))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("x"), "is a file"),
        (
            lambda path: path.symlink_to("/nowhere/at/all"),
            "is a link to /nowhere/at/all, which does not exist",
        ),
        (
            lambda path: path.symlink_to(path),
            "which does not exist|Symbolic link loop|symbolic links",
        ),
    ],
)
def test_what_is_no_folder_is_refused_by_all(here, make, message):
    make(here / "out")
    for require in (require_new, require_folder):
        with pytest.raises(OutputError, match=message):
            require(here / "out")
    assert os.path.lexists(here / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [("x" * 300, "File name too long"), ("x" * 250, "File name too long"), ("a\0b", "null")],
)
def test_names_that_no_folder_can_have(here, name, message):
    """250 letters are one too many for the name that a stage works under."""
    with pytest.raises(OutputError, match=message) as problem:
        require_new(here / name)
    assert "\0" not in str(problem.value)
    assert len(str(problem.value)) < 200


def test_a_file_above(here):
    (here / "file").write_text("x")
    for require in (require_new, require_folder):
        with pytest.raises(OutputError, match="Not a directory|is a file"):
            require(here / "file" / "deep" / "out")


def test_no_permission(here, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != here)
    for require in (require_new, require_folder):
        with pytest.raises(OutputError, match=f"no permission to write into {here}"):
            require(here / "deep" / "out")
    (here / "complete").mkdir()
    (here / "complete" / "file").write_text("x")
    assert require_new(here / "complete") == here / "complete"  # may be read for what it is


def test_new_folders_empty_ones_and_links_to_those(here):
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    assert require_new(here / "deep" / "out") == here / "deep" / "out"
    assert require_new(here / "empty") == require_new(here / "link") == here / "empty"
    assert not (here / "deep").exists()


def test_results_inside_the_data_would_become_data(here):
    (here / "data").mkdir()
    for inside in (here / "data", here / "data" / "a" / "out", here / "data" / ".." / "data" / "b"):
        with pytest.raises(OutputError, match="lies in dataset"):
            require_apart(inside, "dataset", "data")
    require_apart(here / "database", "dataset", "data")
    require_apart(here / "out", "dataset", "some/hub-id")


def test_a_stage_finds_out_before_it_reads_its_model(here):
    (here / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        emloc.compress(model_name_or_path="no/model", output_dir="file", dataset="none")
    with pytest.raises(OutputError, match="is a file"):
        emloc.demo(output_dir="file")
    with pytest.raises(OutputError, match="is a file"):
        emloc.plan(model_name_or_path="no/model", output_dir="file")
    with pytest.raises(OutputError, match="is a file"):
        emloc.run({"output_dir": "file", "model_name_or_path": "no/model", "compress": {}})
