"""Names in files lead to files inside their folder, or are refused."""

import os
from pathlib import Path

import pytest

from emloc.artefacts.manifest import MANIFEST_NAME, Manifest
from emloc.artefacts.named_files import named_file, named_path
from emloc.errors import CheckpointError, ConfigError, DataError
from emloc.options.yaml_file import read_yaml


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "model"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    (folder / "unet").mkdir()
    (tmp_path / "home" / "secret").write_text("s")
    return folder


@pytest.mark.parametrize("name", ["weights", "unet", "not-there", "unet/not-there"])
def test_names_inside_are_followed(folder: Path, name: str):
    assert named_path(folder, name, "the index") == folder / name


@pytest.mark.parametrize(
    "name", ["../secret", "unet/../../secret", "/etc/passwd", "..", "..\\secret"]
)
def test_names_that_lead_out_are_refused(folder: Path, name: str):
    with pytest.raises(CheckpointError, match=r"the index names .* outside"):
        named_path(folder, name, "the index")


@pytest.mark.parametrize("name", ["", " ", "a\0b", 3, None, ["weights"]])
def test_what_is_no_name_is_refused(folder: Path, name: object):
    with pytest.raises(DataError, match="which is not a file name"):
        named_path(folder, name, "row 3", DataError)


def test_an_absolute_path_inside_is_a_name_too(folder: Path):
    assert named_path(folder, str(folder / "weights"), "row 3") == folder / "weights"


def test_a_link_may_stay_inside_and_not_lead_out(folder: Path):
    (folder / "same").symlink_to(folder / "weights")
    (folder / "other").symlink_to(folder.parent / "secret")
    (folder / "up").symlink_to(folder.parent)
    assert named_file(folder, "same", "the index").read_text() == "w"
    for name in ("other", "up/secret"):
        with pytest.raises(CheckpointError, match="outside"):
            named_path(folder, name, "the index")


def test_a_link_in_a_circle_is_refused(folder: Path):
    (folder / "circle").symlink_to(folder / "circle")
    with pytest.raises(CheckpointError, match="circle"):
        named_file(folder, "circle", "the index")


def test_a_snapshot_of_the_hub_reads_its_own_blobs(tmp_path: Path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (snapshot / "unet").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "beef").write_text("w")
    (snapshot / "weights").symlink_to(Path("..", "..", "blobs", "beef"))
    (snapshot / "unet" / "weights").symlink_to(Path("..", "..", "..", "blobs", "beef"))
    (tmp_path / "secret").write_text("s")
    (repository / "blobs" / "evil").symlink_to(tmp_path / "secret")
    (snapshot / "evil").symlink_to(Path("..", "..", "blobs", "evil"))
    assert named_file(snapshot, "weights", "the index").read_text() == "w"
    assert named_file(snapshot / "unet", "weights", "the index").read_text() == "w"
    with pytest.raises(CheckpointError, match="outside"):
        named_path(snapshot, "evil", "the index")


def test_a_missing_file_is_named(folder: Path):
    with pytest.raises(CheckpointError, match="the index names not-there"):
        named_file(folder, "not-there", "the index")


def test_pipes_and_devices_are_refused_without_opening(folder: Path):
    os.mkfifo(folder / "pipe")
    with pytest.raises(CheckpointError, match="is a pipe, not a file"):
        named_path(folder, "pipe", "the index")


def test_a_run_file_or_a_manifest_that_is_a_pipe_is_not_opened(folder: Path):
    for name in ("run.yaml", MANIFEST_NAME):
        os.mkfifo(folder / name)
    with pytest.raises(ConfigError, match=r"run.yaml is a pipe, not a file"):
        read_yaml(folder / "run.yaml")
    with pytest.raises(CheckpointError, match=r"emloc.json is a pipe, not a file"):
        Manifest.find(folder)
