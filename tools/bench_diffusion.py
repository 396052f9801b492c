"""Compressing and training a UNet of a given config, random weights: time, peak memory, sizes.

    python tools/bench_diffusion.py --config CONFIG.json [--keep_ratio 0.45] [--samples 8] [--steps 3]

CONFIG.json is a UNet2DConditionModel's, for example the `unet/config.json` of Stable Diffusion 1.5. The
UNet is real in shape and bfloat16 on disk; autoencoder and text encoder are small, of the UNet's widths.
Prints how many layers are compressed and why the others are not; seconds and peak anonymous memory of
compressing; and LoRA steps (batch 1, 64 × 64 latents, float32) on the UNet and on its emulator: peak
memory and seconds per step [memory_ratio, time_ratio]. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from emloc.memory import format_bytes
from emloc_diffusion.example import write_pictures
from emloc_diffusion.example_pipelines import write_pipeline


def stage(name: str, output: Path, **options: object) -> dict:
    """The manifest of one stage, run as a user would."""
    command = [sys.executable, "-m", "emloc", name, "--output_dir", str(output)]
    command += [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "emloc.json").read_text())


def main() -> None:
    """Write, compress, train, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--keep_ratio", type=float, default=0.45)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the artefacts go for a while")
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    shape = {key: value for key, value in config.items() if not key.startswith("_")}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        base = write_pipeline(root / "base", "sd", dtype=torch.bfloat16, **shape)
        data = {
            "instance_data_dir": write_pictures(root / "pictures", 4, seed=0),
            "instance_prompt": "a photo of sks square", "resolution": 512,
        }  # fmt: skip
        made = stage(
            "compress", root / "emulator", model_name_or_path=base, keep_ratio=options.keep_ratio,
            num_calibration_samples=options.samples, calibration_batch_size=1, **data,
        )  # fmt: skip
        train = {
            **data, "max_train_steps": options.steps, "train_batch_size": 1, "dtype": "float32",
        }  # fmt: skip
        runs = {
            "base": stage("train", root / "lora", model_name_or_path=base, **train),
            "emulator": stage("train", root / "adapter", emulator=root / "emulator", **train),
        }
    layers = sum(len(entry["layers"]) for entry in made["layers"].values())
    reasons = Counter(made["kept_dense"].values())
    measured, summary = made["measured"], made["summary"]
    table = Table("", "weights", "peak memory", "s / step")
    for name, run in runs.items():
        found = run["measured"]
        table.add_row(name, format_bytes(run["summary"]["train_weight_bytes"]),
                      format_bytes(found["peak_bytes"]), f"{found['seconds_per_step']:.2f}")  # fmt: skip
    console = Console()
    console.print(f"{layers} layers compressed; dense: {dict(reasons)}")
    console.print(f"{format_bytes(summary['base_bytes'])} to {format_bytes(summary['emulator_bytes'])} in "
                  f"{measured['seconds']:.0f} s, peak {format_bytes(measured['peak_bytes'])}")  # fmt: skip
    console.print(table)
    base_run, emulator_run = (runs[name]["measured"] for name in ("base", "emulator"))
    figures = {
        "layers": layers, "dense": reasons, "seconds": measured["seconds"],
        "peak_bytes": measured["peak_bytes"], "base_bytes": summary["base_bytes"],
        "emulator_bytes": summary["emulator_bytes"],
        "memory_ratio": emulator_run["peak_bytes"] / base_run["peak_bytes"],
        "time_ratio": emulator_run["seconds_per_step"] / base_run["seconds_per_step"],
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
