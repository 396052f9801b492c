"""An experiment: repair an emulator by distillation before a LoRA is trained on it, with or without a leash.

    python tools/probe_heal.py --emulator EMULATOR --dataset train.jsonl --out HEALED
        [--column_map question=prompt,answer=completion] [--steps 64] [--samples 4] [--learning_rate 1e-3]
        [--leash 1.0] [--max_length 256] [--seed 0]

Of a language model's emulator the factors of all layers are trained: those of low rank (`format=low_rank
share_factors=false`), or of a residual in the model's own dtype (`residual_rank=… factor_bits=16`). The loss
is the divergence from the base's predictions on every token, and `--leash` times the mean over layers of the
squared error of their outputs on what they read, relative to what it was before the first step. What comes
out is an emulator of the same bytes: train on it, correct and evaluate with the stages as they are, and the
same without this step beside it.

Base and emulator are both held in memory, which is for models as small as the demo's. The last line is JSON:
divergence of held-back samples before and after, the mean of the layers' errors over those before, seconds.
"""

import argparse
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import of_family, with_plugin_options
from emloc.options.build import build
from emloc.stages.frame import digests

HELD_BACK = 16


class Repair:
    """The factors of one layer while they are trained, and what they add to what it gives.

    Args:
        layer: of the emulator.
        weight: of the base, d_out × d_in.
    """

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        self.kept = [layer.get_parameter(name).detach() for name in ("left", "right")]
        self.trained = [nn.Parameter(factor.clone().float()) for factor in self.kept]
        self._weight, self.error, self.measured = weight, torch.tensor(0.0), True
        layer.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        def added(x: Tensor) -> Tensor:
            (left, right), (old_left, old_right) = self.trained, self.kept
            return x @ right.to(x).T @ left.to(x).T - x @ old_right.T @ old_left.T

        x = inputs[0].detach()
        if self.measured:
            with torch.no_grad():
                bias = getattr(layer, "bias", None)
                off = nn.functional.linear(x, self._weight) - (
                    output if bias is None else output - bias
                )
                before = off.float().square().sum().clamp(min=1e-30)
            self.error = (off - added(x)).float().square().sum() / before
        return output + added(inputs[0])


def divergence(model: Any, base: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over tokens of the divergence from the base's predictions."""
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        expected = base(**given, use_cache=False).logits.float().log_softmax(-1)
    predicted = model(**given, use_cache=False).logits.float().log_softmax(-1)
    each = (expected.exp() * (expected - predicted)).sum(-1)
    mask = batch["attention_mask"].bool()
    return each[mask].mean()


def batches_of(options: argparse.Namespace, base: Checkpoint, family: Any, count: int) -> Any:
    """Micro-batches of tokens, by the family's own reading of the data."""
    given: dict[str, Any] = {
        "model_name_or_path": base.name, "dataset": options.dataset, "output_dir": "unused",
        "num_calibration_samples": count, "calibration_batch_size": options.samples,
        "max_length": options.max_length, "seed": options.seed,
    }  # fmt: skip
    if options.column_map:
        given["column_map"] = options.column_map
    config = of_family(build(with_plugin_options(CompressConfig), given, "heal"), family)
    return family.calibration_batches(base, config)


def write(options: argparse.Namespace, repairs: dict[str, Repair]) -> None:
    """The emulator with other factors, and a manifest that says so."""
    shutil.copytree(options.emulator, options.out)
    trained = {
        f"{name}.{part}": factor.detach()
        for name, repair in repairs.items()
        for part, factor in zip(("left", "right"), repair.trained)
    }
    manifest = Manifest.read(options.out)
    changed = [name for name in manifest.files if name.endswith(".safetensors")]
    for name in changed:
        with safe_open(options.out / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iteration over files)
            metadata = file.metadata()
        for key in tensors.keys() & trained.keys():
            tensors[key] = trained.pop(key).to(tensors[key].dtype).contiguous()
        save_file(tensors, options.out / name, metadata)
    assert not trained, f"not stored: {sorted(trained)[:3]}"
    healed = {
        key: getattr(options, key) for key in ("steps", "samples", "learning_rate", "leash", "seed")
    }
    manifest.model_copy(
        update={
            "files": {**manifest.files, **digests(options.out, changed)},
            "sizes": {name: (options.out / name).stat().st_size for name in manifest.files},
            "settings": {**manifest.settings, "healed": healed},
            "summary": {
                **manifest.summary, "emulator_digest": Checkpoint.open(str(options.out)).digest()
            },
        }
    ).write(options.out)  # fmt: skip


def main() -> None:
    """Heal, write, and print the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emulator", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--column_map")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4, help="of a step")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--leash", type=float, default=0.0)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    manifest = Manifest.read(options.emulator)
    checkpoint, family = open_model(manifest.base_model.name_or_path, None, None)
    base = family.load(checkpoint, "auto", "cpu").eval().requires_grad_(False)
    emulator = family.load(Checkpoint.open(str(options.emulator)), "auto", "cpu").eval()
    emulator.requires_grad_(False)
    repairs: dict[str, Repair] = {}
    for name, layer in emulator.named_modules():
        if {"left", "right"} <= dict(layer.named_parameters(recurse=False)).keys():
            repairs[name] = Repair(layer, base.get_submodule(name).get_parameter("weight"))
    if not repairs:
        parser.error(
            f"{options.emulator} has no layer with factors of its own in the model's dtype"
        )
    count = HELD_BACK + options.steps * options.samples
    batches = list(batches_of(options, checkpoint, family, count))
    held_back = batches[: HELD_BACK // options.samples]
    rest = itertools.cycle(batches[len(held_back) :])  # samples come again where there are too few

    @torch.no_grad()
    def measured() -> tuple[float, float]:
        """The divergence of what was held back, and the mean of the layers' relative errors."""
        values, errors = list[float](), list[float]()
        for repair in repairs.values():
            repair.measured = True
        for batch in held_back:
            values.append(float(divergence(emulator, base, batch)))
            errors.append(sum(float(repair.error) for repair in repairs.values()) / len(repairs))
        return sum(values) / len(values), sum(errors) / len(errors)

    before, _ = measured()
    factors = [factor for repair in repairs.values() for factor in repair.trained]
    optimizer = torch.optim.AdamW(factors, lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps):
        for repair in repairs.values():
            repair.measured = bool(options.leash)
        value = divergence(emulator, base, next(rest))
        drift = torch.stack([repair.error for repair in repairs.values()]).mean()
        (value + options.leash * drift).backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(
            f"step {step + 1}: divergence {float(value):.4f}, errors {float(drift):.4f}", flush=True
        )
    after, drift = measured()
    write(options, repairs)
    figures = {
        "divergence": [before, after], "errors": drift, "layers": len(repairs),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
