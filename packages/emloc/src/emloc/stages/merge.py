"""Write base + adapter as a full checkpoint, tensor by tensor, in the base's own shards and dtypes."""

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from emloc.adapted_weights import base_weights, part_weights
from emloc.adapter import Adapter, LoraLayer
from emloc.checkpoint import Checkpoint
from emloc.config import MergeConfig
from emloc.errors import ConfigError, MismatchError, NumericalError
from emloc.family import StoredParameter
from emloc.finite import is_finite
from emloc.json_files import read_json
from emloc.manifest import Manifest, ModelReference, same_settings, versions
from emloc.memory import PeakMemory, return_large_blocks
from emloc.merging import merged_weight
from emloc.output import ShardWriter, copy_file, file_sha256, stage_folder, write_json
from emloc.planning.contract import keeping, merge_contract
from emloc.plugins import open_model
from emloc.progress import console, progress_bar
from emloc.stage import stage


@stage(MergeConfig)
def merge(config: MergeConfig) -> Path:
    """Merge an adapter into its base model; returns the merged model's folder."""
    adapter = Adapter.open(config.adapter)
    origin = Manifest.find(adapter.path)
    origin_config = origin.base_model.single_file_config if origin else None
    base, family = open_model(
        _base_name(config, adapter, origin), config.single_file_config or origin_config
    )
    adapter = adapter.with_parts(base.parts)
    digest = base.digest()
    if origin is not None and origin.base_model.digest != digest:
        raise MismatchError(
            f"Adapter {adapter.path} belongs to {origin.base_model.name_or_path}, and the weights of "
            f"{base.name} are others; pass that model."
        )
    if "quantization_config" in base.config:
        raise MismatchError(
            f"{base.name} is quantised or an emulator; merge into the original model."
        )
    model = family.skeleton(base, torch.float32)
    weights = base_weights(adapter, lambda name: family.stored(model, name, base), base)
    by_tensor: dict[str, tuple[LoraLayer, StoredParameter]] = {}
    for layer in adapter.layers:
        name = weights[layer.name].plain_name
        if name is None:
            raise MismatchError(
                f"{layer.name} is part of the fused tensor {weights[layer.name].names[0]} in "
                f"{base.name}, into which it cannot be merged; run the adapter beside the model."
            )
        _refuse_tied(model, layer.name, name)
        by_tensor[name] = (layer, weights[layer.name])
    instead = _whole_parameters(adapter, base, lambda name: family.stored(model, name, base))
    parts = {name: base.part(name) for name in adapter.parts}
    by_part = {name: _by_tensor(adapter.parts[name], parts[name]) for name in parts}
    settings = {
        "base_digest": digest,
        "companions_digest": base.companions_digest(),
        "adapter_digest": adapter.digest(),
    }
    if same_settings(Manifest.find(config.output_dir), settings):
        console.print(f"merge: {config.output_dir} is complete already")
        return config.output_dir
    contract = None if config.memory is None else merge_contract(config, base, family, adapter)
    started = time.monotonic()
    return_large_blocks()
    with keeping(contract), stage_folder(config.output_dir, settings) as work:
        with PeakMemory(limit=config.memory) as peak:
            files = _write_shards(base, adapter, by_tensor, instead, work)
            for name, part in parts.items():
                written = _write_shards(part, adapter.parts[name], by_part[name], {}, work / name)
                files |= {f"{name}/{file}": digest for file, digest in written.items()}
        _write_beside(base, work, files.keys())
        measured = {"seconds": round(time.monotonic() - started, 3), **peak.figures()}
        if contract is not None:
            contract.report(measured)
        Manifest(
            kind="merged_model",
            family=family.name,
            base_model=ModelReference.of(base, digest),
            settings=settings,
            summary={"merged_layers": len(by_tensor) + sum(map(len, by_part.values()))},
            files=files,
            versions=versions("emloc", "torch", "safetensors"),
            measured=measured,
        ).write(work)
    return config.output_dir


def _by_tensor(part: Adapter, base: Checkpoint) -> dict[str, tuple[LoraLayer, StoredParameter]]:
    weights = part_weights(part, base)
    return {weights[layer.name].names[0]: (layer, weights[layer.name]) for layer in part.layers}


