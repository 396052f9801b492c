"""Ranks allocated by predicted error against one ratio for all: predicted errors, emulators' losses, time.

    python tools/bench_allocation.py --data train.jsonl --test test.jsonl [--column_map a=prompt,b=completion]
        [--keep_ratios 0.4 0.6] [--weightings sensitivity parameters relative raw] [--model_name_or_path M]

The model is SmolLM2-135M by default. Per keep ratio an emulator is made with each allocation, from the
same calibration samples, and its loss on --test is measured before any training. Besides the product's
own weighting of the layers' errors (`sensitivity`: what they do to the hidden state that a block passes
on) three others can be tried: `raw` sums the squared errors of all outputs, `relative` divides each by
its layer's outputs, `parameters` lets every parameter count the same at the uniform ranks. `predicted` is
in all rows the product's measure; `ranks` are the least and largest over the uniform ones; `x uniform`
compares the CPU seconds of compressing. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.compression import truncation
from emloc.linalg.allocation import Candidate, allocate

WEIGHTINGS: dict[str, Callable[[Candidate], float]] = {
    "sensitivity": lambda one: one.sensitivity,
    "parameters": lambda one: one.uniform * one.cost,
    "relative": lambda one: one.lost(one.uniform) / one.total,
    "raw": lambda one: one.lost(one.uniform),
}


def data_options(options: argparse.Namespace) -> dict:
    """How data is read, as the stages take it."""
    mapped = {"column_map": options.column_map} if options.column_map else {}
    return {**mapped, "max_length": options.max_length}


def measure(folder: Path, options: argparse.Namespace, ratio: float, weighting: str | None) -> dict:
    """One emulator; without a weighting a uniform one."""

    def weighted(candidates: dict[str, Candidate]) -> dict[str, int]:
        weigh = WEIGHTINGS[str(weighting)]
        return allocate({n: replace(one, sensitivity=weigh(one)) for n, one in candidates.items()})

    data = data_options(options)
    started = time.process_time()
    with patch.object(truncation, "allocate", weighted):
        emulator = emloc.compress(
            model_name_or_path=options.model_name_or_path,
            dataset=str(options.data),
            output_dir=folder / f"{ratio}-{weighting}",
            format="low_rank",
            keep_ratio=ratio,
            keep_ratio_allocation="uniform" if weighting is None else "error",
            num_calibration_samples=options.samples,
            **data,
        )
    seconds = time.process_time() - started
    manifest = Manifest.read(emulator)
    loss = emloc.evaluate(
        model_name_or_path=str(emulator), dataset=str(options.test), max_new_tokens=0,
        num_samples=options.test_samples, **data,
    )["loss"]  # fmt: skip
    shares = [e["rank"] / e.get("uniform_rank", e["rank"]) for e in manifest.layers.values()]
    return {
        "loss": loss,
        "predicted": manifest.summary.get("predicted_error", {}),
        "emulator_bytes": manifest.summary["emulator_bytes"],
        "least_share": min(shares),
        "largest_share": max(shares),
        "seconds": manifest.measured["seconds"],
        "cpu_seconds": seconds,
        "peak_bytes": manifest.measured["peak_bytes"],
    }


def main() -> None:
    """Measure all ratios and weightings, print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--column_map", default="")
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--keep_ratios", type=float, nargs="+", default=[0.4, 0.6])
    parser.add_argument("--weightings", nargs="+", choices=WEIGHTINGS, default=["sensitivity"])
    parser.add_argument("--samples", type=int, default=64, help="to calibrate on")
    parser.add_argument("--test_samples", type=int, default=128)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where the emulators go for a while")
    options = parser.parse_args()
    if options.model_name_or_path is None:
        from emloc_llm.demo.model import smollm2

        options.model_name_or_path = str(smollm2())
    base = emloc.evaluate(
        model_name_or_path=options.model_name_or_path, dataset=str(options.test),
        max_new_tokens=0, num_samples=options.test_samples, **data_options(options),
    )["loss"]  # fmt: skip
    table = Table("keep", "allocation", "predicted", "loss", "ranks", "s", "CPU s", "x uniform")
    found: dict[str, dict[str, dict]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for ratio in options.keep_ratios:
            rows = found[f"{ratio:g}"] = {}
            for weighting in (None, *options.weightings):
                name = weighting or "uniform"
                rows[name] = measure(Path(temporary), options, ratio, weighting)
                print(json.dumps({f"{ratio:g} {name}": rows[name]}), flush=True)
            for name, row in rows.items():
                errors = row["predicted"] or rows[options.weightings[0]]["predicted"]
                predicted = errors["allocated" if row["predicted"] else "uniform"]
                row["predicted"] = predicted
                row["seconds_ratio"] = row["cpu_seconds"] / rows["uniform"]["cpu_seconds"]
                table.add_row(
                    f"{ratio:g}", name, f"{predicted:.4f}", f"{row['loss']:.4f}",
                    f"{row['least_share']:.2f} … {row['largest_share']:.2f}",
                    f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", f"{row['seconds_ratio']:.2f}",
                )  # fmt: skip
    console = Console()
    console.print(f"loss of the base model: {base:.4f}")
    console.print(table)
    print(json.dumps({"base_loss": base, "keep_ratios": found}))


if __name__ == "__main__":
    main()
