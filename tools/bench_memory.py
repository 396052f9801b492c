"""Peak memory of compress, correct and merge over the depth of the model.

    python tools/bench_memory.py [--blocks 12 48] [--hidden_size 512]

Writes random Llama-shaped checkpoints that differ in depth alone, runs each stage in a process of its
own, and compares its peak anonymous memory (over the stage's start) between the depths [depth_ratio],
and with the workspace it cannot do without: one block in float32, its moments, and the hidden states
[over_workspace]. For the latter, what the same stage takes on a one-block model of width 64 is
subtracted: libraries that are imported on the way, and the thread pools' buffers. The LoRA is random:
what it learnt changes no byte of memory. correct and merge hold a few MiB, of which the heaps of threads take
another share each time: they run five times, and the middle one counts. The last line is one JSON object.

Once, by hand, at the size of Llama-2-7B: tools/bench_stages.py and its record tools/records/llama_7b.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import emloc_llm
from emloc.machine.memory import format_bytes
from emloc_llm.example import write_model, write_rows

assert emloc_llm
SAMPLES, BATCH = 16, 4
REPEATS = 5


def make(root: Path, blocks: int, hidden: int) -> dict[str, Path]:
    """A checkpoint and its data."""
    base = write_model(
        root / "base", num_hidden_layers=blocks, hidden_size=hidden, head_dim=hidden // 8,
        intermediate_size=hidden * 11 // 4, num_attention_heads=8, num_key_value_heads=8,
        max_shard_size="200MB", dtype=torch.bfloat16,
    )  # fmt: skip
    return {"base": base, "data": write_rows(root / "train.jsonl", SAMPLES, seed=0)}


def stage(name: str, output: Path, **options: object) -> int:
    """Peak anonymous bytes of one stage."""
    command = [sys.executable, "-m", "emloc", name, "--output_dir", str(output)]
    command += [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return int(json.loads((output / "emloc.json").read_text())["measured"]["peak_bytes"])


def middle(name: str, output: Path, **options: object) -> int:
    """Median of the peaks of `REPEATS` runs."""
    return int(
        statistics.median(stage(name, output / str(run), **options) for run in range(REPEATS))
    )


def measure(root: Path, blocks: int, hidden: int) -> dict[str, int]:
    """Peaks of the three stages at one depth."""
    made = make(root, blocks, hidden)
    data = {
        "dataset": made["data"],
        "num_calibration_samples": SAMPLES,
        "calibration_batch_size": BATCH,
    }
    emulator = root / "emulator"
    peaks = {
        "compress": stage(
            "compress", emulator, model_name_or_path=made["base"], format="low_rank", **data
        )
    }
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(emulator), LoraConfig(r=8, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(root / "adapter")
    corrected = root / "corrected"
    peaks["correct"] = middle(
        "correct", corrected, adapter=root / "adapter", emulator=emulator, limit="none"
    )
    peaks["merge"] = middle("merge", root / "merged", adapter=corrected / "0")
    return peaks


def workspace(hidden: int) -> int:
    """One block in float32, its moments in float32, and the hidden states of all samples."""
    inner = hidden * 11 // 4
    weights = 4 * hidden * hidden + 3 * hidden * inner
    moments = 4 * hidden * hidden  # q-k-v, o, gate-up by their inputs, down by its outputs
    return 4 * (weights + moments + SAMPLES * 64 * hidden)


def main() -> None:
    """Measure, print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs=2, default=[12, 48])
    parser.add_argument("--hidden_size", type=int, default=1024)
    options = parser.parse_args()
    peaks: dict[int, dict[str, int]] = {}
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as temporary:
            peaks[blocks] = measure(Path(temporary), blocks, options.hidden_size)
    with tempfile.TemporaryDirectory() as temporary:
        own = measure(Path(temporary), 1, 64)
    shallow, deep = options.blocks
    needed = workspace(options.hidden_size)
    table = Table(
        "stage",
        "libraries",
        *(f"{blocks} blocks" for blocks in options.blocks),
        "ratio",
        "over workspace",
    )
    for name in peaks[deep]:
        ratio = peaks[deep][name] / peaks[shallow][name]
        table.add_row(
            name, format_bytes(own[name]), *(format_bytes(peaks[blocks][name]) for blocks in options.blocks),
            f"{ratio:.3f}", f"{(peaks[deep][name] - own[name]) / needed:.2f}",
        )  # fmt: skip
    Console().print(table)
    print(
        json.dumps(
            {
                "depth_ratio": max(
                    peaks[deep][name] / peaks[shallow][name] for name in peaks[deep]
                ),
                "over_workspace": max(peaks[deep][n] - own[n] for n in own) / needed,
                "workspace_bytes": needed,
                "peak_bytes": peaks,
            }
        )
    )


if __name__ == "__main__":
    main()
