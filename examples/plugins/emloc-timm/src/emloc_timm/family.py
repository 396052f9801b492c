"""The family `timm`: Vision Transformers that say which class a picture is of."""

import math
import time
from pathlib import Path

import timm
import torch
from peft import LoraConfig, get_peft_model
from timm.models import VisionTransformer
from torch import nn

from emloc import plugin
from emloc_timm.data import Pictures, rows
from emloc_timm.example import write_example

OBEYED = {
    "output_dir", "emulator", "model_name_or_path", "dataset", "dtype", "seed", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "learning_rate", "weight_decay",
    "warmup_ratio", "max_grad_norm", "lora_r", "lora_alpha", "lora_dropout", "use_rslora",
    "lora_target_modules", "lora_modules_to_save",
}  # fmt: skip


class TimmFamily:
    """`ModelFamily` of timm's Vision Transformers, and `NamesDataFiles`; see there."""

    name = "timm"
    write_example = staticmethod(write_example)

    def skeleton(self, checkpoint, dtype):
        config = checkpoint.config
        try:
            sizes = {"num_classes": config["num_classes"], **config.get("model_args", {})}
            about = {"pretrained": False, "pretrained_cfg": config["pretrained_cfg"]}
            with torch.device("meta"):
                model = timm.create_model(config["architecture"], **about, **sizes)
        except Exception as problem:  # sizes that do not fit fail anywhere in timm
            why = str(problem).partition("\n")[0]
            raise plugin.CheckpointError(f"timm cannot build {checkpoint.name}: {why}") from problem
        if not isinstance(model, VisionTransformer) or any(True for _ in model.buffers()):
            raise plugin.CheckpointError(f"{checkpoint.name} is no plain ViT of timm; pass one.")
        return model.to(dtype).eval()

    def stored(self, model, parameter, checkpoint):
        return plugin.StoredParameter((parameter,)) if parameter in checkpoint.tensors else None

    def blocks(self, model):
        return [f"blocks.{name}" for name, _ in model.get_submodule("blocks").named_children()]

    def layer_groups(self, model):  # query, key and value are one layer: no two read the same
        parts = model.get_submodule("blocks").named_modules(prefix="blocks")
        return [[name] for name, part in parts if isinstance(part, nn.Linear)]

    def calibration_batches(self, checkpoint, options):
        data = Pictures(checkpoint, options)
        drawn = _order(len(data.rows), options.seed)[: options.num_calibration_samples]
        return [data.batch(part) for part in drawn.split(options.calibration_batch_size)]

    def data_files(self, options, dataset, split):
        return [path for path, _ in rows(Path(dataset))]

    def loss(self, model, batch):
        scores = model(batch["pixels"].to(next(model.parameters()).dtype))
        high = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return nn.functional.cross_entropy(high, batch["labels"], reduction="sum"), len(scores)

    def load(self, checkpoint, dtype, device):
        stored = checkpoint.read("head.weight").dtype  # a layer that no emulator compresses
        model = self.skeleton(checkpoint, stored if dtype == "auto" else getattr(torch, dtype))
        groups = checkpoint.config.get("quantization_config", {}).get("groups", [])
        plugin.replace_layers(model, groups, _dense_layer, "linear layer")
        wanted, held = model.state_dict(), {}
        for name in checkpoint.tensors:
            dtype = wanted[name].dtype if name in wanted else None
            held[name] = checkpoint.read(name).to(device, dtype, copy=True)
        try:
            model.load_state_dict(held, assign=True)
        except RuntimeError as problem:
            why = f"{checkpoint.name}: its weights are not those of its config; save it again."
            raise plugin.CheckpointError(why) from problem
        return model

    def emulator_config(self, checkpoint, layers):
        return {
            **checkpoint.config,
            "quantization_config": plugin.quantization_config(layers.groups),
        }

    def train(self, config, work):
        for name in config.model_fields_set - OBEYED:
            field = type(config).model_fields[name]
            marked = any(isinstance(mark, plugin.WithoutEffect) for mark in field.metadata)
            if not marked and getattr(config, name) != field.default:
                raise plugin.ConfigError(f"train: the family timm does not read {name}.")
        with plugin.PeakMemory(config.device, mapped=True, limit=config.memory) as peak:
            folder = plugin.locate(config.emulator or config.model_name_or_path)
            checkpoint = plugin.Checkpoint.open(folder)
            model = self.load(checkpoint, config.dtype, config.device).requires_grad_(False)
            targets = config.lora_target_modules
            if targets == ["all-linear"]:
                targets = [name for group in self.layer_groups(model) for name in group]
            torch.manual_seed(config.seed)
            lora = LoraConfig(
                r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                target_modules=targets, modules_to_save=config.lora_modules_to_save or None,
                use_rslora=config.use_rslora,
            )  # fmt: skip
            model = get_peft_model(model, lora).train()
            seconds = self._fit(model, Pictures(checkpoint, config), config)
            model.save_pretrained(work)
            held = sum(tensor.nbytes for tensor in model.state_dict().values())
        summary = {"train_weight_bytes": held}
        return {"seconds_per_step": seconds, "summary": summary, **peak.figures()}

    def _fit(self, model, data, config):
        """AdamW with a warm-up and a cosine; returns the seconds of a step."""
        size, count = config.per_device_train_batch_size, len(data.rows)
        epochs = math.ceil(config.num_train_epochs * count / size)
        steps = config.max_steps if config.max_steps > 0 else epochs
        order = torch.cat(
            [_order(count, config.seed + n) for n in range(steps * size // count + 1)]
        )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=config.weight_decay)
        started, warm = time.monotonic(), math.ceil(config.warmup_ratio * steps)
        for step in range(steps):
            wave = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))
            share = (step + 1) / warm if step < warm else wave
            optimizer.param_groups[0]["lr"] = config.learning_rate * share
            batch = data.batch(order[step * size : (step + 1) * size])
            here = {name: tensor.to(config.device) for name, tensor in batch.items()}
            total, terms = self.loss(model, here)
            (total / terms).backward()
            nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return (time.monotonic() - started) / steps


def _order(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _dense_layer(name, module):
    if isinstance(module, nn.Linear):
        sizes = module.in_features, module.out_features, module.bias is not None
        return plugin.DenseLayer(name, *sizes, module.weight.dtype, module.weight.device)
