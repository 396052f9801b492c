"""A few streamed steps on the original, from the LoRA that an emulator gave.

What the emulator could teach is learnt; what is left is the mismatch between the two models, which a few
large steps on the original itself take away. Each of them reads the model twice, a block at a time.
Samples are held back to judge by: where their loss is not lower afterwards, the LoRA stays as it came.
"""

from pathlib import Path

from emloc.adapters.belonging import require_original
from emloc.adapters.going_on import (
    goes_on_from,
    lora_options,
    refuse_options_of_a_new_lora,
)
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_base import require_base
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.digest import named_digests
from emloc.artefacts.intact import require_read
from emloc.artefacts.kinds import ADAPTER, CORRECTED_ADAPTER
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.artefacts.output_place import has_place
from emloc.artefacts.small_files import copy_file
from emloc.artefacts.write_errors import others_writing
from emloc.config import PolishConfig, TrainConfig, TrainingOptions, build
from emloc.errors import ConfigError, NumericalError
from emloc.extend.capabilities import ContinuesAdapters, StreamsTraining, exported
from emloc.extend.family import ModelFamily
from emloc.extend.opening import named_family, of_folder, open_model
from emloc.extend.plugin_options import of_family, own_options, with_family_options
from emloc.machine.progress import console
from emloc.options.polish import micro_batches
from emloc.planning.contract import Contract, contract_for
from emloc.planning.setting import Setting
from emloc.stages.data_digest import data_digests, digested
from emloc.stages.frame import Artefact, Written, digests
from emloc.stages.resumed import resumed_from
from emloc.stages.stage import stage
from emloc.stages.training_needs import check_training

PATHS = {"output_dir", "adapter", "model_name_or_path", "single_file_config"}
"""Options whose meaning is in a digest instead."""


def _can_polish(config: PolishConfig) -> None:
    if config.dataset is None:
        raise ConfigError(
            "polish: dataset is required (a JSONL, CSV or parquet file, a folder, or a hub id)."
        )
    refuse_options_of_a_new_lora(config, "polish")
    has_place(config)
    check_training(_as_training(config, TrainConfig))


@stage(
    PolishConfig,
    check=_can_polish,
    consumes={"adapter": (CORRECTED_ADAPTER, ADAPTER)},
    produces=CORRECTED_ADAPTER,
    folder="polished",
    memory=Setting.polish,
)
def polish(config: PolishConfig) -> Path:
    """Polish a LoRA on the original; returns the new adapter's folder."""
    adapter = Adapter.open(config.adapter)
    origin = require_read(adapter.path, fresh=True)
    base, family = open_model(
        config.model_name_or_path or _original(adapter, origin),
        config.single_file_config or (origin.base_model.single_file_config if origin else None),
        config.family,
        origin.family if origin else None,
    )
    config = of_family(config, family)
    _require_able(config, adapter, family)
    digest = base.digest()
    require_original(adapter, origin, base, digest, "polish takes its steps on")
    adapter = adapter.with_parts(base.parts)
    training = _as_training(config, with_family_options(TrainConfig, family))
    training = training.model_copy(update={"model_name_or_path": base.reference_name()})
    begun = goes_on_from(training, family, base)
    assert begun is not None
    training = training.model_copy(update=lora_options(begun))
    check_training(training)
    named = named_digests(config)
    adapter_digest = adapter.digest()
    settings = {
        **own_options(config, PATHS.union(digested(config))),
        **named_family(base, family),
        "base_digest": digest,
        "companions_digest": base.companions_digest(),
        "adapter_digest": adapter_digest,
        **data_digests(config, family),
        **({"named_digests": named} if named else {}),
    }
    settings |= resumed_from(config, config.output_dir, settings)
    reference = ModelReference.of(base, digest)
    artefact = Artefact(
        "polish",
        CORRECTED_ADAPTER,
        config.output_dir,
        settings,
        family.name,
        reference,
        emulator=origin.emulator if origin else None,
        adapter=ModelReference.of_adapter(adapter.path, adapter_digest),
        method=origin.method if origin else None,
        packages=("torch", "transformers", "peft", "trl", "accelerate"),
        streamed=False,
    )

    def write(work: Path) -> Written:
        with others_writing(work):
            figures = family.train(of_folder(training, base), work)
        made = Adapter.open(str(work)).with_parts(base.parts)
        made.require_finite(_diverged)
        summary = figures.pop("summary", {})
        _say_if_steps_are_short(config, summary.get("samples"))
        summary["kept"] = _is_better(summary.get("held_back_loss"))
        if not summary["kept"]:
            for name in adapter.files:
                copy_file(adapter.path / name, work / name)
        made.name_base(reference.name_or_path)
        others = exported(family, base, work)
        return Written(
            digests(work, (*made.files, *others)),
            summary=summary,
            measured={"device": config.device, **figures},
        )

    return artefact.write(write, lambda: _contract(training, base, family, begun))


