"""The Python block of CONTRIBUTING.md is a test module that passes."""

import re
import subprocess
import sys
from pathlib import Path

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"


def test_the_contract_of_a_third_party_runs_as_it_is_shown(tmp_path):
    [block] = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    (tmp_path / "test_mine.py").write_text(block)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b1[0-9] passed in", run.stdout), run.stdout
