"""The contract in a third party's repository: its test file, its family, and nothing of this one's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import emloc

OWN = Path(__file__).with_name("classifier_family.py")
TESTS = """
from classifier_family import ClassifierFamily
from emloc.testing import FamilyContract


class TestClassifier(FamilyContract):
    family = "classifier"
    plugin = "classifier_family"

    def example(self, folder, seed):
        assert seed == 0
        return ClassifierFamily().write_example(folder, seed=3)
"""


def run_pytest(folder, *words):
    """Pytest in a process of its own there, with neither a cache nor a conftest."""
    sources = [str(Path(emloc.__file__).parents[1]), str(folder)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, words)],
        cwd=folder,
        env={**kept, "PYTHONPATH": os.pathsep.join(sources), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_a_family_passes_from_any_folder(tmp_path):
    shutil.copy(OWN, tmp_path)
    (tmp_path / "test_mine.py").write_text(TESTS)
    run = run_pytest(tmp_path, "test_mine.py", "-rs", f"--basetemp={tmp_path / 'made'}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b[23]\d passed", run.stdout), run.stdout
    assert "skipped" not in run.stdout
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"classifier_family.py", "made", "test_mine.py"}


def test_a_family_is_named_on_the_command_line(tmp_path):
    """Without a test file, by the pytest plugin; named twice it is one plugin."""
    words = ["-p", "emloc.testing.pytest_plugin", "-p", "emloc.testing.pytest_plugin", "--pyargs"]
    words += ["emloc.testing.contract.test_family", "--emloc-family=toy", "-k", "recognises"]
    run = run_pytest(tmp_path, *words, "--emloc-plugin=emloc.testing.toy_plugin")
    assert "1 passed" in run.stdout, run.stdout + run.stderr
    run = run_pytest(tmp_path, *words[:-3], "--emloc-family=toys")
    assert run.returncode == 1
    assert "No installed plugin offers the family 'toys'" in run.stdout


def test_pytest_starts_without_torch_where_no_contract_is_asked_for(tmp_path):
    (tmp_path / "test_none.py").write_text(
        "import sys\n\ndef test_none():\n    assert 'torch' not in sys.modules\n"
    )
    run = run_pytest(tmp_path, "-p", "emloc.testing.pytest_plugin", "test_none.py")
    assert run.returncode == 0, run.stdout


def test_the_plugin_is_registered_under_its_modules_name():
    project = (OWN.parents[1] / "packages/emloc/pyproject.toml").read_text()
    assert (
        '[project.entry-points.pytest11]\n"emloc.testing.pytest_plugin" = "emloc.testing.pytest_plugin"'
        in project
    )
