"""LoRA on a model whose weights wait elsewhere: other libraries' offloading beside `emloc train --stream`.

    python tools/bench_offloading.py [--blocks 8] [--hidden_size 512] [--samples 8] [--steps 3] [--device cpu]

Offloading was written for inference, and a backward pass needs each block's weights once more. So what is
measured first is whether a training step is right. On one random Llama-shaped checkpoint, with gradient
checkpointing and a LoRA of rank 4 on every linear layer, each way takes the same steps of SGD as the model in
memory, on the same samples of 128 tokens: `error` is the norm of the difference between the LoRAs over the
norm of the LoRA in memory, or what the library raised. Of ways whose error is below 1e-3, `step_ratio` is the
time of a step over that in memory, the quickest of all but the first.

accelerate's `cpu_offload` and `disk_offload` are applied before PEFT wraps the layers (after it, the LoRA is
offloaded too and gets no gradients), and so is diffusers' group offloading, by leaf and by block, from disk.
Where `--device` is the CPU, weights go from there to there: what is seen is what training through the hooks
gives, and not what a GPU's memory would be. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload
from diffusers.hooks.group_offloading import apply_group_offloading
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import emloc
from emloc_llm.example import write_model

LENGTH, RANK, RATE = 128, 4, 0.1
RIGHT = 1e-3
"""Relative error of a LoRA above which its training is not called right."""

Offload = Callable[..., object]
"""Takes a model, and by name the folder and the device that it may use."""


def on_cpu(model: Any, place: Path, device: torch.device) -> None:
    """The memory of the CPU, by accelerate."""
    cpu_offload(model, execution_device=device)


def on_disk(model: Any, place: Path, device: torch.device) -> None:
    """A folder, by accelerate."""
    disk_offload(model, str(place), execution_device=device)


def by_leaf(model: Any, place: Path, device: torch.device) -> None:
    """A folder, by diffusers, a leaf at a time."""
    _by_group(model, place, device, "leaf_level")


def by_block(model: Any, place: Path, device: torch.device) -> None:
    """A folder, by diffusers, a block at a time."""
    _by_group(model, place, device, "block_level", num_blocks_per_group=1)


def _by_group(model: Any, place: Path, device: torch.device, kind: str, **more: Any) -> None:
    apply_group_offloading(
        model, onload_device=device, offload_device=torch.device("cpu"), offload_type=kind,
        offload_to_disk_path=str(place), **more,
    )  # fmt: skip


OTHERS: Mapping[str, Offload] = {
    "accelerate, cpu_offload": on_cpu,
    "accelerate, disk_offload": on_disk,
    "diffusers, groups of leaves": by_leaf,
    "diffusers, groups of blocks": by_block,
}


def stock(
    base: Path,
    tokens: Tensor,
    steps: int,
    device: torch.device,
    offload: Callable[[Any], object] | None,
) -> tuple[dict[str, Tensor], float]:
    """The LoRA after some steps of PEFT's model, and seconds of a step."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_cache=False)
    if offload is None:
        model.to(device)
    else:
        offload(model)
    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    lora = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer, seconds = torch.optim.SGD(lora.values(), lr=RATE), list[float]()
    for _ in range(steps):
        started = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return {name: each.detach().cpu().clone() for name, each in lora.items()}, min(seconds[1:])


def ours(
    base: Path, data: Path, samples: int, steps: int, device: str, out: Path, stream: bool
) -> tuple[dict[str, Tensor], float]:
    """The same of `emloc train`."""
    emloc.train(
        model_name_or_path=base, dataset=data, output_dir=out, stream=stream, max_length=LENGTH,
        per_device_train_batch_size=samples, max_steps=steps, lora_r=RANK, optim="sgd", learning_rate=RATE,
        lr_scheduler_type="constant", warmup_ratio=0, gradient_checkpointing=not stream, logging_steps=1,
        device=device, dtype="float32",
    )  # fmt: skip
    measured = json.loads((out / "emloc.json").read_text())["measured"]
    return load_file(out / "adapter_model.safetensors"), float(measured["seconds_per_step"])


def error_of(lora: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The norm of the difference over that of what was expected."""
    off = sum(float((lora[name] - each).double().square().sum()) for name, each in expected.items())
    return (off / sum(float(each.double().square().sum()) for each in expected.values())) ** 0.5


def main() -> None:
    """Measure, print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    hidden, device = options.hidden_size, torch.device(options.device)
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base = write_model(
            root / "base", num_hidden_layers=options.blocks, hidden_size=hidden, head_dim=hidden // 8,
            intermediate_size=hidden * 11 // 4, num_attention_heads=8, num_key_value_heads=8,
        )  # fmt: skip
        torch.manual_seed(0)
        tokens = torch.randint(0, 200, (options.samples, LENGTH), device=device)
        expected, reference = stock(base, tokens, options.steps, device, None)
        for number, (way, offload) in enumerate(OTHERS.items()):
            place = root / f"offloaded-{number}"
            away = partial(offload, place=place, device=device)
            try:
                lora, seconds = stock(base, tokens, options.steps, device, away)
            except Exception as problem:  # whatever a library raises is the figure
                figures[way] = {
                    "raised": f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
                }
                continue
            figures[way] = {"error": error_of(lora, expected), "step_ratio": seconds / reference}
        data = root / "train.jsonl"
        row = {"prompt": "one two", "completion": "three four five " * LENGTH}
        data.write_text(f"{json.dumps(row)}\n" * (options.samples * options.steps))
        given = base, data, options.samples, options.steps, options.device
        expected, reference = ours(*given, root / "whole", stream=False)
        lora, seconds = ours(*given, root / "streamed", stream=True)
        figures["emloc, streamed"] = {
            "error": error_of(lora, expected), "step_ratio": seconds / reference,
        }  # fmt: skip
    table = Table("way", "error", "step_ratio")
    for way, row in figures.items():
        right = row.get("error", torch.inf) < RIGHT  # and so not NaN
        shown = row["raised"] if "raised" in row else f"{row['error']:.1e}"
        table.add_row(way, shown, f"{row['step_ratio']:.2f}" if right else "")
    Console(width=110).print(table)
    print(json.dumps(figures).replace("NaN", "null"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
