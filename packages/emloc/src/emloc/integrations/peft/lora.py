"""Put a LoRA on a model or an emulator, with any of PEFT's beginnings.

PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) begin with a part `s·B₀·A₀` of the weight, which
they take off it. That part is `P·W` for a projection P onto columns, and an emulator's layer that can
take it off (`LosesPart`) does: of a product of factors, only the layer's own left one changes,
`left − s·B₀·B₀⁺·left`. What such a LoRA has learnt, in terms of the untouched emulator, is
`s·(B·A − B₀·A₀)`, a plain LoRA of twice the rank; it is saved as that, so that correction compares the
base with the emulator and not with the residual.
"""

import json
import math
import os
from collections.abc import Container, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emloc.artefacts.adapter_config import exact_patterns
from emloc.artefacts.json_files import read_json
from emloc.config import TrainConfig
from emloc.errors import ConfigError
from emloc.extend.family import Batch, ModelFamily
from emloc.integrations.peft.eva import begin_with_eva, refuse_other_layers
from emloc.integrations.peft.targets import chosen_targets
from emloc.layers.emulated_layer import EmulatedLayer, LosesPart
from emloc.options.patterns import match_pattern

Start = dict[str, tuple[Tensor, Tensor]]
"""A₀ and B₀ by layer."""

EVA_BATCHES = 8


def new_lora(
    model: Any,
    config: TrainConfig,
    batches: Iterable[Batch],
    excluded: Container[str] = (),
    task_type: str | None = None,
    family: ModelFamily | None = None,
) -> tuple[Any, Start]:
    """The model with a LoRA, and what it began with where that was taken off the weights.

    Args:
        batches: training batches; only EVA looks at them, at the first `EVA_BATCHES`.
        excluded: modules that are not adapted, whatever targets say.
        task_type: PEFT's name of what the model is for, if it has one.
        family: whose loss runs the model, and whose mask says which rows are real; only EVA asks it.

    Raises:
        ConfigError: a target does not exist, options exclude one another, or EVA has nothing to look at.
    """
    lora = lora_config(config, model, excluded, task_type)
    wrapped, start = _begun(model, lora, config, batches, task_type, family)
    _settle_patterns(wrapped, lora)
    return wrapped, start


def _begun(
    model: Any,
    lora: LoraConfig,
    config: TrainConfig,
    batches: Iterable[Batch],
    task_type: str | None,
    family: ModelFamily | None,
) -> tuple[Any, Start]:
    if config.lora_init == "eva":
        first = [
            {name: tensor.to(config.device) for name, tensor in batch.items()}
            for batch in islice(batches, EVA_BATCHES)
        ]
        if family is None or not first:
            raise ConfigError(
                "train: lora_init=eva looks at samples before the first step, but here there are none; pass "
                "another lora_init."
            )
        refuse_other_layers(model, lora)
        blocks = list(family.blocks(model))
        model = _wrapped(model, lora)
        begin_with_eva(model, family, blocks, first, task_type)
        return model, {}
    model = _wrapped(model, lora)
    if config.lora_init not in ("pissa", "olora"):
        return model, {}
    if config.use_dora:
        raise ConfigError(f"train: lora_init={config.lora_init} and use_dora exclude each other.")
    return model, {
        name.removeprefix("base_model.model."): _take_off(module, config.lora_init)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _wrapped(model: Any, lora: LoraConfig) -> Any:
    """`get_peft_model`, with a path that means the same from every folder as the base's name."""
    wrapped: Any = get_peft_model(model, lora)
    if lora.base_model_name_or_path and os.path.exists(lora.base_model_name_or_path):
        lora.base_model_name_or_path = str(Path(lora.base_model_name_or_path).absolute())
    return wrapped


def _settle_patterns(wrapped: nn.Module, lora: LoraConfig) -> None:
    """Name layers one by one where the order of patterns decides: PEFT saves them in alphabetical order."""
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    }

    def depends(patterns: Mapping[str, float]) -> bool:
        saved = dict(sorted(patterns.items()))
        return any(match_pattern(patterns, n) != match_pattern(saved, n) for n in layers)

    if depends(lora.rank_pattern) or depends(lora.alpha_pattern):
        lora.rank_pattern, lora.alpha_pattern = cast(
            Any,
            exact_patterns(
                lora.to_dict(),
                [
                    (name, layer.r["default"], layer.scaling["default"])
                    for name, layer in layers.items()
                ],
            ),
        )


