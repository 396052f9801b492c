"""Pytest in a folder that is no part of this repository."""

import os
import subprocess
import sys
from pathlib import Path

import emloc


def run_pytest(folder, *words, paths=()):
    """Pytest in a process of its own there, with neither a cache nor a conftest.

    Args:
        paths: folders to import from, beside those of the core; by default the folder itself.
    """
    sources = [str(Path(emloc.__file__).parents[1]), *map(str, paths or [folder])]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, words)],
        cwd=folder,
        env={**kept, "PYTHONPATH": os.pathsep.join(sources), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
