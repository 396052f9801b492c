"""The scripts of `tools/reproduce`, as modules."""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).parents[3] / "tools/reproduce"


def load(name):
    """One of them."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
