"""Compressing and training a denoiser of a given config, random weights: time, peak memory, sizes.

    python tools/bench_diffusion.py --config CONFIG.json [--keep_ratio 0.45] [--samples 8] [--steps 3]
    python tools/bench_diffusion.py --config CONFIG.json --few --resolution 1024 --samples 4 --steps 0

CONFIG.json is that of a denoiser, for example `unet/config.json` of Stable Diffusion 1.5 or XL, or
`transformer/config.json` of FLUX.1. The denoiser is real in shape and bfloat16 on disk; autoencoder and
text encoders are small, of the widths that it reads. Prints how its layers are classified, with the
reason where they stay dense, for the whole config; seconds and peak anonymous memory of compressing;
and LoRA steps (batch 1, float32) on the denoiser and on its emulator: peak memory and seconds per step
[memory_ratio, time_ratio]. `--steps 0` leaves training out. `--few` makes one block of each kind that
follows on itself, for models that do not fit here, and projects the seconds of the whole
[projected_seconds]: every block of the config takes as long as the measured one of its shape. The last
line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.extend.capabilities import kept_dense_of
from emloc.integrations.diffusers.skeleton import empty_model
from emloc.machine.memory import format_bytes
from emloc_diffusion.denoisers import DENOISERS
from emloc_diffusion.example import write_pictures
from emloc_diffusion.example_pipelines import write_pipeline
from emloc_diffusion.family import DiffusionFamily

FEWER = {"transformer_layers_per_block": 1, "num_layers": 1, "num_single_layers": 1}
"""Config keys that count blocks of one kind in a row."""


def stage(name: str, output: Path, **options: object) -> dict:
    """The manifest of one stage, run as a user would."""
    command = [sys.executable, "-m", "emloc", name, "--output_dir", str(output)]
    command += [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "emloc.json").read_text())


def kind_of(config: dict) -> str:
    """Of `example_pipelines`."""
    if config["_class_name"] == "FluxTransformer2DModel":
        return "flux"
    if config["_class_name"] == "SD3Transformer2DModel":
        return "sd3"
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd"


def skeleton(config: dict) -> nn.Module:
    """The denoiser of a config, without weights."""
    model_class = DENOISERS[config["_class_name"]].model_class
    return empty_model(Checkpoint("config", Path(), config, {}), model_class, torch.float32)


def classes(model: nn.Module) -> dict[str, list[str]]:
    """Layers by what becomes of them: compressed, with its kind, or dense, with the reason."""
    family, found = DiffusionFamily(), defaultdict(list)
    for name in (name for group in family.layer_groups(model) for name in group):
        layer = model.get_submodule(name)
        size = "×".join(map(str, layer.kernel_size)) if isinstance(layer, nn.Conv2d) else ""
        found[f"compressed: {'convolutions ' + size if size else 'linear'}"].append(name)
    for name, why in kept_dense_of(family, model).items():
        found[f"dense: {why}"].append(name)
    return found


def print_classes(model: nn.Module, console: Console) -> dict[str, dict[str, int]]:
    """The table of `classes`, with the parameters of each, and of what is no such layer."""
    everything, named = sum(p.numel() for p in model.parameters()), 0
    figures: dict[str, dict[str, int]] = {}
    table = Table("layers", "count", "parameters", "share")
    for what, names in classes(model).items():
        count = sum(model.get_parameter(f"{name}.weight").numel() for name in names)
        named += count
        figures[what] = {"layers": len(names), "parameters": count}
        table.add_row(what, str(len(names)), f"{count:,}", f"{count / everything:.1%}")
    table.add_row(
        "norms, biases", "", f"{everything - named:,}", f"{(everything - named) / everything:.1%}"
    )
    console.print(table)
    console.print(f"{everything:,} parameters, for example:")
    for what, names in classes(model).items():
        console.print(f"  {what}: {', '.join(names[:2])}", soft_wrap=True)
    return figures


def signature(model: nn.Module, block: str) -> str:
    """What tells how long a block takes: its parameters' shapes."""
    return str([tuple(p.shape) for p in model.get_submodule(block).parameters()])


def projected(whole: nn.Module, made: nn.Module, seconds: list[float]) -> float:
    """Seconds of all blocks of `whole`, by those measured of `made`."""
    family, known = DiffusionFamily(), defaultdict(list)
    for block, taken in zip(family.blocks(made), seconds, strict=True):
        known[signature(made, block)].append(taken)
    return sum(mean(known[signature(whole, block)]) for block in family.blocks(whole))


def main() -> None:
    """Write, compress, train, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--keep_ratio", type=float, default=0.45)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the artefacts go for a while")
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    console = Console()
    whole = skeleton(config)
    figures: dict[str, object] = {"classes": print_classes(whole, console)}
    shape = {key: value for key, value in config.items() if not key.startswith("_")}
    if options.few:
        shape |= {key: value for key, value in FEWER.items() if key in shape}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        base = write_pipeline(root / "base", kind_of(config), dtype=torch.bfloat16, **shape)
        data = {
            "instance_data_dir": write_pictures(root / "pictures", 4, seed=0),
            "instance_prompt": "a photo of sks square", "resolution": options.resolution,
        }  # fmt: skip
        made = stage(
            "compress", root / "emulator", model_name_or_path=base, format="low_rank",
            keep_ratio=options.keep_ratio,
            num_calibration_samples=options.samples, calibration_batch_size=1, **data,
        )  # fmt: skip
        train = {
            **data, "max_train_steps": options.steps, "train_batch_size": 1, "dtype": "float32",
        }  # fmt: skip
        runs = {} if not options.steps else {
            "base": stage("train", root / "lora", model_name_or_path=base, **train),
            "emulator": stage("train", root / "adapter", emulator=root / "emulator", **train),
        }  # fmt: skip
    measured, summary = made["measured"], made["summary"]
    console.print(f"compressed: {format_bytes(summary['base_bytes'])} to "
                  f"{format_bytes(summary['emulator_bytes'])} in {measured['seconds']:.0f} s, peak "
                  f"{format_bytes(measured['peak_bytes'])}")  # fmt: skip
    figures |= {
        "seconds": measured["seconds"], "peak_bytes": measured["peak_bytes"],
        "base_bytes": summary["base_bytes"], "emulator_bytes": summary["emulator_bytes"],
    }  # fmt: skip
    if options.few:
        few = skeleton({**config, **shape})
        figures["projected_seconds"] = projected(whole, few, measured["block_seconds"])
        console.print(f"{len(DiffusionFamily().blocks(few))} blocks of "
                      f"{len(DiffusionFamily().blocks(whole))}; projected for all: "
                      f"{figures['projected_seconds'] / 60:.1f} min")  # fmt: skip
    if runs:
        table = Table("", "weights", "peak memory", "s / step")
        for name, run in runs.items():
            found = run["measured"]
            table.add_row(name, format_bytes(run["summary"]["train_weight_bytes"]),
                          format_bytes(found["peak_bytes"]), f"{found['seconds_per_step']:.2f}")  # fmt: skip
        console.print(table)
        ours, theirs = (runs[name]["measured"] for name in ("emulator", "base"))
        figures |= {
            "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
            "time_ratio": ours["seconds_per_step"] / theirs["seconds_per_step"],
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
