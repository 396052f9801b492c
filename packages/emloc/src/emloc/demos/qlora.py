"""QLoRA beside EMLoC: the compared method of that name, where the package that has it is installed."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from emloc.errors import PluginError
from emloc.extend.methods import Task
from emloc.extend.opening import open_model
from emloc.extend.plugins import families_for, method_named
from emloc.machine.progress import headline

NAME = "qlora"
LIGHT, TRAINED = "nf4", "qlora_on_nf4"
"""Folders of the base in four bits, and of the adapter that was trained on it."""


def left_out_because(base: str) -> str:
    """The reason for which a model has no row of QLoRA; empty where it has one."""
    try:
        entry = method_named(NAME)
    except PluginError:
        return "emloc-baselines is not installed"
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    family = open_model(base)[1].name
    return "" if family in families_for(entry) else f"it is not available for the family {family}"


def make_qlora(task: Task, out: Path, train: Callable[[Path, Path], None]) -> None:
    """The base in four bits, an adapter of it, and the same as an adapter of the base, in `out`.

    Args:
        train: called with the light model's folder and that of the adapter to be.
    """
    method = method_named(NAME).load()
    light, trained = out / LIGHT, out / TRAINED
    headline(NAME, f"→ {light.name}")
    method.build(task, light)
    train(light, trained)
    method.recover(task, light, trained, out / NAME)
