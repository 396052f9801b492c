"""The worth of each end of a QLoRA: the original as it is, the original corrected, the dequantised weights.

    python tools/bench_qlora_ends.py --model_name_or_path MODEL --dataset train.jsonl --test test.jsonl
        --out FOLDER [--column_map question=prompt,answer=completion] [--steps 16] [--test_samples 32]
        [--fragile 1.0]

A LoRA is trained on the base in NF4 (`emloc_baselines.qlora`: stock transformers, bitsandbytes and PEFT), and
`emloc correct` takes it to each end; losses are those of `emloc evaluate` on the test questions. `gain` is a
share of what the LoRA takes off the loss on the weights that it was trained beside, which are the last row.

The second table is of the same function made fragile, in float32: scales exp(s · normal), seed 0, one for
each channel, go from a norm into the columns of the layers that read it, from v_proj to o_proj, and from
up_proj to down_proj. Logits stay; blocks of 64 weights hold larger ones beside smaller ones, and rounding
takes more. For models of Llama's make. `rounding` is ‖W − dequant(W)‖ / ‖W‖ over all layers, and `LoRA` is
‖s·B·A‖ / ‖W‖.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import emloc
from emloc.adapters.rounding import RoundedBase, Rounding
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.manifest import Manifest
from emloc.correction.ways import best_way, candidates
from emloc.extend.methods import Task
from emloc.extend.opening import open_model
from emloc.options.types import DEQUANTISED
from emloc_baselines.qlora import Qlora

ON_ORIGINAL: list[Any] = [1.0, "none"]
SHARES = [0.5, 1.0]
"""The limits, and the strengths of the fit to the data, that are compared."""

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def make_fragile(source: Path, target: Path, strength: float) -> Path:
    """Write the same function with scales moved between layers; returns its folder."""
    if (target / "model.safetensors").is_file():
        return target
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    heads = config["num_attention_heads"] // config["num_key_value_heads"]
    tensors = {
        name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()
    }
    draw = torch.Generator().manual_seed(0)

    def scales(count: int) -> Tensor:
        return (strength * torch.randn(count, generator=draw, dtype=torch.float64)).exp().float()

    for number in range(config["num_hidden_layers"]):
        block = f"model.layers.{number}."

        def weight(layer: str, block: str = block) -> Tensor:
            return tensors[f"{block}{layer}.weight"]

        for norm, readers in READERS.items():
            scale = scales(len(weight(norm)))
            weight(norm).div_(scale)
            for layer in readers:
                weight(layer).mul_(scale)
        value = weight("self_attn.v_proj")
        scale = scales(len(value))
        value.div_(scale[:, None])
        of_heads = scale.view(config["num_key_value_heads"], -1).repeat_interleave(heads, 0)
        weight("self_attn.o_proj").mul_(of_heads.reshape(-1))
        scale = scales(len(weight("mlp.up_proj")))
        weight("mlp.up_proj").div_(scale[:, None])
        weight("mlp.down_proj").mul_(scale)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=1))
    return target


def sizes(base: Path, adapter: Path) -> tuple[float, float]:
    """`‖W − dequant(W)‖ / ‖W‖` and `‖s·B·A‖ / ‖W‖`, over the layers of the LoRA."""
    checkpoint, family = open_model(base)
    model = family.skeleton(checkpoint, torch.float32)
    frozen = RoundedBase.of(Rounding(), family, model, checkpoint)
    lora = Adapter.open(str(adapter))
    whole = rounding = learnt = 0.0
    for layer in lora.layers:
        weight = frozen.places[layer.name].layer_weight(checkpoint.read).double()
        product = lora.matrix(layer.up_key).double() @ lora.matrix(layer.down_key).double()
        whole += float(weight.square().sum())
        rounding += float((weight - frozen.weight(layer.name).double()).square().sum())
        learnt += float((layer.scaling * product).square().sum())
    return (rounding / whole) ** 0.5, (learnt / whole) ** 0.5


def ends_of(base: Path, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Train, take the adapter to each end and score it there."""
    data = {
        "dataset": options.dataset, "column_map": options.column_map,
        "max_length": options.max_length,
    }  # fmt: skip
    train = {
        **data, "max_steps": options.steps, "per_device_train_batch_size": options.batch,
        "lora_r": 8, "lora_alpha": 16, "learning_rate": options.learning_rate,
        "logging_steps": max(1, options.steps // 4),
    }  # fmt: skip
    task = Task(str(base), 0.5, 0, data, train, data)
    method = Qlora()
    light = method.build(task, folder / "light")
    adapter = method.train(task, light, folder / "adapter")
    given = {
        **data, "adapter": str(adapter), "num_calibration_samples": options.samples,
        "model_name_or_path": str(base),
    }  # fmt: skip
    auto = emloc.correct(
        output_dir=folder / "auto", limit_candidates=[*ON_ORIGINAL, DEQUANTISED],
        strength_candidates=SHARES, **given,
    )  # fmt: skip
    summary = Manifest.read(auto).summary
    # The way that would have been chosen if the original were the only end.
    tried = {"limit_candidates": ON_ORIGINAL, "strength_candidates": SHARES}
    ways = candidates(
        emloc.correct.checked({**given, **tried, "output_dir": folder / "x"}, "bench")
    )
    halves = [summary["halves"][way.shown] for way in ways]
    way = best_way(ways, *([one[key] for one in halves] for key in ("chosen_on", "checked_on")))
    fixed: dict[str, Any] = (
        {"strength": way.share}
        if way.by_data
        else {"limit": "none" if way.limit is None else way.limit}
    )
    on_original = {
        "as it is": emloc.correct(output_dir=folder / "as_it_is", limit=0, **given),
        f"corrected ({way.shown})": emloc.correct(
            output_dir=folder / "corrected", **fixed, **given
        ),
    }
    on_dequantised = emloc.correct(output_dir=folder / "dequantised", limit="dequantised", **given)
    score = {
        **data, "dataset": options.test, "model_name_or_path": str(base),
        "num_samples": options.test_samples, "max_new_tokens": 0, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    untouched = emloc.evaluate(output_dir=folder / "of_base", **score)["loss"]
    rows = [{"end": "base, no LoRA", "loss": untouched, "calibration": None}]
    ends = {**{f"original, {name}": made for name, made in on_original.items()},
            "dequantised weights": on_dequantised}  # fmt: skip
    keys = ("0", way.shown, "dequantised")
    for key, (name, made) in zip(keys, ends.items()):
        place = folder / f"of_{made.name}"
        loss = emloc.evaluate(output_dir=place, adapter=str(made), **score)["loss"]
        rows.append({"end": name, "loss": loss, "calibration": summary["calibration_loss"][key]})
    key_of = dict(zip(ends, keys))
    gained = untouched - rows[-1]["loss"]
    for row in rows:
        # Where rounding has taken more than the LoRA brought, there is no gain to have a share of.
        row["gain"] = (untouched - row["loss"]) / gained if gained > 0 else None
        row["chosen"] = summary["limit"] == key_of.get(str(row["end"]))
    rounding, learnt = sizes(base, adapter)
    return [*rows, {"rounding": rounding, "lora": learnt, "all": summary["calibration_loss"]}]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    *rows, facts = rows
    said = f"rounding {facts['rounding']:.3f}, LoRA {facts['lora']:.4f}"
    table = Table("end", "test loss", "gain", "calibration loss", "auto", title=f"{title}: {said}")
    for row in rows:
        calibration = "" if row["calibration"] is None else f"{row['calibration']:.4f}"
        table.add_row(
            row["end"], f"{row['loss']:.4f}", "" if row["gain"] is None else f"{row['gain']:.1%}",
            calibration,
            "chosen" if row["chosen"] else "",
        )  # fmt: skip
    Console(width=110).print(table)
    print("  ".join(f"{name} {loss:.4f}" for name, loss in facts["all"].items()))


def main() -> None:
    """Read the options and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("model_name_or_path", "dataset", "test", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--column_map", default="question=prompt,answer=completion")
    parser.add_argument("--fragile", type=float, default=1.0)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    for name, default in (("steps", 16), ("batch", 4), ("samples", 16), ("test_samples", 32),
                          ("max_length", 256)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    out = Path(options.out)
    base = Path(options.model_name_or_path)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in ("given", "fragile"):
        if name == "fragile":
            base = make_fragile(base, out / "fragile_base", options.fragile)
        results[name] = ends_of(base, options, out / name)
        show(f"{base.name}, {name}", results[name])
        (out / "ends.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
