"""Training on the original block by block (`emloc train --stream true`): memory over depth, time of a step.

    python tools/bench_streamed.py [--blocks 12 48] [--hidden_size 512] [--tokens 4096] [--steps 3]
        [--ways WAY …]

Writes random Llama-shaped checkpoints that differ in depth alone, and trains a LoRA of rank 4 on each,
streamed from disk and from memory (as stored and in 4 bits), and with the whole model in memory with gradient
checkpointing, each in a process of its own. A step is one micro-batch of so many tokens in samples of 128.
`weights` is the peak (over the stage's start) less the LoRA, its gradients and AdamW's moments, and what
enters each block, which grow with depth and are printed apart; `depth_ratio` compares it between the depths.
`step_ratio` is the time of a streamed step over that of one in memory, of the deep model, the mean of all but
the first. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from emloc.machine.memory import format_bytes
from emloc_llm.example import write_model

LENGTH = 128
MEMORY = "in memory"
WAYS: dict[str, dict[str, object]] = {
    "from disk": {"stream": "true", "stream_from": "disk"},
    "inputs on disk": {"stream": "true", "stream_inputs": "disk"},
    "from memory": {"stream": "true", "stream_from": "ram"},
    "from memory, 4 bits": {"stream": "true", "stream_from": "ram", "stream_bits": 4},
    MEMORY: {"gradient_checkpointing": "true"},
}


def make(root: Path, blocks: int, hidden: int, rows: int) -> dict[str, Path]:
    """A checkpoint, and rows that are longer than a sample."""
    base = write_model(
        root / "base", num_hidden_layers=blocks, hidden_size=hidden, head_dim=hidden // 8,
        intermediate_size=hidden * 11 // 4, num_attention_heads=8, num_key_value_heads=8,
        max_shard_size="200MB",
    )  # fmt: skip
    data = root / "train.jsonl"
    row = {"prompt": "one two", "completion": "three four five " * LENGTH}
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(rows)))
    return {"base": base, "data": data}


def train(
    made: dict[str, Path], out: Path, tokens: int, steps: int, more: dict[str, object]
) -> dict[str, Any]:
    """What one training measured."""
    options = {
        "model_name_or_path": made["base"], "dataset": made["data"], "output_dir": out,
        "max_length": LENGTH, "per_device_train_batch_size": tokens // LENGTH,
        "max_steps": steps, "lora_r": 4, "logging_steps": 1, "save_steps": 1000, "device": "cpu", **more,
    }  # fmt: skip
    command = [sys.executable, "-m", "emloc", "train"]
    command += [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    manifest = json.loads((out / "emloc.json").read_text())
    return {**manifest["measured"], **manifest["summary"]}


def main() -> None:
    """Measure, print tables, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs=2, default=[12, 48])
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    options = parser.parse_args()
    ways = {way: WAYS[way] for way in options.ways}
    weights: dict[str, list[int]] = {way: [] for way in ways}
    seconds: dict[str, float] = {}
    table = Table(
        "way", "blocks", "peak", "LoRA and optimiser", "inputs of blocks", "weights", "s per step"
    )
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as temporary:
            made = make(Path(temporary), blocks, options.hidden_size, 4 * options.tokens // LENGTH)
            for way, more in ways.items():
                out = Path(temporary) / way.replace(" ", "-").replace(",", "")
                measured = train(made, out, options.tokens, options.steps, more)
                lora = 4 * int(measured["trainable_bytes"])
                on_disk = more.get("stream_inputs") == "disk"
                inputs = 0 if on_disk else blocks * options.tokens * options.hidden_size * 4
                left = int(measured["peak_bytes"]) - lora - inputs
                weights[way].append(left)
                seconds[way] = float(measured["seconds_per_step"])
                table.add_row(
                    way, str(blocks), format_bytes(int(measured["peak_bytes"])), format_bytes(lora),
                    format_bytes(inputs), format_bytes(left), f"{seconds[way]:.2f}",
                )  # fmt: skip
    Console(width=110).print(table)
    print(
        json.dumps(
            {
                "depth_ratio": {way: deep / shallow for way, (shallow, deep) in weights.items()},
                "step_ratio": {
                    way: seconds[way] / seconds[MEMORY] for way in ways if MEMORY in ways
                },
            }
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
