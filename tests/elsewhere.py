"""Pytest in a folder that is no part of this repository."""

import os
import subprocess
import sys
from pathlib import Path

from warm_python import run_python

import emloc

BEGIN = """
import sys
sys.path[:] = {path!r}
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def run_pytest(folder, *words, paths=(), fresh=False):
    """Pytest in a process of its own there, with neither a cache nor a conftest.

    Args:
        paths: folders to import from, beside those of the core; by default the folder itself.
        fresh: have it import all libraries itself.
    """
    sources = [str(Path(emloc.__file__).parents[1]), *map(str, paths or [folder])]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(sources), "CUDA_VISIBLE_DEVICES": ""}
    given = ["-q", "-p", "no:cacheprovider", *map(str, words)]
    if fresh:
        return subprocess.run(
            [sys.executable, "-m", "pytest", *given],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    installed = [place for place in sys.path if place and Path(place).name != "tests"]
    path = [str(folder), *sources, *installed]
    return run_python("-c", BEGIN.format(path=path), *given, cwd=folder, env=environment)