def _write_beside(base: Checkpoint, work: Path, written: Collection[str]) -> None:
    """Config, index and tokenizer; of a base in another layout, those of the layout written."""
    for name in base.companions():
        if name not in written:
            copy_file(base.path / name, work / name)
    layout = base.layout
    if read_json(base.path / layout.config) == base.config:
        copy_file(base.path / layout.config, work / layout.config)
    else:
        write_json(work / layout.config, base.config)
    # Written anew: the base's folder may hold the index of other files than those that were read.
    if {info.file for info in base.tensors.values()} != {layout.single}:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in base.tensors.values())},
            "weight_map": {name: layout.inside(info.file) for name, info in base.tensors.items()},
        }
        write_json(work / layout.index, index)


def _base_name(config: MergeConfig, adapter: Adapter, origin: Manifest | None) -> str:
    named = Manifest.find(adapter.trained_on) if adapter.trained_on else None
    on_emulator = named is not None and named.kind == "emulator"
    if on_emulator or (origin and origin.kind == "adapter" and origin.emulator is not None):
        raise MismatchError(
            f"Adapter {adapter.path} was trained on an emulator and is not corrected; run emloc "
            f"correct on it first."
        )
    named_by_peft = adapter.config.get("base_model_name_or_path")
    named_by_us = origin.base_model.name_or_path if origin else None
    name = config.model_name_or_path or named_by_peft or named_by_us
    if not name:
        raise ConfigError("merge: the adapter names no base model; pass model_name_or_path.")
    return str(name)


def _refuse_tied(model: Any, layer: str, tensor: str) -> None:
    """A weight stored under another module's name is tied to it: merging would change both."""
    owner = tensor.removesuffix(".weight")
    modules = dict(model.named_modules())
    if owner in modules and owner != layer:
        raise MismatchError(
            f"The adapter changes {layer}, whose weight is tied to {owner}: merging would change "
            f"both; train without {layer}."
        )


def _whole_parameters(
    adapter: Adapter, base: Checkpoint, find: Callable[[str], StoredParameter | None]
) -> dict[str, str]:
    """Base tensors that modules trained whole replace, with the adapter's keys."""
    instead: dict[str, str] = {}
    for name, key in adapter.saved.items():
        stored = find(name)
        plain = None if stored is None else stored.plain_name
        if plain is None or base.tensors[plain].shape != adapter.tensors.tensors[key].shape:
            raise MismatchError(
                f"Adapter {adapter.path} trained {name} whole, and {base.name} does not hold it as one "
                f"tensor of that shape; the adapter was trained for another base model."
            )
        instead[plain] = key
    return instead


def _write_shards(
    base: Checkpoint,
    adapter: Adapter,
    by_tensor: dict[str, tuple[LoraLayer, StoredParameter]],
    instead: Mapping[str, str],
    work: Path,
) -> dict[str, str]:
    by_file: dict[str, list[str]] = {}
    for name, info in base.tensors.items():
        by_file.setdefault(info.file, []).append(name)
    digests: dict[str, str] = {}
    with progress_bar("merge", len(base.tensors)) as advance:
        for file, names in by_file.items():
            # A shard that an interrupted run finished is whole: it was renamed when complete.
            if (work / file).is_file():
                digests[file] = file_sha256(work / file)
                advance(len(names))
                continue
            declared = {
                name: (base.tensors[name].dtype, base.tensors[name].shape) for name in names
            }
            with ShardWriter(work / file, declared) as shard:
                for name, following in zip(names, [*names[1:], None]):
                    if following is not None:
                        base.prefetch([following])
                    if name in instead:
                        tensor = adapter.read(instead[name]).to(base.tensors[name].dtype)
                    else:
                        tensor = _merged(base, adapter, name, by_tensor.get(name))
                    shard.write(name, tensor)
                    advance(note=name)
            digests[file] = shard.sha256
    return digests


def _merged(
    base: Checkpoint, adapter: Adapter, name: str, found: tuple[LoraLayer, StoredParameter] | None
) -> Any:
    if found is None:
        return base.read(name)
    layer, place = found
    weight = place.layer_weight(base.read)
    magnitude = adapter.magnitude(layer.magnitude_key) if layer.magnitude_key else None
    down, up = adapter.matrix(layer.down_key), adapter.matrix(layer.up_key)
    merged = merged_weight(weight, down, up, layer.scaling, magnitude)
    if not is_finite(merged):
        raise NumericalError(
            f"Merging {name} gives NaN or infinity; check {base.name} and {adapter.path} with emloc "
            f"verify."
        )
    return (merged.T if place.transposed else merged).reshape(base.tensors[name].shape)
