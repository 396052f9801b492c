"""Stage 3: fit a LoRA trained on an emulator to the original model, one layer at a time.

Reads a layer's weight from the base's shards and its stored form from the emulator's, never a model. Without
an emulator the LoRA was trained on the base in few bits (QLoRA), which are made anew from its weights; then
the dequantised weights are one more end, on which the adapter stays as it is.
With `limit="auto"` one streamed pass over the base compares ways to correct on calibration samples; a fit to
the data (`strength`) needs one to see what the LoRA reads.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from emloc.adapters.adapted_weights import adapted_weights
from emloc.adapters.carried_over import carry_over
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.digest import batches_digest
from emloc.artefacts.kinds import ADAPTER, CORRECTED_ADAPTER, EMULATOR
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.artefacts.output_place import has_place
from emloc.config import CorrectConfig
from emloc.correction.adapter_correction import AdapterCorrection
from emloc.correction.reads import Reads
from emloc.correction.trained_on import OnEmulator, TrainedOn
from emloc.correction.trained_on_base import OnRoundedBase
from emloc.correction.ways import with_dequantised
from emloc.errors import ConfigError
from emloc.extend.capabilities import exported
from emloc.extend.family import Batch, ModelFamily
from emloc.extend.opening import named_family, open_model
from emloc.extend.plugin_options import of_family, own_options
from emloc.machine.progress import console
from emloc.options.few_bits import FEW_BITS
from emloc.options.marks import split_of
from emloc.options.types import DEQUANTISED
from emloc.planning.setting import Setting
from emloc.stages.data_digest import data_digest
from emloc.stages.frame import Artefact, Written, digests
from emloc.stages.stage import stage
from emloc.streaming.stream import UnitStream

READS = "reads"
"""The folder inside the unfinished adapter's in which sums over the data wait."""

PATHS = {
    "adapter",
    "emulator",
    "output_dir",
    "model_name_or_path",
    "single_file_config",
    "dataset",
    *FEW_BITS,
}
"""Options whose meaning is in a digest instead."""


def _can_correct(config: CorrectConfig) -> None:
    given = [option for option in FEW_BITS if getattr(config, option) not in (None, False)]
    if config.emulator is not None and given:
        raise ConfigError(
            f"correct: {given[0]} is about a base in few bits, but an adapter of an emulator was not "
            f"trained on one; pass one of them."
        )
    if config.emulator is not None and DEQUANTISED in (config.limit, *config.limit_candidates):
        raise ConfigError(
            f"correct: {DEQUANTISED} is for adapters of a base in few bits; leave it out if there is an "
            f"emulator."
        )
    if config.strength is not None and "limit" in config.model_fields_set:
        raise ConfigError(
            "correct: limit and strength are two ways to correct; pass one of them, or neither to compare "
            "both on data."
        )
    tried = sorted({"limit_candidates", "strength_candidates"} & config.model_fields_set)
    if tried and not _compares(config):
        fixed = "limit" if config.strength is None else "strength"
        raise ConfigError(
            f"correct: {tried[0]} are what limit=auto compares, but {fixed} is fixed at "
            f"{getattr(config, fixed)}; leave one of them out."
        )
    if config.dataset is None and config.strength is not None:
        raise ConfigError("correct: strength applies to a fit to data; pass a dataset.")
    if config.dataset is None and config.limit == "auto":
        raise ConfigError(
            "correct: limit=auto compares limits on data; pass a dataset, or a fixed limit such as 1."
        )
    has_place(config)


def _compares(config: CorrectConfig) -> bool:
    return config.limit == "auto" and config.strength is None


@stage(
    CorrectConfig,
    check=_can_correct,
    consumes={"emulator": EMULATOR, "adapter": ADAPTER},
    produces=CORRECTED_ADAPTER,
    folder="corrected",
    memory=Setting.correct,
)
def correct(config: CorrectConfig) -> Path:
    """Correct an adapter for the original model; returns the new adapter's folder."""
    adapter = Adapter.open(config.adapter)
    trained_on = _trained_on(config, adapter)
    base, family = open_model(
        config.model_name_or_path or trained_on.base_name,
        config.single_file_config or trained_on.single_file_config,
        config.family,
        trained_on.family,
    )
    config = of_family(config, family)
    config = with_dequantised(config) if config.emulator is None else config
    digest = base.digest()
    trained_on.require_base(base, digest)
    adapter = adapter.with_parts(base.parts)
    trained_on.require_parts(adapter, base)
    skeleton = family.skeleton(base, torch.float32)
    adapted = adapted_weights(adapter, family, skeleton, base)
    frozen = trained_on.weights(family, skeleton, base)
    del skeleton
    adapter = adapted.adapter
    contract = correct.contract(config, base, family, adapter)
    batches = _batches(config, family, base)
    adapter_digest = adapter.digest()
    settings = {
        **own_options(config, PATHS),
        **named_family(base, family),
        "base_digest": digest,
        "companions_digest": base.companions_digest(),
        **trained_on.settings(),
        "adapter_digest": adapter_digest,
        "data_digest": batches_digest(batches),
    }
    artefact = Artefact(
        "correct",
        CORRECTED_ADAPTER,
        config.output_dir,
        settings,
        family.name,
        ModelReference.of(base, digest),
        emulator=trained_on.reference(),
        adapter=ModelReference.of_adapter(adapter.path, adapter_digest),
        packages=("torch", "safetensors"),
        device=config.device,
        memory=config.memory,
    )

    def write(work: Path) -> Written:
        reads = Reads(work / READS, frozen.layers)
        correction = AdapterCorrection(config, base, frozen, adapted, reads)
        stream = None
        # Names are all that is needed without data, and a skeleton grows with the model's depth.
        if batches:
            _say_if_learnt(config, adapter, family)
            saved = {name: adapter.read(key) for name, key in adapter.saved.items()}
            stream = UnitStream(family, base, config.device, instead=saved)
        if stream is not None and _compares(config):
            at_once = None if contract is None else contract.setting.candidates
            chosen, summary = correction.choose(stream, batches, at_once)
        else:
            chosen, summary = correction.given(stream, batches)
        del stream
        layers = correction.write(work, chosen)
        shutil.rmtree(work / READS, ignore_errors=True)
        for name, part in adapter.parts.items():
            carry_over(part, base, work / name)
        others = exported(family, base, work)
        return Written(
            digests(work, (*adapter.files, *others)),
            layers,
            summary=summary,
            measured={"device": config.device},
        )

    return artefact.write(write, lambda: contract)


def _trained_on(config: CorrectConfig, adapter: Adapter) -> TrainedOn:
    if config.emulator is not None:
        return OnEmulator.of(config.emulator, adapter)
    return OnRoundedBase.of(config, adapter)


def _say_if_learnt(config: CorrectConfig, adapter: Adapter, family: ModelFamily) -> None:
    """Say so where the data that judge a correction are those that the LoRA was trained on."""
    origin = Manifest.find(adapter.path)
    learnt = None if origin is None else origin.settings.get("data_digest")
    if learnt is None:
        return
    split = split_of(config, "dataset")
    if learnt == data_digest(config.dataset, split, config, family):
        console.print(
            "correct: the LoRA was trained on the same data; a dataset of samples that it has not seen "
            "tells better which correction is best"
        )


def _batches(config: CorrectConfig, family: ModelFamily, base: Checkpoint) -> Sequence[Batch]:
    if not _compares(config) and config.strength is None:
        return []
    return family.calibration_batches(base, config)
