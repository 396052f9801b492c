"""Run the stages that one YAML file asks for, each fed with what the stage before it wrote.

    model_name_or_path: someone/some-model-7B
    dataset: train.jsonl
    output_dir: outputs/run
    compress: {keep_ratio: 0.4}
    train: {max_steps: 500}
    correct: {}
    merge: {}
    evaluate: {dataset: test.jsonl}

A key at the top goes to every stage that knows it; a stage's own section wins. What is given beside the
file is what holds: `key=value` for every stage that takes the option, whatever the file says, and
`stage.key=value` for that stage alone. A stage that is complete with the same settings is skipped.
`memory: 24GiB` plans all stages first, chooses what was not asked for so that they fit, and holds each to
it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from emloc.artefacts.output_place import require_folder
from emloc.config import nearest
from emloc.errors import ConfigError
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import of_family
from emloc.extend.plugins import load_plugins
from emloc.machine.progress import console
from emloc.options.overrides import Overrides, read_overrides
from emloc.options.text import from_file
from emloc.options.yaml_file import read_yaml
from emloc.planning.fitted_run import PlannedStage, fit_run
from emloc.stages.boundary import boundary
from emloc.stages.feeding import fed, without_replaced
from emloc.stages.registry import AnyStage, all_stages, run_stages

Stages = Mapping[str, AnyStage]
"""Stages by name, in order."""


def run(config: str | Path | Mapping[str, Any], *overrides: str) -> dict[str, Any]:
    """Run a YAML file (or a mapping) with `key=value` or `stage.key=value` overrides.

    Returns:
        Per stage its folder, for `evaluate` its scores.

    Raises:
        ConfigError: an unknown key, with the nearest known one, or an option that is wrong.
        OutputError: a stage's result has no place.
        MemoryLimitError: with `memory`, a stage that cannot fit.
    """
    with boundary("run"):
        return _run(config, overrides)


def _run(config: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    source = "run" if isinstance(config, Mapping) else str(config)
    options = dict(config) if isinstance(config, Mapping) else read_yaml(Path(config).expanduser())
    # All sections are checked before anything runs: a typo in the last must not cost hours.
    stages = run_stages()
    plans = plan_stages(options, source, read_overrides(overrides, [*stages]), stages)
    for name, keywords in plans.items():
        stages[name].checked(keywords, f"{source}: {name}")
    _refuse_unfit(plans, stages)
    planned = {
        name: PlannedStage(each.memory, each.config)
        for name, each in stages.items()
        if each.memory is not None
    }
    results: dict[str, Any] = {}
    for name, keywords in fit_run(plans, planned).items():
        results[name] = stages[name](**keywords)
    return results


def plan_stages(
    options: Mapping[str, Any],
    source: str,
    overrides: Overrides | None = None,
    stages: Stages | None = None,
) -> dict[str, dict[str, Any]]:
    """Keywords of every stage that `options` asks for, in order; their values are not looked at yet.

    Args:
        source: of the options, for messages.
        stages: that there are; by default those of `run_stages`.

    Raises:
        ConfigError: an unknown key, no stage, no `output_dir`, or an override that no stage takes.
    """
    stages, given = stages or run_stages(), overrides or Overrides({}, {})
    sections = {
        name: {**_section(options.get(name), source, name), **given.by_stage.get(name, {})}
        for name in stages
        if name in options or name in given.by_stage
    }
    if not sections:
        raise ConfigError(f"{source}: no stage to run; add a section: {', '.join(stages)}.")
    _refuse_unknown(options, sections, source, stages)
    _refuse_idle(given, sections, stages)
    shared = {key: value for key, value in options.items() if key not in stages} | given.everywhere
    root = _root(shared.get("output_dir"), source)
    plans: dict[str, dict[str, Any]] = {}
    before: list[AnyStage] = []
    for name, section in sections.items():
        stage = stages[name]
        model = stage.config
        own = {**section, **_overriding(given, name, section)}
        if "output_dir" in given.everywhere and "output_dir" not in given.by_stage.get(name, {}):
            own.pop("output_dir", None)  # of the run, in which every stage has its folder
        inherited = {key: value for key, value in shared.items() if key in model.model_fields}
        keywords = {**inherited, **fed(stage, before, root, shared), **own}
        plans[name] = from_file(model, without_replaced(stage, keywords, own))
        before.append(stage)
    return plans


def _section(section: Any, source: str, name: str) -> dict[str, Any]:
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"{source}: {name} should hold keys and values.")
    return dict(cast("Mapping[str, Any]", section or {}))


def _root(output_dir: Any, source: str) -> Path:
    if output_dir is None or not str(output_dir).strip():
        raise ConfigError(f"{source}: output_dir is required (the folder of all stages).")
    root = Path(str(output_dir)).expanduser()
    require_folder(root)
    return root


def _overriding(given: Overrides, name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of all stages in place of what a section says otherwise, which is said."""
    own = given.by_stage.get(name, {})
    won = {key: value for key, value in given.everywhere.items() if key in section.keys() - own}
    for key, value in won.items():
        if str(value) != str(section[key]) and key != "output_dir":
            console.print(f"run: {key}={value} instead of the file's {section[key]} in {name}")
    return won


def _refuse_unknown(
    options: Mapping[str, Any],
    sections: Mapping[str, Mapping[str, Any]],
    source: str,
    stages: Stages,
) -> None:
    known = {field for stage in stages.values() for field in stage.config.model_fields}
    for key in [key for key in options if key not in known and key not in stages]:
        hint = nearest(key, [*sorted(known), *stages])
        raise ConfigError(f"{source}: unknown key {key}.{hint}{_broken()}")
    for name, section in sections.items():
        fields = stages[name].config.model_fields
        for key in [key for key in section if key not in fields]:
            where = _stages_with(key, stages)
            hint = f" It is one of {' and '.join(where)}." if where else nearest(key, [*fields])
            raise ConfigError(f"{source}: {name}: unknown option {key}.{hint}")


def _broken() -> str:
    """A sentence on plugins that may have had what is missing."""
    plugins = load_plugins()
    all_stages(plugins)
    return plugins.said_broken()


def _refuse_idle(given: Overrides, sections: Mapping[str, Any], stages: Stages) -> None:
    """An override that nothing listens to is a mistake, and not a default for stages that may come."""
    fields = {field for name in sections for field in stages[name].config.model_fields}
    for key, value in given.everywhere.items():
        if key in fields:
            continue
        where = _stages_with(key, stages)
        hint = (
            f" It is an option of {' and '.join(where)}, which does not run here."
            if where
            else nearest(key, sorted(fields))
        )
        raise ConfigError(f"Override {key}={value}: no stage of this run takes {key}.{hint}")


def _stages_with(option: str, stages: Stages) -> list[str]:
    return [name for name, stage in stages.items() if option in stage.config.model_fields]


def _refuse_unfit(plans: Mapping[str, Mapping[str, Any]], stages: Stages) -> None:
    """Refuse what the model tells to be wrong, where one is there: options of other families, modules."""
    first = next(iter(plans.values()))
    name = first.get("model_name_or_path") or first.get("emulator")
    if name is None:
        return
    model, family = open_model(str(name), first.get("single_file_config"), first.get("family"))
    for stage, keywords in plans.items():
        config = of_family(stages[stage].checked(keywords, stage), family)
        stages[stage].require_suited(config, model, family)
