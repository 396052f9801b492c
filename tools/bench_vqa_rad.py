"""Base, LoRA on the base, EMLoC without correction and EMLoC on VQA-RAD, over seeds.

    python tools/bench_vqa_rad.py --data FOLDER [--seeds 0 1 2] [--max_steps 200] [--folder DIR]

FOLDER holds `train.jsonl` and `test.jsonl` with `image`, `question`, `answer` and `answer_type`. The
model is the one of `emloc demo --family vlm`, small and never shown a radiograph, so the scores say how
the rows compare and nothing about medicine. The last line is one JSON object with, per row, mean and
spread (largest minus smallest) over the seeds of loss, closed accuracy and open recall.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from emloc.demos.comparison import Comparison
from emloc_vlm.demo.base import trained_base

KEYS = ("loss", "closed_accuracy", "open_recall")


def measure(data: Path, out: Path, seed: int, steps: int, keep_ratio: float) -> dict:
    """Scores of the rows for one seed."""
    ways = Comparison(
        base=str(trained_base()),
        out=out,
        train_data=str(data / "train.jsonl"),
        test_data=str(data / "test.jsonl"),
        data={"seed": seed},
        compress={
            "format": "low_rank", "keep_ratio": keep_ratio, "num_calibration_samples": 64,
        },
        train={
            "max_steps": steps, "per_device_train_batch_size": 16, "lora_r": 8, "lora_alpha": 16,
            "learning_rate": 2e-3, "logging_steps": 10,
        },
        correct={"num_calibration_samples": 64},
        evaluate={"max_new_tokens": 16, "per_device_eval_batch_size": 64},
    )  # fmt: skip
    ways.make()
    return {name: {key: found[key] for key in KEYS} for name, found in ways.score().items()}


def main() -> None:
    """Measure all seeds, print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--keep_ratio", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, help="where the artefacts go for a while")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for seed in options.seeds:
            out = Path(temporary) / str(seed)
            out.mkdir()
            found.append(measure(options.data, out, seed, options.max_steps, options.keep_ratio))
    table = Table("", *(f"{key} (spread)" for key in KEYS))
    figures = {}
    for name in found[0]:
        figures[name] = {}
        for key in KEYS:
            values = [one[name][key] for one in found]
            figures[name][key] = {"mean": mean(values), "spread": max(values) - min(values)}
        cells = (f"{v['mean']:.4f} ({v['spread']:.4f})" for v in figures[name].values())
        table.add_row(name, *cells)
    Console().print(table)
    print(json.dumps({"seeds": options.seeds, "steps": options.max_steps, "rows": figures}))


if __name__ == "__main__":
    main()
