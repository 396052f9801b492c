"""Cells of a bench, and what each is made of.

A cell is one score: a row of the table (a method with its options), a data set, a budget, a seed, a
learning rate, on test or on validation data. It is made in steps, each known by a digest of all that
goes into it; cells that have a step in common (the emulator of EMLoC with and without correction, one
LoRA for every budget) find it made.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from emloc.config import EvaluateConfig, TrainConfig, build
from emloc.errors import ConfigError
from emloc.extend.methods import MethodEntry, Options, Task
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import with_family_options
from emloc.options.compress import AUTO, LOW_RANK_FORMAT
from emloc.options.marks import loss_alone
from emloc.stages.data_digest import data_digests
from emloc_baselines.bench.config import BASE, BenchConfig, Section, bench_stages, task_stages
from emloc_baselines.bench.split import split_rows
from emloc_baselines.identity import content_of, digest, model_digest

SHOWN_DIGITS = 16


@dataclass(frozen=True)
class Data:
    """A data set, its training rows split.

    Attributes:
        training: options that replace the data set's own in stages that learn.
        validation: options that replace those of evaluate; None: there are no validation data.
        source: the file that was split; a stage that is given another one keeps it.
        beside: options by which its rows still name pictures; they say nothing about what is learnt.
    """

    training: Section
    validation: Section | None
    source: str = ""
    beside: Section = field(default_factory=dict[str, Any])

    def learnt_in(self, options: Section) -> Section:
        """The options of a stage that learns, without the rows that are held out."""
        own = str(options.get("dataset", self.source)) != self.source
        return options if own else {**options, **self.training}


@dataclass(frozen=True)
class Cell:
    """One score to be had.

    Attributes:
        label: the row.
        method: its method; None for the base model.
        keep_ratio: None where the budget does not matter.
        learning_rate: None for the base model.
        validation: whether it is scored on validation data, to choose a learning rate.
        task: what the method is run on.
        evaluate: keywords of the scoring.
        polish: keywords of polish; None: what the method gave is scored.
        measure: which score is shown.
        steps: digests of `light`, `adapter`, `recovered`, `polished` and the whole cell, `score`.
        inputs: what the last digest is of.
    """

    dataset: str
    label: str
    method: str | None
    keep_ratio: float | None
    seed: int
    learning_rate: float | None
    validation: bool
    task: Task
    evaluate: Section
    measure: str
    steps: Mapping[str, str]
    inputs: Section
    polish: Section | None = None

    @property
    def digest(self) -> str:
        """Identity of the cell."""
        return self.steps["score"]

    @property
    def title(self) -> str:
        """The cell's name for people."""
        parts = [self.dataset, self.label]
        parts += [] if self.keep_ratio is None else [f"keep {self.keep_ratio:g}"]
        parts += [] if self.method is None else [f"seed {self.seed}"]
        parts += [f"learning rate {self.learning_rate:g} (validation)"] if self.validation else []
        return ", ".join(parts)

    def folder(self, root: Path, step: str) -> Path:
        """The folder of a step's artefact."""
        return root / "artefacts" / f"{step}-{self.steps[step][:SHOWN_DIGITS]}"

    def record(self, root: Path) -> Path:
        """The file of the cell's record."""
        return root / "cells" / f"{self.digest[:SHOWN_DIGITS]}.json"


def prepare_data(config: BenchConfig, dataset: str) -> Data:
    """Split a data set's training file; see `split_rows`.

    Raises:
        ConfigError, DataError: it cannot be split though validation data are wanted.
    """
    section = config.datasets[dataset]
    given: Section | None = section.get("validation")
    tuned = any(len(config.learning_rates(dataset, label)) > 1 for label in config.methods)
    source = config.stage_options("train", dataset).get("dataset")
    # Where they are asked for they are left out though nothing is chosen here: another bench, whose
    # rows these are to be, chose on them.
    held_out = tuned or "validation_samples" in config.model_fields_set
    count = config.validation_samples if given is None and held_out else 0
    if given is None and tuned and (count == 0 or source is None):
        raise ConfigError(
            f"bench: the data set {dataset} has several learning rates to choose among, but no data to "
            f"choose them by except those of the test; give it a validation section, or a JSONL file as "
            f"dataset and validation_samples."
        )
    if source is None or (count == 0 and config.max_train_samples is None):
        return Data({}, given)
    train, validation = split_rows(
        Path(str(source)), config.output_dir / "data", count, config.max_train_samples
    )
    beside = _beside(config, Path(str(source)))
    given_beside = {
        name: value
        for name, value in config.stage_options("train", dataset).items()
        if name in beside and value is not None
    }
    added = {} if given_beside else beside
    rows = {"dataset": str(validation), "num_samples": None, **beside, **given_beside}
    split = None if validation is None else rows
    return Data({"dataset": str(train), **added}, given or split, str(source), added)


def _beside(config: BenchConfig, source: Path) -> Section:
    """The options by which rows that have left their folder still name the pictures in it."""
    option = "image_folder"
    _, family = open_model(config.model_name_or_path)
    known = option in with_family_options(TrainConfig, family).model_fields
    return {option: str(source.absolute().parent)} if known else {}


