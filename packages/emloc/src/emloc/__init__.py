"""EMLoC: fine-tune a model within the memory of running it.

The stages are functions with keyword options: `plan`, `compress`, `train`, `correct`, `polish`, `merge`,
`evaluate`, `verify`, `run` and `demo`. They are imported on first use, so that `import emloc` is cheap.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from emloc.extend.hookspecs import hookimpl

if TYPE_CHECKING:
    from emloc.stages.compress import compress
    from emloc.stages.correct import correct
    from emloc.stages.demo import demo
    from emloc.stages.evaluate import evaluate
    from emloc.stages.merge import merge
    from emloc.stages.plan import plan
    from emloc.stages.polish import polish
    from emloc.stages.run import run
    from emloc.stages.train import train
    from emloc.stages.verify import verify

__version__ = "0.1.0"

__all__ = [
    "compress",
    "correct",
    "demo",
    "evaluate",
    "hookimpl",
    "merge",
    "plan",
    "polish",
    "run",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and importlib.util.find_spec(f"emloc.stages.{name}") is not None:
        module = importlib.import_module(f"emloc.stages.{name}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'emloc' has no attribute {name!r}")
