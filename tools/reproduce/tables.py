"""The tables of a bench, from its records.

    python tools/reproduce/tables.py tools/reproduce/results/vlm.jsonl
    python tools/reproduce/tables.py tools/reproduce/results/llm-*.jsonl --config tools/reproduce/llm.yaml
    python tools/reproduce/tables.py tools/reproduce/results/vlm.jsonl --plots PICTURES

Prints what `emloc bench` writes as `tables.md`, of one file of records (`results.jsonl`) or of several;
with a configuration, also the numbers that it says others published. `--plots` draws its pictures, score,
loss and gain over the budget, into a folder.
"""

import argparse
from pathlib import Path

from emloc.errors import ConfigError
from emloc_baselines.bench.config import read_config
from emloc_baselines.bench.plots import plot_bench
from emloc_baselines.bench.records import read_records
from emloc_baselines.bench.tables import tables


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--config", type=Path, help="a bench's YAML file with `published` numbers")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw the pictures there")
    options = parser.parse_args()
    paths: list[Path] = options.results
    try:
        found = [record for path in paths for record in read_records(path)]
        published = read_config(options.config).published if options.config else None
    except ConfigError as error:
        parser.error(str(error))
    print(tables(found, published), end="")
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        plot_bench(found, options.plots)


if __name__ == "__main__":
    main()
