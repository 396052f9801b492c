"""An adapter of a light model as one of the original: its LoRA tensors renamed, scattered, or as they are.

A method says, layer by layer, what name, A (r × d_in) and B (d_out × r) the LoRA has in the original;
rank and scaling stay. What comes out is an ordinary PEFT adapter whose config names its layers one by
one, with a manifest like that of a corrected adapter.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from emloc.adapters.adapted_weights import adapted_weights
from emloc.adapters.carried_over import carry_over
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_config import CONFIG_NAME, exact_patterns
from emloc.artefacts.adapter_tensors import PREFIX, WEIGHTS_NAME, LoraLayer
from emloc.artefacts.intact import require_intact
from emloc.artefacts.kinds import CORRECTED_ADAPTER
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.small_files import write_json
from emloc.errors import MismatchError
from emloc.extend.capabilities import exported
from emloc.extend.opening import open_model
from emloc.stages.frame import Artefact, Written, digests


class Recovered(NamedTuple):
    """A layer's LoRA in the original model.

    Attributes:
        name: the layer's module name.
        down: A, r × d_in.
        up: B, d_out × r.
        magnitude: DoRA's, one number per output, or None.
    """

    name: str
    down: Tensor
    up: Tensor
    magnitude: Tensor | None


Recover = Callable[[LoraLayer, Recovered], Recovered]
"""A function from a layer and its LoRA on the light model to its LoRA on the original."""


def as_it_is(layer: LoraLayer, trained: Recovered) -> Recovered:
    """The layer has the same name and shape in both."""
    return trained


def recover_adapter(
    adapter: Path,
    light: Path,
    out: Path,
    recover: Recover = as_it_is,
    rename: Callable[[str], str] = str,
) -> Path:
    """Write the original model's adapter; returns its folder.

    Args:
        adapter: as trained on the light model.
        light: the light model, for its manifest.
        rename: the original's name of a parameter that was trained whole.

    Raises:
        MismatchError: it was trained on something else, or does not fit the original.
        CheckpointError: one of the two is not what was written.
    """
    origin, built = Manifest.read(adapter), Manifest.read(light)
    require_intact(adapter, origin, fresh=True)
    require_intact(light, built)
    if origin.kind == "corrected_adapter":
        raise MismatchError(
            f"Adapter {adapter} already belongs to the original; there is nothing to do."
        )
    digest = origin.emulator.digest if origin.emulator else None
    if digest != built.summary["emulator_digest"]:
        raise MismatchError(
            f"Adapter {adapter} was not trained on {light}; pass what it was trained on."
        )
    base, family = open_model(built.base_model.name_or_path, recorded=built.family)
    if base.digest() != built.base_model.digest:
        raise MismatchError(f"{light} was built from weights other than those of {base.name}.")
    trained = Adapter.open(str(adapter)).with_parts(base.parts)
    adapter_digest = trained.digest()
    settings: dict[str, Any] = {
        "method": built.method,
        "base_digest": built.base_model.digest,
        "emulator_digest": digest,
        "adapter_digest": adapter_digest,
    }
    artefact = Artefact(
        "recover",
        CORRECTED_ADAPTER,
        out,
        settings,
        family.name,
        built.base_model,
        emulator=ModelReference(name_or_path=str(light.absolute()), digest=str(digest)),
        adapter=ModelReference.of_adapter(adapter, adapter_digest),
        method=built.method,
        packages=("emloc-baselines", "torch", "safetensors"),
    )

    def write(work: Path) -> Written:
        tensors, names = _tensors(trained, recover, rename)
        declared = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
        with ShardWriter(work / WEIGHTS_NAME, declared, str(adapter)) as shard:
            for key, value in tensors.items():
                shard.write(key, value)
        write_json(work / CONFIG_NAME, _config(trained, names, base.reference_name()))
        _require_fit(work, family, base)
        for name, part in trained.parts.items():
            carry_over(part, base, work / name)
        others = exported(family, base, work)
        return Written(digests(work, (*trained.files, *others)))

    return artefact.write(write)


def _tensors(
    trained: Adapter, recover: Recover, rename: Callable[[str], str]
) -> tuple[dict[str, Tensor], Mapping[str, LoraLayer]]:
    """The tensors of the new file, and each trained layer by its name in the original."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, LoraLayer] = {}
    for layer in trained.layers:
        magnitude = trained.magnitude(layer.magnitude_key) if layer.magnitude_key else None
        down, up = trained.read(layer.down_key), trained.read(layer.up_key)
        new = recover(layer, Recovered(layer.name, down, up, magnitude))
        stem = f"{PREFIX}{new.name}"
        tensors[f"{stem}.lora_A.weight"] = new.down.contiguous()
        tensors[f"{stem}.lora_B.weight"] = new.up.contiguous()
        if new.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = new.magnitude.contiguous()
        names[new.name] = layer
    for name, key in trained.saved.items():
        tensors[f"{PREFIX}{rename(name)}"] = trained.read(key)
    return dict(sorted(tensors.items())), names


def _config(trained: Adapter, names: Mapping[str, LoraLayer], base_name: str) -> dict[str, Any]:
    """The adapter's config with every layer named in full; patterns where they differ from r and alpha."""
    layers = [(name, layer.rank, layer.scaling) for name, layer in names.items()]
    ranks, alphas = exact_patterns(trained.config, layers)
    return {
        **trained.config,
        "base_model_name_or_path": base_name,
        "target_modules": sorted(names),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _require_fit(work: Path, family: Any, base: Any) -> None:
    """Every layer is one of the original's, of its shape."""
    import torch

    skeleton = family.skeleton(base, torch.float32)
    adapted_weights(Adapter.open(str(work)), family, skeleton, base)
