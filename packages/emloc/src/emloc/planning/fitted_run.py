"""All stages of a run fitted to one budget before any of them begins."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from emloc.config import build
from emloc.extend.opening import open_model
from emloc.machine.progress import console
from emloc.options.compress import SIZING
from emloc.planning.choices import choose
from emloc.planning.contract import plan_options, require_fit
from emloc.planning.fitting import changed_for
from emloc.planning.report import verdict
from emloc.planning.setting import Planned, Setting
from emloc.planning.subject import Subject

PLANNED_WITH = (Setting.compress, Setting.train)
"""Lines of the stages whose options are a plan's."""


class PlannedStage(NamedTuple):
    """A stage that the planner knows.

    Attributes:
        lines: that describe it there.
        config: its options.
    """

    lines: Planned
    config: type[BaseModel]


def fit_run(
    stages: Mapping[str, Mapping[str, Any]], planned: Mapping[str, PlannedStage]
) -> dict[str, dict[str, Any]]:
    """Keywords of every stage, with those that fitting chose; unchanged without `memory`.

    A run without compress has its emulator already: each of its stages is planned when it begins.

    Args:
        stages: keywords of all stages of the run, in order.
        planned: those of them that are fitted; the first of each of the planner's lines stands for all.

    Raises:
        MemoryLimitError: a stage cannot fit.
    """
    changed = {name: dict(keywords) for name, keywords in stages.items()}
    first: dict[Planned, str] = {}
    for name in changed:
        if name in planned:
            first.setdefault(planned[name].lines, name)
    compress = first.get(Setting.compress, "")
    if not compress or changed[compress].get("memory") is None:
        return changed
    configs: list[Any] = [
        build(planned[first[lines]].config, changed[first[lines]], first[lines])
        for lines in PLANNED_WITH
        if lines in first
    ]
    first_options = configs[0]
    base, family = open_model(
        first_options.model_name_or_path, first_options.single_file_config, first_options.family
    )
    setting = Setting(
        Subject.opened(base, family), plan_options(configs[-1].device, base, family, *configs)
    )
    needed = {name: lines for lines, name in first.items()}
    fitted = choose(setting, configs[0].memory, needed)
    require_fit(fitted)
    console.print(f"run: {' '.join(verdict(fitted.as_json()))}")
    chosen = changed_for(setting, fitted.setting)
    if changed[compress].keys().isdisjoint(SIZING):
        changed[compress]["keep_ratio"] = fitted.setting.options.keep_ratio
    for name in changed.keys() & planned.keys():
        for option in chosen.keys() & planned[name].config.model_fields.keys():
            changed[name].setdefault(option, chosen[option])
    return changed
