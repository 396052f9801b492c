"""Compress, train, correct and evaluate a real model on the orders task, and say what came out."""

import time
from pathlib import Path

from emloc.config import DemoConfig
from emloc.demos.comparison import Comparison, size_of
from emloc.demos.report import plot, print_table, write_summary
from emloc_llm.demo.model import smollm2
from emloc_llm.demo.orders import write_orders

MAX_STEPS = 24
NUM_SAMPLES = 32
NUM_CORRECTING = 24
BATCH = 4

LORA = {"lora_r": 8, "lora_alpha": 16, "learning_rate": 1e-3, "logging_steps": 2, "save_steps": 10}


def run_demo(config: DemoConfig) -> Path:
    """See `ModelFamily.demo`; stages that are complete in `output_dir` are not run again."""
    started = time.monotonic()
    out = config.output_dir
    out.mkdir(parents=True, exist_ok=True)
    base = config.model_name_or_path or str(smollm2())
    steps = config.max_steps or MAX_STEPS
    count = config.num_samples or NUM_SAMPLES
    # What is right for messages that the LoRA has learnt by heart is not for others.
    unlearnt = write_orders(out / "correct.jsonl", NUM_CORRECTING, config.seed + 1, test=False)
    ways = Comparison(
        base=base,
        out=out,
        train_data=str(write_orders(out / "train.jsonl", steps * BATCH, config.seed, test=False)),
        test_data=str(write_orders(out / "test.jsonl", count, config.seed, test=True)),
        data={"seed": config.seed, "device": config.device},
        compress={**size_of(config), "num_calibration_samples": 24},
        train={**LORA, "max_steps": steps, "per_device_train_batch_size": BATCH},
        correct={"dataset": unlearnt, "num_calibration_samples": NUM_CORRECTING},
        evaluate={"max_new_tokens": 64, "per_device_eval_batch_size": 32},
    )
    ways.make()
    rows = ways.rows(ways.score())
    write_summary(rows, out / "summary.json", family="llm", model=base,
                  correction=ways.correction(), seconds=round(time.monotonic() - started, 1),
                  samples=count, steps=steps)  # fmt: skip
    plot(rows, out / "summary.png")
    print_table(rows, "Customer messages to JSON, on unseen messages, run on the original model")
    print(f"Everything is in {out}: emulator, adapters, answers, summary.json, summary.png.")
    print(
        "Next, your own model and data: emloc run examples/llm.yaml "
        "model_name_or_path=MODEL dataset=TRAIN.jsonl evaluate.dataset=TEST.jsonl"
    )
    return out
