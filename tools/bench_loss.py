"""A LoRA step with the loss at labelled tokens alone, against TRL's own loss, on the CPU.

    python tools/bench_loss.py [--tokens 243] [--labelled 0.5] [--dtype bfloat16] [--rounds 4]

SmolLM2-135M-Instruct with a LoRA on all linear layers and a batch of four samples, of whose tokens a
part is labelled, as in question and answer. Both sides take the loss of the same batch through
`compute_loss` of their trainer and go back, alternating in one process; each in a process of its own
for its peak memory. The last line is one JSON object: [step_ratio], minimum over rounds in processor
time, and [memory_ratio], each ours over TRL's, and [loss_difference].
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, default_data_collator
from trl import SFTConfig, SFTTrainer

from emloc.integrations.transformers.loading import load_tokenizer
from emloc.integrations.transformers.loss import IGNORED
from emloc.machine.memory import PeakMemory, format_bytes, return_large_blocks
from emloc_llm.demo.model import smollm2
from emloc_llm.training import Trainer

SIDES: dict[str, Any] = {"TRL": SFTTrainer, "EMLoC": Trainer}
SAMPLES = 4


def trainer_of(kind: Any, options: argparse.Namespace, folder: str) -> Any:
    """A trainer of SmolLM2 with a LoRA."""
    torch.manual_seed(0)
    path = smollm2()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options.dtype))
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    data = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    arguments = SFTConfig(output_dir=folder, use_cpu=True, bf16=False, report_to="none")
    return kind(
        model=model, args=arguments, train_dataset=data, data_collator=default_data_collator,
        processing_class=load_tokenizer(path),
    )  # fmt: skip


def batch_of(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Tokens at random, the last part of them labelled."""
    size = (SAMPLES, options.tokens)
    ids = torch.randint(100, 40000, size, generator=torch.manual_seed(0))
    labels = ids.clone()
    labels[:, : round(options.tokens * (1 - options.labelled))] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Loss and processor seconds of one forward and backward pass."""
    started = time.process_time()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    seconds = time.process_time() - started
    trainer.model.zero_grad()
    return float(loss.detach()), seconds


def peak_of(side: str, options: argparse.Namespace, folder: str) -> None:
    """Print the peak memory of two steps."""
    return_large_blocks()
    trainer, batch = trainer_of(SIDES[side], options, folder), batch_of(options)
    with PeakMemory("cpu") as peak:
        for _ in range(2):
            step(trainer, batch)
    print(json.dumps(peak.peak_bytes))


def main() -> None:
    """Measure both sides, print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=243)
    parser.add_argument("--labelled", type=float, default=0.5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.side:
            return peak_of(options.side, options, folder)
        peaks: dict[str, int] = {}
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            printed = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks[side] = json.loads(printed.stdout.splitlines()[-1])
        trainers = {side: trainer_of(kind, options, folder) for side, kind in SIDES.items()}
        batch = batch_of(options)
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side, trainer in trainers.items():
                found[side].append(step(trainer, batch))
    seconds = {side: min(taken for _, taken in steps) for side, steps in found.items()}
    losses = {side: steps[0][0] for side, steps in found.items()}
    table = Table("", *SIDES)
    table.add_row("step", *(f"{taken:.2f} s" for taken in seconds.values()))
    table.add_row("peak memory over the model", *(format_bytes(peak) for peak in peaks.values()))
    table.add_row("loss", *(f"{loss:.5f}" for loss in losses.values()))
    Console().print(table)
    figures = {
        "step_ratio": seconds["EMLoC"] / seconds["TRL"],
        "memory_ratio": peaks["EMLoC"] / peaks["TRL"],
        "loss_difference": abs(losses["EMLoC"] - losses["TRL"]),
    }
    print(json.dumps({name: round(value, 6) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