def base_cell(config: BenchConfig, dataset: str) -> Cell:
    """The model without a LoRA."""
    evaluate = config.stage_options("evaluate", dataset)
    task = Task(config.model_name_or_path, 1.0, config.seeds[0], {}, {}, {})
    inputs: Section = {
        "base": model_digest(config.model_name_or_path),
        "evaluate": stage_content(config, "evaluate", evaluate),
    }  # fmt: skip
    return Cell(
        dataset=dataset, label=BASE, method=None, keep_ratio=None, seed=config.seeds[0],
        learning_rate=None, validation=False, task=task, evaluate=evaluate,
        measure=config.measure_of(dataset), steps={"score": digest(inputs)}, inputs=inputs,
    )  # fmt: skip


def method_cell(
    config: BenchConfig,
    data: Data,
    dataset: str,
    label: str,
    keep_ratio: float,
    seed: int,
    learning_rate: float,
    validation: bool = False,
) -> Cell:
    """One row's score."""
    entry = config.entry(label)
    stages = {
        stage: data.learnt_in(config.stage_options(stage, dataset, label))
        for stage in task_stages()
    }
    stages["train"]["learning_rate"] = learning_rate
    evaluate = config.stage_options("evaluate", dataset, label)
    if validation:
        # The loss chooses; answers would take most of the time.
        _, family = open_model(config.model_name_or_path)
        cheaply = loss_alone(with_family_options(EvaluateConfig, family))
        evaluate = {**evaluate, **(data.validation or {}), **cheaply}
    polish = None if validation else config.polish_options(dataset, label)
    if polish is not None:
        polish = {**data.learnt_in(polish), "seed": seed}
    own = config.own_options(label)
    task = Task(config.model_name_or_path, keep_ratio, seed, **stages, options=own)
    steps, inputs = _steps(config, entry, task, polish, evaluate, data.beside)
    return Cell(
        dataset=dataset, label=label, method=entry.name,
        keep_ratio=keep_ratio if entry.uses_budget else None, seed=seed,
        learning_rate=learning_rate, validation=validation, task=task, evaluate=evaluate,
        measure=config.measure_of(dataset), steps=steps, inputs=inputs, polish=polish,
    )  # fmt: skip


def _steps(
    config: BenchConfig,
    entry: MethodEntry,
    task: Task,
    polish: Section | None,
    evaluate: Section,
    beside: Section,
) -> tuple[dict[str, str], Section]:
    light: Section = {
        "base": model_digest(config.model_name_or_path),
        "method": entry.trains_as or entry.name,
        "options": content_of(task.options),
        "keep_ratio": task.keep_ratio if entry.uses_budget else None,
        "compress": stage_content(config, "compress", _with_format(task.compress), beside),
        "seed": task.seed,
    }
    adapter: Section = {**light, "train": stage_content(config, "train", task.train, beside)}
    recovered: Section = {
        **adapter,
        "recovers_as": entry.name,
        "correct": stage_content(config, "correct", task.correct, beside),
    }
    polished = recovered
    if polish is not None:
        polished = {**recovered, "polish": stage_content(config, "polish", polish, beside)}
    score: Section = {**polished, "evaluate": stage_content(config, "evaluate", evaluate, beside)}
    inputs_by_step = {
        "light": light, "adapter": adapter, "recovered": recovered, "polished": polished, "score": score,
    }  # fmt: skip
    return {name: digest(inputs) for name, inputs in inputs_by_step.items()}, score


def stage_content(
    config: BenchConfig, stage: str, options: Options, beside: Options | None = None
) -> Section:
    """The options of a stage as `content_of`, with a digest of the files that rows of its data name.

    Args:
        beside: options that were added to find these files, and are left out.
    """
    added = {} if beside is None else beside
    content: Section = content_of(
        {name: value for name, value in options.items() if added.get(name) != value}
    )
    named = files_named(config.model_name_or_path, stage, json.dumps(options, default=str))
    return {**content, "files": named} if named else content


@cache
def files_named(model_name_or_path: str, stage: str, options: str) -> str:
    """The digest of the files that rows name, such as pictures; empty where there are none.

    Args:
        options: of the stage, as JSON.
    """
    _, family = open_model(model_name_or_path)
    kind = with_family_options(bench_stages()[stage].config, family)
    given: Section = {
        name: value for name, value in json.loads(options).items() if name in kind.model_fields
    }
    required = {name: "given" for name, one in kind.model_fields.items() if one.is_required()}
    digests = data_digests(build(kind, {**required, **given}, stage), family).values()
    parts = [digest.partition("+")[2] for digest in digests if digest]
    return "|".join(filter(None, parts))


def _with_format(compress: Options) -> Section:
    """The options with the format that is meant; low rank goes without saying, as in records of before."""
    named = {"format": AUTO, **compress}
    return {k: v for k, v in named.items() if (k, v) != ("format", LOW_RANK_FORMAT)}


def measured_cells(
    config: BenchConfig, data: Data, dataset: str, rates: Mapping[str, float]
) -> Sequence[Cell]:
    """All cells of a data set that the tables show, those that share a light model side by side.

    Args:
        rates: the learning rate of each row that is run.
    """
    cells = [base_cell(config, dataset)]
    for ratio in config.keep_ratio:
        for seed in config.seeds:
            for label, rate in rates.items():
                cell = method_cell(config, data, dataset, label, ratio, seed, rate)
                if all((cell.label, cell.digest) != (other.label, other.digest) for other in cells):
                    cells.append(cell)
    return cells
