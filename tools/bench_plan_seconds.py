"""Seconds per step as `emloc plan --measure` estimates them, against what training takes.

    python tools/bench_plan_seconds.py [--only WORD] [--steps 4]

Random models of the three families (those of `bench_plan.py`), in float32 on the CPU: on the base in memory,
with gradient checkpointing, streamed from disk, and on an emulator of `format=auto` in 4.2 bits. The device
is measured anew before every setting, and each training is a process of its own; its time is that of its
median step but the first. All times but the disk's are the processor's, so that other work on the machine
counts little. `ratio` is the estimate over that time [within_30_percent: the share of settings from 0.7 to
1.3]. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from bench_plan import MODELS, command
from rich.console import Console
from rich.table import Table

import emloc
from emloc.planning import rates

WAYS: Mapping[str, Mapping[str, Any]] = {
    "base": {},
    "base, checkpointing": {"gradient_checkpointing": True},
    "base, streamed": {"stream": True},
    "emulator": {},
}
ROWS = {
    "base": "LoRA on the base",
    "base, checkpointing": "LoRA on the base",
    "base, streamed": "streamed LoRA on the base",
    "emulator": "emulator",
}
"""The plan's names of the ways."""


def estimate(base: Path, way: str, options: Mapping[str, Any]) -> float:
    """Seconds of a step, of a device measured now."""
    given = {name: value for name, value in options.items() if name != "stream"}
    with patch.object(rates, "_seconds", processor_seconds):
        plan = emloc.plan(
            model_name_or_path=str(base), device="cpu", dtype="float32", measure=True, **given
        )
    [row] = [each for each in plan["ways"] if each["name"] == ROWS[way]]
    return float(row["seconds_per_step"])


def processor_seconds(call: Callable[[], object], device: str, rounds: int = 7) -> float:
    """The median of the processor's time for a call, in place of the clock's."""
    call()
    return median(timeit.repeat(call, time.process_time, repeat=rounds, number=10)) / 10


def trained(
    base: Path, emulator: Path, out: Path, way: str, steps: int, options: Mapping[str, Any]
) -> float:
    """Seconds of the median step but the first."""
    model = {"emulator": emulator} if way == "emulator" else {"model_name_or_path": base}
    given = {
        **options, **model, "output_dir": out, "max_steps": steps, "num_train_epochs": 1000,
        "logging_steps": 1, "device": "cpu", "dtype": "float32", "learning_rate": 1e-5,
    }  # fmt: skip
    script = (
        "import json, sys, time\n"
        "from emloc.integrations.transformers import training\n"
        "import emloc\n"
        "training.time.perf_counter = time.process_time\n"
        "kept = []\n"
        "ends = training.Progression.on_step_end\n"
        "def on_step_end(self, *given, **named):\n"
        "    ends(self, *given, **named)\n"
        "    kept.extend(self.step_seconds[-1:])\n"
        "training.Progression.on_step_end = on_step_end\n"
        "emloc.train(**json.loads(sys.argv[1]))\n"
        "print(json.dumps(kept))\n"
    )
    told = json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in given.items()})
    done = subprocess.run(
        [sys.executable, "-c", script, told], check=True, capture_output=True, text=True
    )
    return median(json.loads(done.stdout.splitlines()[-1])[1:])


def main() -> None:
    """Measure, print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="settings whose name holds this word")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    table = Table("model", "way", "estimated", "measured", "ratio")
    rows: list[dict[str, Any]] = []
    for name, model in MODELS.items():
        if not any(options.only in f"{name} {way}" for way in WAYS):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            model.write(root / "base")
            size = model.sizes[0]
            shared = {
                "dataset": str(model.data(root, size, 4)), "per_device_train_batch_size": 2,
                model.size_option: size, **model.more,
            }  # fmt: skip
            if name in ("unet", "flux"):
                shared["instance_data_dir"] = shared.pop("dataset")
            emulator = root / "emulator"
            if options.only in f"{name} emulator":
                calibration = {"num_calibration_samples": 4, "calibration_batch_size": 2}
                data = {k: v for k, v in shared.items() if k != "per_device_train_batch_size"}
                subprocess.run(
                    command("compress", {"model_name_or_path": root / "base", "output_dir": emulator,
                                         **calibration, **data}),
                    check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            for way, more in WAYS.items():
                if options.only not in f"{name} {way}":
                    continue
                given = {**shared, **more}
                planned = estimate(root / "base", way, given)
                out = root / f"trained-{way}".replace(" ", "-").replace(",", "")
                taken = trained(root / "base", emulator, out, way, options.steps, given)
                rows.append({"model": name, "way": way, "estimated": planned, "measured": taken,
                             "ratio": planned / taken})  # fmt: skip
                table.add_row(name, way, f"{planned:.2f}", f"{taken:.2f}", f"{planned / taken:.2f}")
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    Console(width=110).print(table)
    near = [row for row in rows if 0.7 <= row["ratio"] <= 1.3]
    print(json.dumps({"settings": len(rows), "within_30_percent": len(near) / max(1, len(rows))}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
