"""Run a bench: choose learning rates, run the cells that are missing, write results, tables and plots.

A cell that has a record is not run again, so a bench that was killed goes on where it stopped, and one
that was changed runs what is new. A cell that fails is named at the end and tried again by the next run.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emloc.artefacts.json_files import read_json
from emloc.artefacts.output_lock import output_lock
from emloc.artefacts.small_files import write_json, write_text
from emloc.errors import ConfigError, EmlocError, NumericalError
from emloc.machine.progress import console
from emloc_baselines.bench.cells import (
    Cell,
    Data,
    measured_cells,
    method_cell,
    prepare_data,
)
from emloc_baselines.bench.config import BenchConfig, read_config
from emloc_baselines.bench.plots import plot_bench
from emloc_baselines.bench.records import Record
from emloc_baselines.bench.tables import tables

RESULTS_NAME = "results.jsonl"
RATES_NAME = "learning_rates.json"

Run = Callable[[Cell, Path], None]
"""Runs one cell; afterwards its record is there. Raises `EmlocError` where it failed."""


def run_bench(
    source: str | Path | Mapping[str, Any], *overrides: str, run: Run | None = None
) -> Path:
    """Run a YAML file (or a mapping) with `key=value` or `section.key=value` overrides.

    Args:
        run: how a cell is run; by default in a process of its own.

    Returns:
        The folder with `results.jsonl`, `tables.md`, the plots and all artefacts.

    Raises:
        ConfigError: anything wrong in the file, found before anything runs; or no score has the name that it
            gives as measure, which the first scores tell.
        OutputError: another bench is running in the folder.
        EmlocError: cells failed; the others are there.
    """
    config = read_config(source, *overrides)
    with output_lock(config.output_dir.expanduser().resolve()):
        return _run_bench(config, run)


def _run_bench(config: BenchConfig, run: Run | None) -> Path:
    data = {name: prepare_data(config, name) for name in config.datasets}
    config.output_dir.mkdir(parents=True, exist_ok=True)
    bench = _Bench(config, data, run or run_in_process_of_its_own)
    rates = {name: bench.choose_rates(name) for name in config.datasets}
    cells = [
        cell
        for name in config.datasets
        for cell in measured_cells(config, data[name], name, rates[name])
    ]
    for index, cell in enumerate(cells):
        bench.ensure(cell, f"[{index + 1}/{len(cells)}]")
        bench.drop_light_models(cells[index + 1 :], [cell])
    records = [bench.read(cell) for cell in cells if cell.record(config.output_dir).is_file()]
    lines = [json.dumps(record, sort_keys=True) for record in records]
    write_text(config.output_dir / RESULTS_NAME, "\n".join(lines) + "\n")
    write_text(config.output_dir / "tables.md", tables(records, config.published))
    plot_bench(records, config.output_dir)
    if bench.failures:
        failed = next(iter(bench.failures.items()))
        raise EmlocError(
            f"{len(bench.failures)} cell(s) failed; the first is {failed[0]} ({failed[1]}); "
            f"the others are in {config.output_dir}. The same command retries the failed ones."
        )
    return config.output_dir


@dataclass
class _Bench:
    """The state of a run: which cells failed and why, and which of them for numbers that overflowed."""

    config: BenchConfig
    data: Mapping[str, Data]
    run: Run
    failures: dict[str, str] = field(default_factory=dict[str, str])
    diverged: set[str] = field(default_factory=set[str])

    def ensure(self, cell: Cell, counter: str) -> Record | None:
        """The cell's record, run if there is none; None if it failed."""
        if cell.record(self.config.output_dir).is_file():
            record = self.read(cell)
            if record.get("measure", cell.measure) == cell.measure:
                return record
        started = time.monotonic()
        try:
            self.run(cell, self.config.output_dir)
        except EmlocError as problem:
            self.failures[cell.title] = str(problem)
            if problem.exit_code == NumericalError.exit_code:
                self.diverged.add(cell.title)
            console.print(f"{counter} {cell.title}: failed: {problem}")
            return None
        record = self.read(cell)
        shown = f"loss {record['loss']:.4f}" + (
            "" if record["score"] is None else f", {cell.measure} {record['score']:.3f}"
        )
        console.print(f"{counter} {cell.title}: {shown} ({time.monotonic() - started:.0f} s)")
        return record

    def read(self, cell: Cell) -> Record:
        """A finished cell's record, with what the choice of its learning rate found."""
        record: Record = read_json(cell.record(self.config.output_dir))
        scores = record.pop("scores", None)
        if scores is not None and not cell.validation:
            if scores and cell.measure not in scores and self.config.names_measure(cell.dataset):
                raise ConfigError(
                    f"measure: {cell.title} has no score {cell.measure}; it has {', '.join(sorted(scores))}."
                )
            record.update(measure=cell.measure, score=scores.get(cell.measure))
        rates = self._rates().get(cell.dataset, {}).get(cell.label)
        # Another row may have the same digest; what the tables show is this one.
        record.update(label=cell.label, dataset=cell.dataset, learning_rate_losses=rates or {})
        return record

    def choose_rates(self, dataset: str) -> dict[str, float]:
        """Each row's learning rate: the one given, or the best on validation data at the first seed and
        budget; a rate that diverges is out."""
        chosen: dict[str, float] = {}
        tried: dict[str, list[Cell]] = {}
        for label in self.config.methods:
            rates = self.config.learning_rates(dataset, label)
            if len(rates) == 1:
                chosen[label] = rates[0]
                continue
            tried[label] = [self._cell(dataset, label, rate, validation=True) for rate in rates]
        known = self._rates()
        for label, cells in tried.items():
            losses: dict[float, float] = {}
            for index, cell in enumerate(cells):
                record = self.ensure(cell, f"[{dataset}, {index + 1}/{len(cells)}]")
                if record is not None and record["loss"] == record["loss"]:
                    losses[float(cell.learning_rate or 0)] = record["loss"]
            # Only a rate that diverges is out; for any other reason the row waits for the next run.
            untold = {cell.title for cell in cells} & self.failures.keys() - self.diverged
            if losses and not untold:
                chosen[label] = min(losses, key=lambda rate: losses[rate])
                for cell in cells:
                    if float(cell.learning_rate or 0) not in losses:
                        self.failures.pop(cell.title, None)
                known.setdefault(dataset, {})[label] = {f"{r:g}": v for r, v in losses.items()}
        write_json(self.config.output_dir / RATES_NAME, known)
        return {label: chosen[label] for label in self.config.methods if label in chosen}

    def drop_light_models(self, coming: Sequence[Cell], done: Iterable[Cell]) -> None:
        """Remove light models that no coming cell needs."""
        if self.config.keep_light_models:
            return
        needed = {cell.steps.get("light") for cell in coming}
        for cell in done:
            if cell.method is not None and cell.steps["light"] not in needed:
                shutil.rmtree(cell.folder(self.config.output_dir, "light"), ignore_errors=True)

    def _cell(self, dataset: str, label: str, rate: float, validation: bool) -> Cell:
        ratio, seed = self.config.keep_ratio[0], self.config.seeds[0]
        return method_cell(
            self.config, self.data[dataset], dataset, label, ratio, seed, rate, validation
        )

    def _rates(self) -> dict[str, Any]:
        path = self.config.output_dir / RATES_NAME
        return read_json(path) if path.is_file() else {}


def run_in_process_of_its_own(cell: Cell, root: Path) -> None:
    """Run a function in a process of its own, so that its peak memory is its own; its output goes to
    `logs`.

    Raises:
        EmlocError: it failed; the message is its last line.
    """
    name = cell.record(root).stem
    spec, log = root / "logs" / f"{name}.json", root / "logs" / f"{name}.log"
    spec.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(json.dumps({"cell": asdict(cell), "root": root}, default=str))
    write_json(spec, content)
    command = [sys.executable, "-m", "emloc_baselines.bench.cell", str(spec)]
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
    if code or not cell.record(root).is_file():
        lines = log.read_text("utf-8").strip().splitlines() or ["it was killed"]
        failure = EmlocError(f"{lines[-1].removeprefix('error: ')} (exit code {code}, see {log})")
        failure.exit_code = code if code > 0 else 1
        raise failure
