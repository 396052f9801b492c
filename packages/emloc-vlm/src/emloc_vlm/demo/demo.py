"""Compress, train, correct and evaluate a small InternVL on questions it was never asked."""

import time
from pathlib import Path
from typing import Any

import emloc
from emloc.config import DemoConfig
from emloc.demos.comparison import Comparison, size_of
from emloc.demos.easy_vqa import draw, easy_vqa, questions, write_table
from emloc.demos.report import plot, print_table, write_summary
from emloc_vlm.demo.base import trained_base
from emloc_vlm.demo.picture import draw_samples

MAX_STEPS = 150
NUM_SAMPLES = 300
NUM_CORRECTING = 64
BATCH = 16

LORA = {
    "lora_r": 8,
    "lora_alpha": 16,
    "learning_rate": 2e-3,
    "logging_steps": 10,
    "save_steps": 100,
}


def run_demo(config: DemoConfig) -> Path:
    """See `ModelFamily.demo`; stages that are complete in `output_dir` are not run again."""
    started = time.monotonic()
    out = config.output_dir
    out.mkdir(parents=True, exist_ok=True)
    base = config.model_name_or_path or str(trained_base())
    steps, count = config.max_steps or MAX_STEPS, config.num_samples or NUM_SAMPLES
    images = easy_vqa()
    train, test = (questions(images, split) for split in ("train", "test"))
    drawn = draw([q for q in train if q.names_a_color], steps * BATCH + NUM_CORRECTING, config.seed)
    fresh, unlearnt = drawn[:-NUM_CORRECTING], drawn[-NUM_CORRECTING:]
    unseen = draw([q for q in test if q.names_a_color], count, config.seed)
    own = draw([q for q in test if q.about_shape], count, config.seed)
    ways = Comparison(
        base=base,
        out=out,
        train_data=str(write_table(out / "train.jsonl", fresh, images)),
        test_data=str(write_table(out / "test.jsonl", unseen, images)),
        data={"seed": config.seed, "image_folder": str(images), "device": config.device},
        compress={**size_of(config), "num_calibration_samples": 64},
        train={**LORA, "max_steps": steps, "per_device_train_batch_size": BATCH},
        correct={
            "dataset": write_table(out / "correct.jsonl", unlearnt, images),
            "num_calibration_samples": NUM_CORRECTING,
        },
        evaluate={"max_new_tokens": 4, "per_device_eval_batch_size": 50},
    )
    ways.make()
    scores = ways.score()
    known = emloc.evaluate(
        model_name_or_path=base,
        dataset=str(write_table(out / "own.jsonl", own, images)),
        output_dir=out / "evaluation" / "base_own",
        image_folder=images,
        device=config.device,
        **ways.evaluate,
    )
    rows = ways.rows(scores)
    write_summary(rows, out / "summary.json", family="vlm", model=base,
                  base_own_accuracy=known["exact_match"], correction=ways.correction(),
                  seconds=round(time.monotonic() - started, 1), samples=count, steps=steps)  # fmt: skip
    plot(rows, out / "summary.png")
    answers: dict[str, Any] = {name: score["answers"] for name, score in scores.items()}
    draw_samples([q.image for q in unseen], answers, out / "samples.png")
    print_table(rows, "What colour is it? On pictures not trained on, run on the original model")
    print(f"The base model answers {known['exact_match']:.1%} of the questions it was trained for.")
    print(f"Everything is in {out}: emulator, adapters, answers, summary.json, samples.png.")
    print(
        "Next, your own model and data: emloc run examples/vlm.yaml "
        "model_name_or_path=MODEL dataset=TRAIN.jsonl evaluate.dataset=TEST.jsonl"
    )
    return out
