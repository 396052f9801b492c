"""The model that an adapter was trained on, as `correct` is told it; what does not belong to it is refused.

Two kinds: an emulator of the base (here), and the base itself, held in few bits
(`emloc.correction.trained_on_base`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from emloc.adapters.adapted_weights import part_weights
from emloc.adapters.belonging import is_emulator
from emloc.adapters.frozen_weights import FrozenWeights
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_base import folder_named, is_of_hub
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.intact import require_intact, require_read
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.correction.emulator_weights import EmulatorWeights
from emloc.errors import MismatchError
from emloc.extend.family import ModelFamily


class TrainedOn(Protocol):
    """The model that an adapter was trained on."""

    @property
    def base_name(self) -> str:
        """The original, as far as is known.

        Raises:
            ConfigError: it is not.
        """
        ...

    @property
    def single_file_config(self) -> str | None:
        """The place of its configuration if it is one file (`ModelReference`)."""
        ...

    @property
    def family(self) -> str | None:
        """The family that is recorded."""
        ...

    def require_base(self, base: Checkpoint, digest: str) -> None:
        """Refuse a base that is not the original.

        Args:
            digest: of its weights.

        Raises:
            MismatchError: it is another model, or not in full precision.
        """
        ...

    def require_parts(self, adapter: Adapter, base: Checkpoint) -> None:
        """Refuse adapters of a pipeline's other models that do not fit the base.

        Raises:
            MismatchError: one does not.
        """
        ...

    def weights(self, family: ModelFamily, model: nn.Module, base: Checkpoint) -> FrozenWeights:
        """The weights that it was trained beside.

        Args:
            model: the base's skeleton.
        """
        ...

    def settings(self) -> Mapping[str, Any]:
        """The entries of settings that identify it."""
        ...

    def reference(self) -> ModelReference | None:
        """The entry of manifests that names it; None for the base itself."""
        ...


@dataclass(frozen=True)
class OnEmulator:
    """`TrainedOn` an emulator.

    Attributes:
        folder: the emulator.
        manifest: its own.
    """

    folder: str
    manifest: Manifest

    @classmethod
    def of(cls, folder: str, adapter: Adapter) -> "OnEmulator":
        """An emulator, for an adapter that was trained on it.

        Raises:
            MismatchError: the folder holds no emulator, or the adapter is of another one.
            CheckpointError: one of the two is not what was written.
        """
        manifest = _emulator_manifest(folder)
        _refuse_foreign_adapter(adapter, folder, manifest)
        return cls(folder, manifest)

    @property
    def base_name(self) -> str:
        """See `TrainedOn`."""
        return self.manifest.base_model.name_or_path

    @property
    def single_file_config(self) -> str | None:
        """See `TrainedOn`."""
        return self.manifest.base_model.single_file_config

    @property
    def family(self) -> str:
        """See `TrainedOn`."""
        return self.manifest.family

    def require_base(self, base: Checkpoint, digest: str) -> None:
        """See `TrainedOn`."""
        if digest != self.manifest.base_model.digest:
            raise MismatchError(
                f"Emulator {self.folder} was built from a model other than {base.name} (it names "
                f"{self.base_name}); pass that one."
            )

    def require_parts(self, adapter: Adapter, base: Checkpoint) -> None:
        """A part is not compressed, so what it was trained beside must be the base's own."""
        emulator = Checkpoint.open(self.folder)
        for name, part in adapter.parts.items():
            trained_on, original = emulator.part(name), base.part(name)
            part_weights(part, original)
            if trained_on.digest() != original.digest():
                raise MismatchError(
                    f"Adapter {part.path} was trained on the {name} of {emulator.name}, but that of "
                    f"{base.name} holds other weights; pass the model that the emulator was made from."
                )

    def weights(self, family: ModelFamily, model: nn.Module, base: Checkpoint) -> EmulatorWeights:
        """See `TrainedOn`."""
        return EmulatorWeights.of(self.folder, self.manifest, family, model, base)

    def settings(self) -> Mapping[str, Any]:
        """See `TrainedOn`."""
        return {"emulator_digest": self.manifest.summary["emulator_digest"]}

    def reference(self) -> ModelReference:
        """See `TrainedOn`."""
        return ModelReference(
            name_or_path=str(Path(self.folder).absolute()),
            digest=self.manifest.summary["emulator_digest"],
        )


def refuse_corrected(adapter: Adapter, origin: Manifest | None) -> None:
    """Let nothing be corrected twice.

    Raises:
        MismatchError: the adapter's manifest says that it is corrected.
    """
    if origin is not None and origin.kind == "corrected_adapter":
        raise MismatchError(
            f"Adapter {adapter.path} is already corrected; correct the one that training wrote."
        )


def _emulator_manifest(emulator: str) -> Manifest:
    manifest = Manifest.read(Path(emulator))
    require_intact(Path(emulator), manifest, fresh=True)
    if manifest.kind != "emulator":
        raise MismatchError(f"{emulator} is not an emulator; its manifest says {manifest.kind}.")
    if manifest.method is not None:
        raise MismatchError(
            f"{emulator} is the light model of the method {manifest.method}, whose adapters are moved to "
            f"the original in their own way, not by correction; use Method.recover, or emloc bench."
        )
    return manifest


def _refuse_foreign_adapter(adapter: Adapter, emulator: str, manifest: Manifest) -> None:
    origin = require_read(adapter.path, fresh=True)
    if origin is None:
        _refuse_foreign_folder(adapter, emulator, manifest)
        return
    refuse_corrected(adapter, origin)
    digest = origin.emulator.digest if origin.emulator else None
    if digest != manifest.summary["emulator_digest"]:
        trained_on = origin.emulator.name_or_path if origin.emulator else "the base model itself"
        raise MismatchError(
            f"Adapter {adapter.path} was trained on {trained_on}, not on {emulator}; pass the "
            f"emulator that it was trained on."
        )


def _refuse_foreign_folder(adapter: Adapter, emulator: str, manifest: Manifest) -> None:
    """Trained by somebody else's trainer: PEFT's config may still name what it was trained on."""
    folder = folder_named(adapter)
    if folder is None or folder.resolve() == Path(emulator).resolve():
        return
    named = Manifest.find(folder)
    if named is None and (is_emulator(folder) or is_of_hub(adapter)):
        return  # the hub's cache has what `from_pretrained` reads, which says no more
    shown = adapter.config["base_model_name_or_path"] if is_of_hub(adapter) else folder
    same = (
        named is not None
        and named.summary.get("emulator_digest") == (manifest.summary["emulator_digest"])
    )
    if not same:
        raise MismatchError(
            f"Adapter {adapter.path} was trained on {shown} according to its adapter_config.json, not on "
            f"{emulator}; pass the emulator that it was trained on."
        )
