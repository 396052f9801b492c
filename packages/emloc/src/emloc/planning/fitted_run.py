"""All stages of a run fitted to one budget before any of them begins."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from emloc.config import CompressConfig, CorrectConfig, TrainConfig, build
from emloc.extend.plugin_options import with_plugin_options
from emloc.extend.plugins import open_model
from emloc.machine.progress import console
from emloc.planning.contract import plan_options, require_fit
from emloc.planning.fitting import NEEDED, changed_for, fit
from emloc.planning.report import verdict
from emloc.planning.setting import Setting
from emloc.planning.subject import Subject

ConfigT = TypeVar("ConfigT", bound=BaseModel)

KINDS = {"compress": CompressConfig, "train": TrainConfig, "correct": CorrectConfig}
"""Stages whose options fitting may change."""


def fit_run(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Keywords of every stage, with those that fitting chose; unchanged without `memory`.

    A run without compress has its emulator already: each of its stages is planned when it begins.

    Raises:
        MemoryLimitError: a stage cannot fit.
    """
    changed = {name: dict(keywords) for name, keywords in stages.items()}
    memory = changed.get("compress", {}).get("memory")
    if memory is None:
        return changed
    compress = _built(CompressConfig, changed["compress"], "compress")
    train = _built(TrainConfig, changed["train"], "train") if "train" in changed else None
    configs = [compress] if train is None else [compress, train]
    assert compress.memory is not None
    base, family = open_model(compress.model_name_or_path, compress.single_file_config)
    setting = Setting(
        Subject.opened(base, family), plan_options(configs[-1].device, base, family, *configs)
    )
    found = fit(setting, compress.memory, [name for name in NEEDED if name in changed])
    require_fit(found)
    console.print(f"run: {' '.join(verdict(found.as_json()))}")
    chosen = changed_for(setting, found.setting)
    changed["compress"].setdefault("keep_ratio", found.setting.options.keep_ratio)
    for name, kind in KINDS.items():
        if name in changed:
            for option in chosen.keys() & kind.model_fields.keys():
                changed[name].setdefault(option, chosen[option])
    return changed


def _built(kind: type[ConfigT], keywords: Mapping[str, Any], name: str) -> ConfigT:
    complete: type[ConfigT] = with_plugin_options(kind)
    return build(complete, keywords, name)
