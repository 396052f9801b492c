"""The contract in a third party's repository: its test file, its family, and nothing of this one's."""

import re
import shutil
from pathlib import Path

from elsewhere import run_pytest

OWN = Path(__file__).with_name("classifier_family.py")
TESTS = """
from classifier_family import ClassifierFamily
from emloc.testing import FamilyContract


class TestClassifier(FamilyContract):
    family = "classifier"
    plugin = "classifier_family"

    def example(self, folder, seed):
        assert seed == 0
        assert (folder.is_dir(), list(folder.iterdir())) == (True, [])
        return ClassifierFamily().write_example(folder, seed=3)
"""


FEW = "skeleton or real_rows or tied or mask or changed_data or loss_is"
"""Laws that take little time; a package that `emloc new-family` wrote passes all (`test_new_family.py`)."""


def test_a_family_passes_from_any_folder(tmp_path):
    shutil.copy(OWN, tmp_path)
    (tmp_path / "test_mine.py").write_text(TESTS)
    run = run_pytest(tmp_path, "test_mine.py", "-rs", "-k", FEW, f"--basetemp={tmp_path / 'made'}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b[5-9] passed", run.stdout), run.stdout
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
    run = run_pytest(tmp_path, "-p", "emloc.testing.pytest_plugin", "test_none.py", fresh=True)
    assert run.returncode == 0, run.stdout


def test_the_plugin_is_registered_under_its_modules_name():
    project = (OWN.parents[1] / "packages/emloc/pyproject.toml").read_text()
    assert (
        '[project.entry-points.pytest11]\n"emloc.testing.pytest_plugin" = "emloc.testing.pytest_plugin"'
        in project
    )
