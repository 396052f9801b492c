"""Put landed records back as finished cells, so that `emloc bench` runs only what is missing.

    python tools/reproduce/resume.py tools/reproduce/llm.yaml --results tools/reproduce/results/llm-*.jsonl \\
        model_name_or_path=SMOLLM2 datasets.gsm8k.dataset=… output_dir=…

A record is a cell of this configuration only if everything that went into it is the same, base model and
data included; others are counted and left alone. The losses that chose a row's learning rate come back with
its first cell, since it is trained at the first budget and seed, as they were.
Prints how many cells there are, and how many of them are done.
"""

import argparse
from functools import partial
from pathlib import Path

from emloc.artefacts.small_files import write_json
from emloc.errors import ConfigError
from emloc_baselines.bench.cells import Cell, measured_cells, method_cell, prepare_data
from emloc_baselines.bench.config import BenchConfig, read_config
from emloc_baselines.bench.records import Record, read_records


def resume(config: BenchConfig, records: list[Record]) -> tuple[int, int, int]:
    """Write the cells; returns how many the bench has, how many are done, and records of other benches."""
    known = {record["digest"]: record for record in records}
    cells: dict[str, Cell] = {}
    for dataset in config.datasets:
        data = prepare_data(config, dataset)
        rates: dict[str, float] = {}
        for label in config.methods:
            tried = config.learning_rates(dataset, label)
            own = (r for r in records if (r["dataset"], r["label"]) == (dataset, label))
            first = next(own, None)
            cell = partial(
                method_cell, config, data, dataset, label, config.keep_ratio[0], config.seeds[0]
            )
            if len(tried) == 1:
                rates[label] = tried[0]
            elif first and cell(first["learning_rate"]).digest == first["digest"]:
                rates[label] = first["learning_rate"]
                for rate, loss in first["learning_rate_losses"].items():
                    _write(
                        cell(float(rate), validation=True), config, {"loss": loss, "score": None}
                    )
        found = measured_cells(config, data, dataset, rates)
        cells |= {cell.digest: cell for cell in found}
    done = [cell for digest, cell in cells.items() if digest in known]
    for cell in done:
        _write(cell, config, known[cell.digest])
    return len(cells), len(done), len(known.keys() - cells.keys())


def _write(cell: Cell, config: BenchConfig, record: Record) -> None:
    path = cell.record(config.output_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, {"digest": cell.digest, **record})


def main() -> None:
    """Read the records, write the cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--results", type=Path, nargs="+", required=True)
    options = parser.parse_intermixed_args()
    paths: list[Path] = options.results
    try:
        records = [record for path in paths for record in read_records(path)]
        config = read_config(options.config, *options.overrides)
    except ConfigError as error:
        parser.error(str(error))
    cells, done, others = resume(config, records)
    print(f"{config.output_dir}: {done} of {cells} cells are done; {others} records are not of it")


if __name__ == "__main__":
    main()