def lora_config(
    config: TrainConfig, model: Any, excluded: Container[str], task_type: str | None = None
) -> LoraConfig:
    """PEFT's own options; see `new_lora`."""
    _refuse_compressed(config, model)
    start: Any = {"default": True, "gaussian": "gaussian", "eva": "eva"}.get(config.lora_init, True)
    return LoraConfig(
        task_type=task_type,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType] (PEFT takes both)
        lora_dropout=config.lora_dropout,
        target_modules=list(chosen_targets(config, model, excluded)),
        modules_to_save=list(config.lora_modules_to_save) or None,
        rank_pattern=dict(config.lora_rank_pattern),
        alpha_pattern=dict(config.lora_alpha_pattern),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=start,
        eva_config=EvaConfig() if config.lora_init == "eva" else None,
    )


def _refuse_compressed(config: TrainConfig, model: Any) -> None:
    """Refuse to train whole what an emulator has in another form: what is learnt would not fit the base."""
    ends = tuple(config.lora_modules_to_save)
    for name, module in model.named_modules():
        held = ends and name.endswith(ends)
        if held and any(isinstance(inner, EmulatedLayer) for inner in module.modules()):
            raise ConfigError(
                f"lora_modules_to_save: {name} is compressed in the emulator, so what it learns would not "
                f"fit the base; leave it out, or compress without it (exclude, embedding_bits)."
            )
        if held and not all(each.is_floating_point() for each in module.parameters()):
            raise ConfigError(
                f"lora_modules_to_save: {name} is in few bits, so it cannot be trained whole; leave it out, "
                f"or load the model with it unquantised (llm_int8_skip_modules)."
            )


@torch.no_grad()
def _take_off(layer: Any, kind: str) -> tuple[Tensor, Tensor]:
    """Begin with a part of the weight, take it off, and return it as A₀, B₀ (float32)."""
    base, name = layer.get_base_layer(), "default"
    rank, scaling = layer.r[name], layer.scaling[name]
    takes_off = base if isinstance(base, nn.Linear) and isinstance(base, LosesPart) else None
    if takes_off is None and type(base) is not nn.Linear:
        raise ConfigError(f"lora_init={kind} works on linear layers, not on {type(base).__name__}.")
    weight = base.weight.data.float()
    if rank > min(weight.shape):
        raise ConfigError(
            f"lora_init={kind} starts from part of a weight, but one of "
            f"{' x '.join(map(str, weight.shape))} has no part of rank {rank}; pass "
            f"lora_r={min(weight.shape)}, or less."
        )
    if kind == "pissa":
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:rank] / scaling).sqrt()
        up, down = u[:, :rank] * root, root[:, None] * vt[:rank]
        columns = u[:, :rank]
    else:
        columns = torch.linalg.qr(weight[:, :rank])[0]
        up, down = columns, columns.T @ weight
    share = 1.0 if kind == "pissa" else scaling
    if takes_off is not None:
        takes_off.take_off(columns, share)
    else:
        base.weight.data -= (share * columns @ (columns.T @ weight)).to(base.weight.dtype)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    a.data.copy_(down)
    b.data.copy_(up)
    return a.detach().float().cpu().clone(), b.detach().float().cpu().clone()


def save_as_plain_lora(folder: Path, start: Start) -> None:
    """Rewrite a saved adapter of residuals as one of the weights: `[A; A₀]`, `[B, −B₀]`."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, (down, up) in start.items():
        stem = f"base_model.model.{name}.lora_"
        a, b = tensors[f"{stem}A.weight"], tensors[f"{stem}B.weight"]
        tensors[f"{stem}A.weight"] = torch.cat([a, down.to(a.dtype)])
        tensors[f"{stem}B.weight"] = torch.cat([b, -up.to(b.dtype)], dim=1)
    config = read_json(folder / "adapter_config.json")
    # alpha grows with the rank (with its root for rsLoRA), so that the scaling stays.
    growth = math.sqrt(2) if config["use_rslora"] else 2
    config["r"] *= 2
    config["lora_alpha"] *= growth
    config["rank_pattern"] = {k: 2 * v for k, v in (config["rank_pattern"] or {}).items()}
    config["alpha_pattern"] = {k: growth * v for k, v in (config["alpha_pattern"] or {}).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), "utf-8")
