"""Compress, train, correct and evaluate a real model on the orders task, and say what came out.

Every stage that makes something runs in a process of its own, through the command line that a user
would type: so peak memory is the stage's alone, and the folder shows what the commands write.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import emloc
from emloc.config import DemoConfig
from emloc.errors import EmlocError
from emloc.manifest import Manifest
from emloc.progress import console
from emloc_llm.demo.model import smollm2
from emloc_llm.demo.orders import write_orders
from emloc_llm.demo.report import Row, plot, print_table, write_summary

KEEP_RATIO = 0.6
MAX_STEPS = 32
NUM_SAMPLES = 40
BATCH = 4

CALIBRATION = {"num_calibration_samples": 32}
LORA = {"lora_r": 8, "lora_alpha": 16, "learning_rate": 1e-3, "logging_steps": 2, "save_steps": 10}


def run_demo(config: DemoConfig) -> Path:
    """See `ModelFamily.demo`; stages that are complete in `output_dir` are not run again."""
    started = time.monotonic()
    out = config.output_dir
    out.mkdir(parents=True, exist_ok=True)
    base = config.model_name_or_path or str(smollm2())
    steps = config.max_steps or MAX_STEPS
    count = config.num_samples or NUM_SAMPLES
    train_data = str(write_orders(out / "train.jsonl", steps * BATCH, config.seed, test=False))
    test_data = str(write_orders(out / "test.jsonl", count, config.seed, test=True))
    data = {"dataset": train_data, "seed": config.seed}
    trained = {**data, **LORA, "max_steps": steps, "per_device_train_batch_size": BATCH}

    emulator, lora = out / "emulator", out / "lora_on_base"
    adapter, corrected = out / "adapter", out / "corrected"
    _stage("compress", emulator, model_name_or_path=base, **data, **CALIBRATION,
           keep_ratio=config.keep_ratio or KEEP_RATIO)  # fmt: skip
    _stage("train", adapter, emulator=emulator, **trained)
    _stage("correct", corrected, adapter=adapter, emulator=emulator, **data,
           num_calibration_samples=16)  # fmt: skip
    _stage("train", lora, model_name_or_path=base, **trained)

    scores: dict[str, dict[str, Any]] = {}
    for name, folder in {
        "base": None,
        "lora": lora,
        "uncorrected": adapter,
        "emloc": corrected,
    }.items():
        scores[name] = _evaluate(name, base, folder, test_data, out)
    rows = _rows(scores, emulator, adapter, corrected, lora)
    limit = Manifest.read(corrected).summary
    write_summary(rows, out / "summary.json", family="llm", model=base, correction=limit,
                  seconds=round(time.monotonic() - started, 1), samples=count, steps=steps)  # fmt: skip
    plot(rows, out / "summary.png")
    print_table(rows)
    print(f"Everything is in {out}: emulator, adapters, answers, summary.json, summary.png.")
    print(
        "Next, your own model and data: emloc run examples/llm.yaml "
        "model_name_or_path=MODEL dataset=TRAIN.jsonl evaluate.dataset=TEST.jsonl"
    )
    return out


def _stage(name: str, output_dir: Path, **options: Any) -> None:
    """Run one command; its progress is shown, its refusal is ours."""
    command = [sys.executable, "-m", "emloc", name, "--output_dir", str(output_dir)]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    console.rule(f"[bold]{name}[/] → {output_dir.name}", align="left")
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        failure = EmlocError(f"The demo stopped in emloc {name}; the reason stands above.")
        failure.exit_code = code
        raise failure


def _evaluate(name: str, base: str, adapter: Path | None, data: str, out: Path) -> dict[str, Any]:
    console.rule(f"[bold]evaluate[/] {name}", align="left")
    scores: dict[str, Any] = emloc.evaluate(
        model_name_or_path=base,
        adapter=None if adapter is None else str(adapter),
        dataset=data,
        output_dir=out / "evaluation" / name,
        max_new_tokens=64,
        per_device_eval_batch_size=40,
    )
    return scores


def _rows(
    scores: dict[str, dict[str, Any]], emulator: Path, adapter: Path, corrected: Path, lora: Path
) -> list[Row]:
    on_base, on_emulator = Manifest.read(lora), Manifest.read(adapter)
    peaks = {
        "base": scores["base"]["peak_bytes"],
        "lora": on_base.measured["peak_bytes"],
        "uncorrected": max(Manifest.read(f).measured["peak_bytes"] for f in (emulator, adapter)),
        "emloc": max(
            Manifest.read(folder).measured["peak_bytes"]
            for folder in (emulator, adapter, corrected)
        ),
    }
    trained = {"base": None, "lora": on_base, "uncorrected": on_emulator, "emloc": on_emulator}
    return [
        Row(
            name=name,
            exact_match=scores[name]["exact_match"],
            loss=scores[name]["loss"],
            train_weight_bytes=manifest.summary["train_weight_bytes"] if manifest else 0,
            peak_bytes=peaks[name],
            seconds_per_step=manifest.measured["seconds_per_step"] if manifest else None,
        )
        for name, manifest in trained.items()
    ]
