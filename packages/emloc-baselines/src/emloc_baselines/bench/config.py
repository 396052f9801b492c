"""The configuration of a bench: a YAML file whose keys are the stages' own.

    model_name_or_path: someone/some-model
    output_dir: outputs/bench
    seeds: [0, 1, 2]
    keep_ratio: [0.4, 0.6]
    max_length: 384                       # goes to every stage that knows it
    compress: {num_calibration_samples: 64}
    train: {max_steps: 60, learning_rate: [3e-4, 1e-3]}
    datasets:
      gsm8k:
        dataset: train.jsonl
        evaluate: {dataset: test.jsonl}
    methods:
      lora:
      emloc:
      emloc at 3: {method: emloc, correct: {limit: 3}}
      emloc, polished: {method: emloc, polish: {max_steps: 8}}

What a method gave is polished in rows that have the key `polish`, whichever method it is; a section of that
name elsewhere holds options for those rows.

Of two places that name an option the later one of this list wins: top, stage section, data set, its
stage section, method's stage section. Several learning rates are tried on validation data, for every
method alike.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field

from emloc.artefacts.kinds import EVALUATION
from emloc.artefacts.output_place import require_folder
from emloc.config import PolishConfig, StageConfig, TrainConfig, build, nearest
from emloc.errors import ConfigError
from emloc.extend.methods import MethodEntry, Task
from emloc.extend.plugins import method_named
from emloc.methods.emloc import Emloc
from emloc.options.polish import micro_batches
from emloc.options.text import from_file
from emloc.options.types import OutputDir
from emloc.options.yaml_file import parse_value, read_yaml
from emloc.stages.registry import AnyStage, core_stages
from emloc.stages.training_needs import check_training

Section = dict[str, Any]

POLISH = "polish"
"""The stage that a row asks for by its name: `polish: {max_steps: 8}` among its keys."""

OF_A_CELL = {"model_name_or_path", "output_dir", "keep_ratio", "seed"}
"""Options that the bench or the method sets, besides those that name a stage's artefacts."""


def task_stages() -> Collection[str]:
    """The stages that a method's task has options for, in order."""
    of_task = {each.name for each in fields(Task)}
    return [name for name in core_stages() if name in of_task]


def bench_stages() -> Mapping[str, AnyStage]:
    """The stages of a bench: those of a task, the one that may follow it, and the one that scores."""
    return {
        name: each
        for name, each in core_stages().items()
        if name in task_stages() or name == POLISH or each.produces == EVALUATION
    }


def given(stage: AnyStage) -> set[str]:
    """Options of a stage that the bench or the method sets."""
    return (OF_A_CELL | stage.consumes.keys()) & stage.fields.keys()


BASE = "base"
"""The row of the model without a LoRA; always there."""


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _sections(value: Any) -> Any:
    """A list of names, or a mapping whose values may be missing, as a mapping of mappings."""
    if isinstance(value, list):
        value = {str(name): None for name in cast("list[Any]", value)}
    if isinstance(value, Mapping):
        return {str(k): v or {} for k, v in cast("Mapping[Any, Any]", value).items()}
    return value


Sections = Annotated[dict[str, Section], BeforeValidator(_sections)]


class BenchConfig(StageConfig):
    """A grid of methods, budgets, seeds and data sets."""

    output_dir: OutputDir = Field(description="where results, tables, plots and all artefacts go")
    model_name_or_path: str = Field(description="the base model")
    datasets: Sections = Field(min_length=1, description="name: options of its stages")
    methods: Sections = Field(
        min_length=1, description="row: its method, stage options, own options"
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_listed)] = Field(
        [0], min_length=1, description="every cell runs once for each seed"
    )
    keep_ratio: Annotated[list[Annotated[float, Field(gt=0, le=1)]], BeforeValidator(_listed)] = (
        Field(
            [0.4], min_length=1, description="budgets: the parameter bytes of EMLoC at these ratios"
        )
    )
    measure: str = Field("exact_match", description="which of evaluate's scores the tables show")
    validation_samples: int = Field(
        64,
        ge=0,
        description="rows of the training file held out to choose the learning rate",
    )
    max_train_samples: int | None = Field(
        None, ge=1, description="rows of the training file to use; by default all"
    )
    published: Sections = Field(
        {},
        description="row: scores published by others, by data set; shown beside the measured ones",
    )
    keep_light_models: bool = Field(False, description="keep light models on disk after use")
    stages: Sections = Field({}, description="stage: its options; learning_rate may be a list")
    shared: Section = Field({}, description="options for every stage that has them")

    def entry(self, label: str) -> MethodEntry:
        """The method behind a row."""
        return method_named(str(self.methods[label].get("method", label)))

    def stage_options(self, stage: str, dataset: str, label: str = "") -> Section:
        """Keywords of a stage for one data set and row."""
        kind = bench_stages()[stage].config
        known = kind.model_fields
        data = self.datasets[dataset]
        row = self.methods.get(label, {})
        layers: Sequence[Section] = (
            _for_every_stage(self.shared, stage, known),
            _section(self.stages, stage, "the bench"),
            _for_every_stage(data, stage, known),
            _section(data, stage, f"datasets.{dataset}"),
            _section(row, stage, f"methods.{label}"),
        )
        merged = {name: value for layer in layers for name, value in layer.items()}
        return from_file(kind, merged)

    def measure_of(self, dataset: str) -> str:
        """The score that the tables show of a data set."""
        return str(self.datasets[dataset].get("measure", self.measure))

    def names_measure(self, dataset: str) -> bool:
        """Return whether the file says which."""
        return "measure" in self.model_fields_set or "measure" in self.datasets[dataset]

    def polish_options(self, dataset: str, label: str) -> Section | None:
        """Keywords of polish for a row that asks for it."""
        return self.stage_options(POLISH, dataset, label) if self.is_polished(label) else None

    def is_polished(self, label: str) -> bool:
        """Return whether a row has the key `polish`, and not `polish: false`."""
        return self.methods[label].get(POLISH, False) is not False

    def own_options(self, label: str) -> Section:
        """A row's options of its method."""
        return {
            name: value
            for name, value in self.methods[label].items()
            if name != "method" and name not in bench_stages()
        }

    def learning_rates(self, dataset: str, label: str) -> list[float]:
        """The learning rates to try; a single one is not tried but used.

        Raises:
            ConfigError: one is no number.
        """
        given = self.stage_options("train", dataset, label).get("learning_rate")
        default = TrainConfig.model_fields["learning_rate"].default
        rates = _listed(default if given is None else given)
        try:
            return [float(rate) for rate in rates]
        except (TypeError, ValueError) as problem:
            raise ConfigError(
                f"{dataset}, {label}: learning_rate = {rates!r:.60} should be numbers ({problem})."
            ) from problem


