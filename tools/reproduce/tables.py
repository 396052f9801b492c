"""The tables of a bench, from its records.

    python tools/reproduce/tables.py tools/reproduce/results/vlm.jsonl
    python tools/reproduce/tables.py tools/reproduce/results/llm-*.jsonl --config tools/reproduce/llm.yaml

Prints what `emloc bench` writes as `tables.md`, of one file of records (`results.jsonl`) or of several;
with a configuration, also the numbers that it says others published.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from emloc_baselines.bench.config import read_config
from emloc_baselines.bench.tables import tables


def records(paths: list[Path]) -> list[dict[str, Any]]:
    """All lines of the files, in their order."""
    return [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--config", type=Path, help="a bench's YAML file with `published` numbers")
    options = parser.parse_args()
    paths: list[Path] = options.results
    for path in paths:
        if not path.is_file():
            parser.error(
                f"there is no {path}; give records as emloc bench writes them (results.jsonl)"
            )
    published = read_config(options.config).published if options.config else None
    print(tables(records(paths), published), end="")


if __name__ == "__main__":
    main()
