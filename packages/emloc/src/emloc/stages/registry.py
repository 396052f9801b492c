"""All stages: the modules of this package that hold one, and those that plugins register.

A new stage of core is one file of this folder; a plugin's is one hook, `emloc_register_stages`.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, cast

import emloc.stages
from emloc.errors import PluginError
from emloc.extend.option_names import check_stage
from emloc.extend.plugins import Plugins, load_plugins
from emloc.extend.stages import COMMANDS
from emloc.machine.targets import imported
from emloc.planning.setting import Stages
from emloc.stages.stage import Stage

AnyStage = Stage[Any, Any]


@cache
def core_stages() -> Mapping[str, AnyStage]:
    """The stages of this package, by name, in order."""
    modules = (
        importlib.import_module(f"{emloc.stages.__name__}.{module.name}")
        for module in pkgutil.iter_modules(emloc.stages.__path__)
    )
    return _ordered(
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, Stage) and each.__module__ == module.__name__
    )


def all_stages(plugins: Plugins | None = None) -> Mapping[str, AnyStage]:
    """The stages of core and of plugins, by name, in order.

    Args:
        plugins: as loaded; one whose stage cannot be had is reported as broken there.
    """
    known = load_plugins() if plugins is None else plugins
    stages = dict(core_stages())
    for entry in known.stages.values():
        try:
            added = imported(entry.target)
            if not isinstance(added, Stage):
                raise PluginError(
                    f"{entry.target} is not a stage; decorate it with emloc.stages.stage.stage"
                )
            one = cast(AnyStage, added)
            if one.name in stages:
                raise PluginError(f"stage {one.name!r} is registered already")
            if one.name in COMMANDS:
                raise PluginError(f"stage {one.name!r} has the name of a command; rename it")
            check_stage(one.name, one.own_config, known.families.values())
            stages[one.name] = one
        except Exception as problem:  # a third party's code may raise anything
            known.broken[entry.plugin] = f"{type(problem).__name__}: {problem}"
    return _ordered(stages.values())


def _ordered(stages: Iterable[AnyStage]) -> dict[str, AnyStage]:
    return {each.name: each for each in sorted(stages, key=lambda each: each.place)}


def run_stages() -> Mapping[str, AnyStage]:
    """The stages that a run may have: each makes an artefact."""
    return {name: each for name, each in all_stages().items() if each.produces is not None}


def planned_stages() -> Stages:
    """The memory of every stage that declares it."""
    return {name: each.memory for name, each in all_stages().items() if each.memory is not None}
