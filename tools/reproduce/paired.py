"""One row of a bench against another, cell by cell.

    python tools/reproduce/paired.py tools/reproduce/results/*.jsonl --row emloc --against emloc-uncorrected

Rows that share a LoRA, as these two, differ by far less than seeds do, so that the spread over seeds says
nothing about them; what does is in how many cells (data set, budget, seed) one is below the other. Prints
per data set the cells in which the row's loss is lower, higher and the same (no correction was chosen), and
the mean difference, as a share of what a LoRA on the base gains where there is one.
The last line is one JSON object of all cells, with the chance that a fair coin is so one-sided (sign test,
two-sided, equal cells left out).
"""

import argparse
import json
from math import comb
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from emloc.errors import ConfigError
from emloc_baselines.bench.records import Record, read_records


def differences(records: list[Record], row: str, against: str) -> list[tuple[str, float]]:
    """Data set and `against − row` of every cell that both have, above 0 where the row is better."""

    def of(label: str) -> dict[tuple[Any, ...], float]:
        own = (r for r in records if r["label"] == label)
        return {(r["dataset"], r["keep_ratio"], r["seed"]): r["loss"] for r in own}

    ours, theirs = of(row), of(against)
    return [(cell[0], theirs[cell] - ours[cell]) for cell in ours if cell in theirs]


def counts(found: list[float]) -> dict[str, float]:
    """Lower, higher and equal cells, the mean difference, and the sign test's probability."""
    lower, higher = sum(d > 0 for d in found), sum(d < 0 for d in found)
    told = lower + higher
    tail = sum(comb(told, k) for k in range(max(lower, higher), told + 1)) / 2**told
    return {
        "lower": lower,
        "higher": higher,
        "equal": len(found) - told,
        "mean": sum(found) / len(found),
        "probability": min(1.0, 2 * tail),
    }


def gain_of_lora(records: list[Record], dataset: str) -> float | None:
    """Mean loss of the base minus that of LoRA on it; `None` where one of them is not there."""

    def mean(label: str) -> float | None:
        losses = [r["loss"] for r in records if (r["label"], r["dataset"]) == (label, dataset)]
        return sum(losses) / len(losses) if losses else None

    base, lora = mean("base"), mean("lora")
    return None if base is None or lora is None else base - lora


def main() -> None:
    """Print the table, and all cells together as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--row", required=True)
    parser.add_argument("--against", required=True)
    options = parser.parse_args()
    title = f"{options.row} against {options.against}"
    table = Table(
        "", "data set", "lower", "higher", "equal", "mean difference", "of the gain", title=title
    )
    together: list[float] = []
    paths: list[Path] = options.results
    for path in paths:
        try:
            records = read_records(path)
        except ConfigError as error:
            parser.error(str(error))
        found = differences(records, options.row, options.against)
        together += [difference for _, difference in found]
        for dataset in dict.fromkeys(dataset for dataset, _ in found):
            own = counts([difference for name, difference in found if name == dataset])
            gain = gain_of_lora(records, dataset)
            share = "–" if gain is None else f"{own['mean'] / gain:.2%}"
            numbers = (str(own[key]) for key in ("lower", "higher", "equal"))
            table.add_row(path.stem, dataset, *numbers, f"{own['mean']:.5f}", share)
    if not together:
        parser.error(f"no cell of these files has both rows, {title}; see their labels")
    Console().print(table)
    print(json.dumps({"row": options.row, "against": options.against, **counts(together)}))


if __name__ == "__main__":
    main()