def _as_training(config: PolishConfig, kind: type[TrainConfig]) -> TrainConfig:
    """The options of the training that polishing is."""
    batch, accumulated = micro_batches(config)
    own = TrainingOptions.model_fields.keys() | (config.model_fields_set & kind.model_fields.keys())
    given = {name: getattr(config, name) for name in own}
    given |= {
        "adapter": config.adapter,
        "model_name_or_path": config.model_name_or_path or config.adapter,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulated,
    }
    return build(kind, given, "polish")


def _original(adapter: Adapter, origin: Manifest | None) -> str:
    """The original that the adapter was made for, by way of an emulator or not."""
    if origin is not None and origin.kind == "adapter" and origin.emulator is not None:
        return origin.base_model.name_or_path
    return require_base(adapter, origin, "polish")


def _require_able(config: PolishConfig, adapter: Adapter, family: ModelFamily) -> None:
    if not isinstance(family, ContinuesAdapters):
        raise ConfigError(
            f"polish: the family {family.name} starts every training with a new LoRA and cannot continue "
            f"from one; use the corrected adapter as it is."
        )
    if config.stream and not isinstance(family, StreamsTraining):
        raise ConfigError(
            f"polish: the family {family.name} loads its model whole to train; pass stream=false."
        )
    if config.stream and adapter.saved:
        raise ConfigError(
            f"polish: {adapter.path} has modules that were trained whole ({next(iter(adapter.saved))}), but "
            f"a streamed step trains only LoRA; pass stream=false."
        )


def _say_if_steps_are_short(config: PolishConfig, samples: int | None) -> None:
    """Say so where the data end within a step: the Trainer goes on to the next epoch with another one."""
    wanted = config.samples_per_step
    if samples is None or config.max_steps * wanted <= samples or samples % wanted == 0:
        return
    console.print(
        f"polish: there are {samples} samples to train on, so the last step of every epoch has "
        f"{samples % wanted} of them, not samples_per_step={wanted}"
    )


def _is_better(losses: list[float] | None) -> bool:
    """Return whether the loss of what was held back is lower afterwards; say so."""
    if losses is None:
        console.print("polish: no samples were held back, so the result is not judged")
        return True
    before, after = losses
    better = after < before
    what = "" if better else ", which is no better: the adapter stays as it came"
    console.print(f"polish: loss on held-back samples {before:.4f}, then {after:.4f}{what}")
    return better


def _contract(
    training: TrainConfig, base: Checkpoint, family: ModelFamily, adapter: Adapter
) -> Contract | None:
    if training.memory is None:
        return None
    return contract_for("polish", Setting.train, training, base, family, adapter)


def _diverged(key: str) -> NumericalError:
    return NumericalError(
        f"Polishing gave NaN or infinity in {key}; use a lower learning_rate or max_grad_norm."
    )
