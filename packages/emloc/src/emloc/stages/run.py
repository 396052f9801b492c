"""Run the stages that one YAML file asks for, each fed with what the stage before it wrote.

    model_name_or_path: someone/some-model-7B
    dataset: train.jsonl
    output_dir: outputs/run
    compress: {keep_ratio: 0.4}
    train: {max_steps: 500}
    correct: {}
    merge: {}
    evaluate: {dataset: test.jsonl}

A key at the top goes to every stage that knows it; a stage's own section wins. A stage that is
complete with the same settings is skipped. `memory: 24GiB` plans all stages first, chooses what was not
asked for so that they fit, and holds each to it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from emloc.config import build, nearest
from emloc.errors import ConfigError
from emloc.planning.fitted_run import fit_run
from emloc.stage import Stage
from emloc.stages.compress import compress
from emloc.stages.correct import correct
from emloc.stages.evaluate import evaluate
from emloc.stages.merge import merge
from emloc.stages.train import train

STAGES: Mapping[str, Stage[Any, Any]] = {
    "compress": compress,
    "train": train,
    "correct": correct,
    "merge": merge,
    "evaluate": evaluate,
}

FOLDERS = {
    "compress": "emulator",
    "train": "adapter",
    "correct": "corrected",
    "merge": "merged",
    "evaluate": "evaluation",
}
"""What each stage's folder is called under the run's `output_dir`."""


def run(config: str | Path | Mapping[str, Any], *overrides: str) -> dict[str, Any]:
    """Run a YAML file (or a mapping) with `key=value` or `stage.key=value` overrides.

    Returns:
        Per stage its folder, for `evaluate` its scores.

    Raises:
        ConfigError: an unknown key, with the nearest known one.
        MemoryLimitError: with `memory`, a stage that cannot fit.
    """
    source = "run" if isinstance(config, Mapping) else str(config)
    options = _load(config)
    for override in overrides:
        _override(options, override)
    # All sections are checked before anything runs: a typo in the last must not cost hours.
    plans = fit_run(plan_stages(options, source))
    results: dict[str, Any] = {}
    for name, keywords in plans.items():
        results[name] = STAGES[name](**keywords)
    return results


def plan_stages(options: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Keywords of every stage that `options` asks for, in order, validated.

    Raises:
        ConfigError: as `run`.
    """
    sections = {name: options[name] for name in STAGES if name in options}
    shared = {key: value for key, value in options.items() if key not in STAGES}
    if not sections:
        raise ConfigError(f"{source}: no stage to run; add a section: {', '.join(STAGES)}.")
    known = {field for stage in STAGES.values() for field in stage.config.model_fields}
    for key in shared:
        if key not in known:
            hint = nearest(key, [*sorted(known), *STAGES])
            raise ConfigError(f"{source}: unknown key {key}.{hint}")
    if "output_dir" not in shared:
        raise ConfigError(f"{source}: output_dir is required (the folder of all stages).")
    root = Path(str(shared["output_dir"]))
    plans: dict[str, dict[str, Any]] = {}
    for name, section in sections.items():
        model = STAGES[name].config
        if section is not None and not isinstance(section, Mapping):
            raise ConfigError(f"{source}: {name} should hold keys and values.")
        own = dict(cast("Mapping[str, Any]", section or {}))
        inherited = {key: value for key, value in shared.items() if key in model.model_fields}
        keywords = {**inherited, **_fed(name, sections, root, shared), **own}
        if name == "train" and "emulator" in keywords and "model_name_or_path" not in own:
            keywords.pop("model_name_or_path", None)
        build(model, keywords, f"{source}: {name}")
        plans[name] = keywords
    return plans


def _fed(
    name: str, sections: Mapping[str, Any], root: Path, shared: Mapping[str, Any]
) -> dict[str, Any]:
    """What a stage takes from the stages before it."""

    def folder(stage: str) -> str:
        return str(root / FOLDERS[stage])

    fed: dict[str, Any] = {"output_dir": folder(name)}
    if name in ("train", "correct") and "compress" in sections:
        fed["emulator"] = folder("compress")
    if name == "correct" and "train" in sections:
        fed["adapter"] = folder("train")
    if name in ("merge", "evaluate"):
        for stage in ("correct", "train"):
            if stage in sections:
                fed["adapter"] = folder(stage)
                break
    return {key: value for key, value in fed.items() if key == "output_dir" or key not in shared}


def _load(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    try:
        content: Any = yaml.safe_load(Path(config).read_text("utf-8"))
    except FileNotFoundError as problem:
        raise ConfigError(f"No file {config}.") from problem
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        first = str(problem).replace("\n", " ")
        raise ConfigError(f"{config} is not valid YAML: {first}.") from problem
    if not isinstance(content, dict):
        raise ConfigError(f"{config} should hold keys and values.")
    return cast("dict[str, Any]", content)


def _override(options: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"Override {override!r} should read key=value or stage.key=value.")
    path: Sequence[str] = key.split(".")
    target = options
    for part in path[:-1]:
        if part not in STAGES:
            raise ConfigError(f"Override {override!r}: no stage {part}.{nearest(part, [*STAGES])}")
        target[part] = dict(target.get(part) or {})
        target = target[part]
    target[path[-1]] = yaml.safe_load(text)
