"""Hours that LoRAM's alignment would take on this machine, beside what EMLoC's stages took.

    python tools/reproduce/overhead.py --results outputs/reproduce/overhead/results.jsonl --tokens 1.05e8

Reads the records of a bench in which LoRAM was aligned for a few steps (`overhead.yaml`): tokens per second
of those steps, times the tokens that its authors align with (`--tokens`), are hours on the same machine.
EMLoC's are measured: compressing and correcting. The last line is one JSON object.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from emloc.errors import ConfigError
from emloc_baselines.bench.records import read_records


def overhead(records: list[dict[str, Any]], tokens: float) -> list[dict[str, Any]]:
    """A row per method and budget: measured seconds, and projected hours where a model was aligned."""
    rows: list[dict[str, Any]] = []
    for record in records:
        if record["method"] is None:
            continue
        row: dict[str, Any] = {
            "row": record["label"],
            "keep_ratio": record["keep_ratio"],
            "measured_seconds": record["overhead_seconds"],
            "hours": record["overhead_seconds"] / 3600,
        }
        done = record["continued"]
        if done:
            rate = done["tokens"] / done["seconds"]
            rest = record["overhead_seconds"] - done["seconds"]
            row |= {"tokens_per_second": rate, "hours": (rest + tokens / rate) / 3600}
        rows.append(row)
    return rows


def main() -> None:
    """Print the table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tokens", type=float, required=True, help="of the authors' alignment")
    options = parser.parse_args()
    try:
        rows = overhead(read_records(options.results), options.tokens)
    except ConfigError as error:
        parser.error(str(error))
    table = Table("", "keep_ratio", "measured overhead", "tokens / s", "hours", title="Overhead")
    for row in rows:
        rate = row.get("tokens_per_second")
        table.add_row(
            row["row"],
            str(row["keep_ratio"] or "–"),
            f"{row['measured_seconds']:.1f} s",
            "–" if rate is None else f"{rate:.0f}",
            f"{row['hours']:.3g}" + ("" if rate is None else " (projected)"),
        )
    Console().print(table)
    print(json.dumps({"tokens": options.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
