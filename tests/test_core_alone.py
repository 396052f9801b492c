"""Core's tests, and a third party's as CONTRIBUTING.md shows them, where only the core can be imported.

Core's tests have plugins and libraries out of sight wherever they run (`alone`, in their folder); a process
of its own shows what their modules import.
"""

import re
import subprocess
import sys
from pathlib import Path

from alone import ABSENT

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "packages/emloc/tests"
BEGIN = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

class Chosen:
    def pytest_collection_modifyitems(self, items):
        print("collected", len(items), "of", len({{item.path for item in items}}))
        items[:] = [item for item in items if item.path.name == "test_mine.py"]

sys.meta_path.insert(0, Blocker())
import pytest
sys.exit(pytest.main(sys.argv[1:], [Chosen()]))
"""


def test_they_are_all_collected_and_the_contract_passes(tmp_path):
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "test_mine.py").write_text(block)
    how = ["-q", "-c", ROOT / "pyproject.toml", f"--basetemp={tmp_path / 'made'}"]
    run = subprocess.run(
        [sys.executable, "-c", BEGIN, *map(str, [*how, TESTS, tmp_path / "test_mine.py"])],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    [tests, modules] = map(int, re.search(r"collected (\d+) of (\d+)", run.stdout).groups())
    assert modules == len(list(TESTS.glob("test_*.py"))) + 1
    assert tests > 500
    assert re.search(r"\b\d\d passed", run.stdout), run.stdout
