"""Step time and memory of LoRA on a model against LoRA on its emulator.

    python tools/bench_train.py [--keep_ratio 0.4] [--hidden_size 1024] [--blocks 8] [--tokens 512]

A random Llama-shaped model; all sides are loaded with transformers, wrapped by stock PEFT with the
same LoRA, and take the same steps (forward, backward, AdamW), alternating, in float32 on the CPU and
in bfloat16 on CUDA. The emulator runs as training runs it, with `fuse_lora`, and once without it
[stock_step_ratio], and without a LoRA, back through the frozen layers alone [frozen_step_ratio], which
no LoRA can be cheaper than. Each side runs in a process of its own for its peak memory (resident, since
weights stay in the mapped file on a CPU); what the process held before it loaded is subtracted. The
last line is one JSON object: [step_ratio] is emulator over base, minimum over steps; the products of
frozen weights alone would give `keep_ratio` plus the LoRA's and attention's share [flop_ratio].
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import emloc
import emloc_llm
from emloc.integrations.peft.fused_lora import fuse_lora
from emloc.machine.memory import PeakMemory, format_bytes, return_large_blocks
from emloc_llm.example import write_model, write_rows

assert emloc_llm
STEPS = 6


def one_side(folder: str, tokens: int, kind: str) -> None:
    """Train some steps; print seconds of the fastest and the peak memory."""
    return_large_blocks()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    seconds: list[float] = []
    with PeakMemory(device, mapped=True) as peak:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, attn_implementation="sdpa"
        )
        trained = torch.zeros(1, requires_grad=True)
        if kind == "frozen":
            model.requires_grad_(False).enable_input_require_grads()
        else:
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        if kind == "fused":
            fuse_lora(model)
        parameters = [p for p in model.train().parameters() if p.requires_grad] or [trained]
        optimiser = torch.optim.AdamW(parameters, lr=1e-4)
        for _ in range(STEPS):
            ids = torch.randint(3, 250, (2, tokens // 2), device=device)
            started = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": min(seconds[1:]), "peak_bytes": peak.peak_bytes}))


def flops(folder: Path) -> int:
    """Multiplications of all linear layers and LoRAs per token, forward and backward."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = model.get_output_embeddings()
    frozen = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n
    )
    lora = sum(
        16 * (m.in_features + m.out_features)
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    )
    # Frozen weights: forward and the gradient of the inputs; the LoRA's own gradients as well.
    return 2 * frozen + 3 * lora


def main() -> None:
    """Measure both sides, print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--keep_ratio", type=float, default=0.4)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return one_side(options.side, options.tokens, options.kind)
    hidden = options.hidden_size
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base = write_model(
            root / "base", num_hidden_layers=options.blocks, hidden_size=hidden,
            head_dim=hidden // 8, intermediate_size=hidden * 11 // 4, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=2048,
        )  # fmt: skip
        emulator = emloc.compress(
            model_name_or_path=str(base), output_dir=root / "emulator",
            dataset=str(write_rows(root / "train.jsonl", 32, seed=0)), format="low_rank",
            keep_ratio=options.keep_ratio, num_calibration_samples=32,
        )  # fmt: skip
        rounds: dict[str, list[dict[str, float]]] = {}
        sides = [("base", base, "stock"), ("emulator", emulator, "fused"),
                 ("stock PEFT", emulator, "stock"), ("no LoRA", emulator, "frozen")]  # fmt: skip
        for _ in range(3):  # alternating, so that a busy moment does not fall on one side
            for name, folder, kind in sides:
                command = [sys.executable, __file__, "--side", str(folder), "--kind", kind]
                command += ["--tokens", str(options.tokens)]
                printed = subprocess.run(command, check=True, capture_output=True, text=True)
                rounds.setdefault(name, []).append(json.loads(printed.stdout.splitlines()[-1]))
        expected = flops(emulator) / flops(base)
    best = {
        name: {key: min(r[key] for r in found) for key in ("seconds", "peak_bytes")}
        for name, found in rounds.items()
    }
    table = Table("", *best)
    ratios = {
        key: {name: best[name][key] / best["base"][key] for name in best}
        for key in ("seconds", "peak_bytes")
    }
    table.add_row("step", *(f"{side['seconds']:.3f} s" for side in best.values()))
    table.add_row("  over base", *(f"{ratio:.3f}" for ratio in ratios["seconds"].values()))
    table.add_row("peak memory", *(format_bytes(side["peak_bytes"]) for side in best.values()))
    table.add_row("  over base", *(f"{ratio:.3f}" for ratio in ratios["peak_bytes"].values()))
    table.add_row("multiplications", "", f"{expected:.3f}", "", "")
    Console().print(table)
    figures = {
        "step_ratio": ratios["seconds"]["emulator"],
        "stock_step_ratio": ratios["seconds"]["stock PEFT"],
        "frozen_step_ratio": ratios["seconds"]["no LoRA"],
        "memory_ratio": ratios["peak_bytes"]["emulator"],
        "stock_memory_ratio": ratios["peak_bytes"]["stock PEFT"],
        "flop_ratio": expected,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
