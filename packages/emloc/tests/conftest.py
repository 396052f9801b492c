"""The core by itself in every test, and the toy family with its example and its artefacts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from alone import alone

from emloc.testing import plugin_installed
from emloc.testing.contract.fixtures import made_subject

PLUGIN = "emloc.testing.toy_plugin"
LOW_RANK = {"format": "low_rank", "keep_ratio": 0.5}


@pytest.fixture(autouse=True)
def _alone():
    """Tests give the same with plugins installed and without."""
    with alone():
        yield


@pytest.fixture(scope="session")
def _made(tmp_path_factory):
    folder, options = tmp_path_factory.mktemp("toy"), {"compress": LOW_RANK}
    with alone(), made_subject("toy", folder, stage_options=options, plugin=PLUGIN) as made:
        assert made.stages
    return made


@pytest.fixture
def toy(_made):
    """The toy's `Subject`, while its plugin is installed."""
    with plugin_installed(PLUGIN):
        yield _made


TRITON_FOLDER = Path(sys.prefix) / "triton"
"""The folder that `make install` puts Triton in. No package needs it; builds of torch for CUDA bring it."""


@pytest.fixture
def in_triton():
    """Runs a function of a test file in Triton's interpreter and gives the number that it returns.

    In a process of its own: Triton decides at its import whether it interprets.
    """

    def run(file: str, function: str) -> int:
        here = Path(file)
        code = (
            f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as tests; "
        )
        code += f"print(tests.{function}())"
        paths = [str(TRITON_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout)

    return run
