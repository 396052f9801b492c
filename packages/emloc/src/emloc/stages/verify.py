"""Check what a stage wrote: files, shapes, finiteness, keys, and the way back to the base model."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from emloc.adapters.adapted_weights import adapted_weights, part_weights
from emloc.adapters.rounding import Rounding
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_base import named_base
from emloc.artefacts.adapter_config import CONFIG_NAME
from emloc.artefacts.adapter_tensors import WEIGHTS_NAME
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.intact import require_intact
from emloc.artefacts.kinds import ADAPTER, CORRECTED_ADAPTER, EMULATOR, MERGED_MODEL
from emloc.artefacts.manifest import Manifest
from emloc.config import VerifyConfig
from emloc.errors import CheckpointError, EmlocError, MismatchError, NumericalError
from emloc.extend.capabilities import native_of
from emloc.extend.family import ModelFamily
from emloc.extend.opening import family_of, open_model
from emloc.extend.plugins import family_named
from emloc.machine.progress import warn
from emloc.stages.stage import stage
from emloc.verification.chain import Link, is_here, walk
from emloc.verification.merged_outputs import compare_merged
from emloc.verification.tensors import require_emulator, require_finite, require_parameters


@stage(VerifyConfig, consumes={"path": (EMULATOR, ADAPTER, CORRECTED_ADAPTER, MERGED_MODEL)})
def verify(config: VerifyConfig) -> dict[str, Any]:
    """Check a whole folder, and what it was made from as far as that is available.

    Returns:
        A report; its `chain` has a line for each model and adapter on the way back to the base.

    Raises:
        EmlocError: the first thing found wrong.
    """
    if not config.path.is_dir():
        raise CheckpointError(
            f"No folder {config.path}; pass an emulator, adapter or merged model."
        )
    manifest = Manifest.find(config.path)
    if manifest is not None:
        require_intact(config.path, manifest, every=True, fresh=True)
    is_adapter = (config.path / CONFIG_NAME).is_file()
    checked = (_verify_adapter if is_adapter else _verify_model)(config, manifest)
    default = "adapter" if is_adapter else "model"
    return {
        "path": str(config.path),
        "kind": manifest.kind if manifest else default,
        "files": len(manifest.files) if manifest else 0,
        **checked,
    }


def _verify_model(config: VerifyConfig, manifest: Manifest | None) -> dict[str, Any]:
    checkpoint = Checkpoint.open(str(config.path))
    if manifest is None or config.family is not None:
        family = family_of(checkpoint, config.family)
    else:
        family = family_named(manifest.family)
    checkpoint = native_of(family, checkpoint)
    if manifest is not None and manifest.kind == EMULATOR.name:
        if manifest.method is None:  # what others hold, only they know
            require_emulator(checkpoint, manifest, family)
        if checkpoint.digest() != manifest.summary.get("emulator_digest"):
            raise CheckpointError(
                f"{config.path} holds other weights than its manifest was written for; make it again."
            )
    else:
        require_parameters(checkpoint, family)
    checked: dict[str, Any] = {"tensors": require_finite(checkpoint)}
    if manifest is None:
        return checked
    base = _base(config, manifest)
    links = list(walk(config.path, manifest, base.parts if base else (), config.adapter))
    if manifest.kind == MERGED_MODEL.name and base is not None and links and links[0].checked:
        adapter = Adapter.open(links[0].path).with_parts(base.parts)
        rounding = Rounding.runs_on(Manifest.find(adapter.path))
        compared = compare_merged(checkpoint, base, adapter, rounding, family)
        checked["compared"] = asdict(compared)
    return {**checked, "chain": _said(config, manifest, links, base)}


def _base(config: VerifyConfig, manifest: Manifest) -> Checkpoint | None:
    """The base, compared with what the manifest says; None where it is elsewhere and nobody asked for it."""
    origin = manifest.base_model
    on_emulator = manifest.kind == ADAPTER.name and manifest.emulator is not None
    given = None if on_emulator else config.model_name_or_path  # else the emulator, if anything
    name = given or origin.name_or_path
    if given is None and not is_here(name):
        return None
    sources = config.single_file_config or origin.single_file_config
    base, _ = open_model(name, sources, config.family, manifest.family, fresh=True)
    if base.digest() != origin.digest:
        raise MismatchError(f"{config.path} was made from other weights than those of {name}.")
    return base


def _said(
    config: VerifyConfig, manifest: Manifest, links: list[Link], base: Checkpoint | None
) -> list[dict[str, Any]]:
    """The chain for the result, with a warning for each link that nobody could look at."""
    name = base.name if base is not None else manifest.base_model.name_or_path
    chain = [*links, Link("base", name, base is not None)]
    for link in chain:
        if not link.checked:
            warn(
                f"{config.path} was made from the {link.kind} {link.path}, which is not here to be checked"
            )
    return [asdict(link) for link in chain]


def _verify_adapter(config: VerifyConfig, manifest: Manifest | None) -> dict[str, Any]:
    adapter = Adapter.open(str(config.path))
    name = config.model_name_or_path or named_base(adapter, manifest)
    base = family = None
    if name and (config.model_name_or_path or is_here(name)):
        named = manifest.base_model.single_file_config if manifest else None
        recorded = manifest.family if manifest else None
        sources = config.single_file_config or named
        base, family = open_model(name, sources, config.family, recorded, fresh=True)
    adapter = adapter.with_parts(sorted({*_listed_parts(manifest), *(base.parts if base else ())}))

    def fail(key: str) -> EmlocError:
        return NumericalError(f"{key} of {config.path / WEIGHTS_NAME} holds NaN or infinity.")

    adapter.require_finite(fail)
    against = None
    if base is not None and family is not None and "quantization_config" not in base.config:
        _require_fit(adapter, base, family)
        against = name
    checked: dict[str, Any] = {}
    if manifest is not None:
        original = _base(config, manifest)
        parts = original.parts if original else list(adapter.parts)
        links = list(walk(config.path, manifest, parts, config.adapter))
        checked["chain"] = _said(config, manifest, links, original)
    every = (adapter, *adapter.parts.values())
    return {
        "tensors": sum(len(each.tensors.tensors) for each in every),
        "layers": sum(len(each.layers) for each in every),
        "base_model": against,
        **checked,
    }


def _listed_parts(manifest: Manifest | None) -> set[str]:
    """The folders of the parts that a manifest lists; a checkpoint of training is none."""
    paths = [Path(file) for file in (manifest.files if manifest else ())]
    names = {path.parts[0] for path in paths if len(path.parts) == 2 and path.name == CONFIG_NAME}
    return {name for name in names if re.fullmatch(r"checkpoint-\d+", name) is None}


def _require_fit(adapter: Adapter, base: Checkpoint, family: ModelFamily) -> None:
    model = family.skeleton(base, torch.float32)
    adapter = adapted_weights(adapter, family, model, base).adapter
    for part in adapter.parts:
        part_weights(adapter.parts[part], base.part(part))
