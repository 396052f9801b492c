"""`emloc new-family`: a package that passes the contract as it was written, or one sentence and nothing."""

import ast
import importlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from elsewhere import run_pytest

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import ConfigError, DataError, OutputError
from emloc.new_family import writer
from emloc.new_family.writer import write_new_family

ROOT = Path(__file__).parent.parent


@pytest.fixture
def package(tmp_path):
    return write_new_family("tiny-encoder", tmp_path / "emloc-tiny-encoder")


@pytest.mark.long
def test_it_is_built_and_installed_and_passes_the_contract(package, tmp_path):
    """The wheel is installed as pip does, found by its entry point, and the folder of its sources is gone."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", tmp_path, package],
        check=True, capture_output=True,
    )  # fmt: skip
    [wheel] = tmp_path.glob("emloc_tiny_encoder-*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
    tests = Path(package / "tests").rename(tmp_path / "tests")
    run = run_pytest(tests, "-rs", f"--basetemp={tmp_path / 'made'}", paths=[tmp_path / "site"])
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b[5-9]\d passed", run.stdout), run.stdout
    assert "skipped" not in run.stdout


def test_it_is_short_and_imports_what_is_promised(package):
    family = package / "src/emloc_tiny_encoder/family.py"
    assert len(family.read_text().splitlines()) <= 70
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.module if isinstance(node, ast.ImportFrom) else ""
            if name.split(".")[0] == "emloc":
                assert name in ("emloc.plugin", "emloc.testing"), path
    assert all("yours:" in path.read_text() for path in package.glob("src/*/[ef]*.py"))
    assert not [
        p for p in package.rglob("*") if p.is_file() and re.search(r"@[a-z]+@", p.read_text())
    ]


def test_it_is_clean(package):
    for words in (
        ["check", "--select", "E,F,W,I,B,UP,D1", "--ignore", "D101,D105"],
        ["format", "--check"],
    ):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--line-length=100", package / "src"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout


def test_what_is_no_text_and_no_label_is_refused(tmp_path, monkeypatch):
    package = write_new_family("strict", tmp_path / "emloc-strict")
    monkeypatch.syspath_prepend(str(package / "src"))
    family = importlib.import_module("emloc_strict.family").StrictFamily()
    model = family.write_example(tmp_path / "example", 0)["model_name_or_path"]
    data = tmp_path / "rows.jsonl"
    options = SimpleNamespace(dataset=str(data), dataset_split="train", max_length=16)
    for wrong in ({"text": {"a": 1}}, {"text": 1.5}, {"label": True}, {"label": 1.5}):
        data.write_text(json.dumps({"text": "word", "label": 0, **wrong}))
        made = family.data(Checkpoint.open(str(model)), options)
        with pytest.raises(DataError, match=f"{next(iter(wrong))} is .* should be text"):
            made.collate(list(made.samples))


def test_it_requires_the_versions_that_keep_the_promise(package, monkeypatch):
    text = (package / "pyproject.toml").read_text()
    assert 'dependencies = ["emloc[transformers]>=0.1,<0.2"]' in text
    assert emloc.__version__.startswith("0.1.")
    assert [writer._versions(v) for v in ("0.9.3", "1.4.0", "2.0.1rc1")] == [
        ">=0.9,<0.10",
        ">=1.4,<2",
        ">=2.0,<3",
    ]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Encoder", "is not a family name; pass"),
        ("../up", "is not a family name; pass"),
        ("3d", "is not a family name; pass"),
        ("two words", "is not a family name; pass"),
        ("double--hyphen", "is not a family name; pass"),
        ("x" * 41, "is not a family name; pass"),
        ("", "is not a family name; pass"),
        ("llm", "already exists, from the plugin llm; choose"),
        ("baselines", "a package emloc_baselines is already installed; choose"),
        ("transformers", "would take the name of a part of Python or emloc; choose"),
    ],
)
def test_a_bad_name_is_one_sentence(name, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(why)) as refused:
        write_new_family(name)
    assert re.fullmatch(r"new-family: [^\n]*[^.]\.", str(refused.value))
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "notes.txt").write_text("kept")
    with pytest.raises(OutputError, match="exists and is not empty; nothing is ever overwritten"):
        write_new_family("tiny-encoder", place)
    assert [path.name for path in place.iterdir()] == ["notes.txt"]


def test_nothing_is_half_written(tmp_path, monkeypatch):
    """A disk that is full after a few files leaves no folder of the name, and the same call goes on."""
    real, files = writer.write_text, []

    def full(path, text):
        files.append(path)
        if len(files) == 4:
            raise OutputError(f"{path} cannot be written: the disk is full.")
        real(path, text)

    monkeypatch.setattr(writer, "write_text", full)
    place = tmp_path / "emloc-tiny-encoder"
    with pytest.raises(OutputError, match="the disk is full"):
        write_new_family("tiny-encoder", place)
    assert not place.exists()
    assert write_new_family("tiny-encoder", place) == place
    written = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert written == {name.replace("@package@", "emloc_tiny_encoder") for name in writer.FILES}
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_the_command_names_the_folder_and_what_comes_next(tmp_path):
    words = [sys.executable, "-m", "emloc", "new-family"]
    run = subprocess.run(
        [*words, "speech"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[0] == "emloc-speech"
    assert "pip install -e 'emloc-speech[test]'" in run.stdout
    assert (tmp_path / "emloc-speech/src/emloc_speech/family.py").is_file()
    run = subprocess.run(
        [*words, "Speech"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
