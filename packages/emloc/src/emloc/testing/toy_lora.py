"""LoRA in torch alone: A and B beside layers, trained with AdamW and saved as PEFT saves them."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_config import CONFIG_NAME
from emloc.artefacts.adapter_tensors import PREFIX, WEIGHTS_NAME
from emloc.artefacts.small_files import write_json
from emloc.config import TrainConfig
from emloc.errors import ConfigError
from emloc.extend.family import Batch
from emloc.testing.toy_data import on_device


class LoraLayer(nn.Module):
    """A frozen layer, dense or emulated, and `scaling · B · A` beside it in float32."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, scaling: float) -> None:
        super().__init__()
        self.layer, self.scaling = layer, scaling
        a: nn.Module
        b: nn.Module
        if isinstance(layer, nn.Conv2d):
            # Padding by name, which the types of torch leave out here, is allowed as well.
            sizes: Any = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            a = nn.Conv2d(layer.in_channels, rank, *sizes, bias=False)
            b = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            a = nn.Linear(layer.in_features, rank, bias=False)
            b = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(b.get_parameter("weight"))
        device = next(layer.parameters()).device
        self.a, self.b = a.to(device), b.to(device)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both, in the layer's dtype."""
        y = self.layer(x)
        return y + (self.scaling * self.b(self.a(x.float()))).to(y.dtype)


def scaling_of(config: TrainConfig) -> float:
    """The factor of `B · A`: `alpha / r`, or `alpha / √r` for rsLoRA."""
    return config.lora_alpha / (math.sqrt(config.lora_r) if config.use_rslora else config.lora_r)


def add_lora(model: nn.Module, names: Sequence[str], config: TrainConfig) -> dict[str, LoraLayer]:
    """Freeze a model and put a LoRA on layers of it.

    Args:
        names: the layers that may have one; `lora_target_modules` chooses among them.

    Raises:
        ConfigError: it chooses none.
    """
    model.requires_grad_(False)
    loras: dict[str, LoraLayer] = {}
    targets = config.lora_target_modules
    for name in names:
        if targets == ["all-linear"] or any(f".{name}".endswith(f".{end}") for end in targets):
            layer = model.get_submodule(name)
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            loras[name] = LoraLayer(layer, config.lora_r, scaling_of(config))
            model.set_submodule(name, loras[name])
    if not loras:
        raise ConfigError(
            f"lora_target_modules: {', '.join(targets)} names no layer that can have a LoRA; there are "
            f"{', '.join(names)}."
        )
    return loras


def fit_lora(
    model: nn.Module,
    loras: Mapping[str, LoraLayer],
    loss: Callable[[nn.Module, Batch], tuple[Tensor, int]],
    batches: Iterator[Batch],
    config: TrainConfig,
) -> float:
    """Train the LoRAs, one step per micro-batch; returns the seconds of a step."""
    trained = [p for lora in loras.values() for p in (*lora.a.parameters(), *lora.b.parameters())]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    started, steps = time.monotonic(), 0
    for batch in batches:
        total, terms = loss(model, on_device(batch, config.device))
        (total / terms).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return (time.monotonic() - started) / steps


def put_lora(model: nn.Module, adapter: Adapter) -> None:
    """Put a saved adapter's LoRAs on a model's layers."""
    for layer in adapter.layers:
        dense = model.get_submodule(layer.name)
        assert isinstance(dense, (nn.Linear, nn.Conv2d))
        lora = LoraLayer(dense, layer.rank, layer.scaling)
        for matrix, key in ((lora.a, layer.down_key), (lora.b, layer.up_key)):
            matrix.load_state_dict({"weight": adapter.read(key)})
        model.set_submodule(layer.name, lora)


def save_lora(loras: Mapping[str, LoraLayer], config: TrainConfig, folder: Path) -> None:
    """Write the adapter as PEFT would: its config, and A and B under PEFT's names."""
    tensors = {
        f"{PREFIX}{name}.lora_{part}.weight": matrix.get_parameter("weight").detach().cpu()
        for name, lora in loras.items()
        for part, matrix in (("A", lora.a), ("B", lora.b))
    }
    save_file(tensors, folder / WEIGHTS_NAME)
    write_json(
        folder / CONFIG_NAME,
        {
            "peft_type": "LORA",
            "r": config.lora_r,
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "target_modules": list(loras),
            "bias": "none",
        },
    )