def _for_every_stage(options: Section, stage: str, known: Collection[str]) -> Section:
    """Options, of those given, that a stage has; rates to choose from are for train alone."""
    return {
        name: value
        for name, value in options.items()
        if name in known
        and not (name == "learning_rate" and stage != "train" and isinstance(value, list))
    }


def _section(options: Section, stage: str, where: str) -> Section:
    """The options of a stage in a part of the bench.

    Raises:
        ConfigError: they are no keys and values.
    """
    section = options.get(stage) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: {stage} should hold keys and values.")
    return dict(cast("Mapping[str, Any]", section))


def read_config(source: str | Path | Mapping[str, Any], *overrides: str) -> BenchConfig:
    """A bench's YAML file (or mapping) with `key=value` or `section.key=value` overrides, checked whole.

    Raises:
        ConfigError: an unknown key, method or value anywhere, in one sentence.
    """
    where = "bench" if isinstance(source, Mapping) else str(source)
    options = dict(source) if isinstance(source, Mapping) else read_yaml(Path(source).expanduser())
    for override in overrides:
        _override(options, override)
    stages = {name: options.pop(name) for name in bench_stages() if name in options}
    for name, section in stages.items():
        if section is not None and not isinstance(section, Mapping):
            raise ConfigError(f"{where}: {name} should hold keys and values.")
    own = set(BenchConfig.model_fields) - {"shared", "stages"}
    shared = {name: options.pop(name) for name in list(options) if name not in own}
    made = {**from_file(BenchConfig, options), "shared": shared, "stages": stages}
    config = build(BenchConfig, made, where)
    require_folder(config.output_dir)
    _refuse_unknown(shared, where, [*own, *bench_stages()])
    for name, section in config.datasets.items():
        _refuse_unknown(
            section, f"{where}: datasets.{name}", ["measure", "validation", *bench_stages()]
        )
    _check_rows(config, where)
    return config


def _check_rows(config: BenchConfig, where: str) -> None:
    for label in config.methods:
        if label == BASE:
            raise ConfigError(f"{where}: methods: the row {BASE} is always there; leave it out.")
        place = f"{where}: methods.{label}"
        try:
            method = config.entry(label).load()
        except ImportError as problem:
            raise ConfigError(f"{place}: {problem}.") from problem
        build(method.options, config.own_options(label), place)
        for dataset in config.datasets:
            for name, stage in bench_stages().items():
                options = config.stage_options(name, dataset, label)
                for option in sorted(given(stage) & options.keys()):
                    raise ConfigError(
                        f"{place}: {name}.{option} is set by the bench; leave it out."
                    )
                if name == "train":
                    options.pop("learning_rate", None)
                checked = {**options, **_stand_ins(config, stage)}
                built = build(stage.config, checked, f"{place}: {name}")
                if isinstance(built, PolishConfig) and config.is_polished(label):
                    micro_batches(built)
                    stage.checked(checked, f"{place}: {name}")
                elif name in task_stages() and isinstance(method, Emloc):
                    used = method.correct_options(checked) if name == "correct" else checked
                    stage.checked(used, f"{place}: {name}")
                if isinstance(built, TrainConfig):
                    check_training(built)
                    for rate in config.learning_rates(dataset, label):
                        build(stage.config, {**checked, "learning_rate": rate}, place)


def _stand_ins(config: BenchConfig, stage: AnyStage) -> Section:
    """Something for the options that the bench or the method sets, to check the others beside them."""
    stand_ins: Section = {name: "given" for name in stage.consumes}
    for option in given(stage) - stage.consumes.keys():
        if stage.config.model_fields[option].is_required():
            stand_ins[option] = "given"
    if "output_dir" in stand_ins:
        stand_ins["output_dir"] = str(config.output_dir / "artefacts" / "given")
    return stand_ins


def _refuse_unknown(section: Mapping[str, Any], where: str, more: list[str]) -> None:
    known = {field for stage in bench_stages().values() for field in stage.config.model_fields}
    for key in section:
        if key not in known and key not in more:
            hint = nearest(key, [*sorted(known), *more])
            raise ConfigError(f"{where}: unknown key {key}.{hint}")


def _override(options: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"Override {override!r} should read key=value or section.key=value.")
    *path, last = key.split(".")
    target = options
    for part in path:
        inner = target.get(part)
        if isinstance(inner, list):  # methods given by name alone
            inner = {str(name): None for name in cast("list[Any]", inner)}
        if inner is not None and not isinstance(inner, Mapping):
            raise ConfigError(
                f"Override {override!r}: {part} is no section, but {str(inner)[:40]!r}; pass {part}=value."
            )
        target[part] = dict(cast("Mapping[str, Any]", inner or {}))
        target = target[part]
    target[last] = parse_value(text)
