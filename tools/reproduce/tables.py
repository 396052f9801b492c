"""The tables of a bench, from its records.

    python tools/reproduce/tables.py tools/reproduce/results/vlm.jsonl

Prints what `emloc bench` writes as `tables.md`, of one file of records (`results.jsonl`) or of several.
"""

import argparse
import json
from pathlib import Path
from typing import Any

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
    print(tables(records(parser.parse_args().results)), end="")


if __name__ == "__main__":
    main()
