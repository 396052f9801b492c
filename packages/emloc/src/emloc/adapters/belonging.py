"""The model that an adapter belongs on, and the refusal of every other.

A LoRA loads without a word on any model of the same shapes. Its manifest says what it was made for: a
corrected one for the original, one that training wrote for the model that it was trained on. Of somebody
else's adapter, PEFT's config may name a folder, and that of an emulator says enough.
"""

from pathlib import Path
from typing import Any, cast

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_base import folder_named, refuse_other_revision
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.json_files import read_json
from emloc.artefacts.layout import layout_of
from emloc.artefacts.manifest import Manifest
from emloc.errors import MismatchError


def trained_on_emulator(adapter: Adapter, origin: Manifest | None) -> str | None:
    """The digest of the emulator that an adapter runs on; None for an adapter of an original.

    It is empty where an emulator's config is here and its manifest is not, as of what `from_pretrained` has
    downloaded.

    Args:
        origin: its manifest.
    """
    if origin is not None:
        on_emulator = origin.kind == "adapter" and origin.emulator is not None
        return origin.emulator.digest if on_emulator and origin.emulator else None
    folder = folder_named(adapter)
    if folder is None:
        return None
    named = Manifest.find(folder)
    if named is None:
        return "" if is_emulator(folder) else None
    return str(named.summary.get("emulator_digest")) if named.kind == "emulator" else None


def is_emulator(folder: Path) -> bool:
    """Return whether the config in a model's folder says that it is an emulator."""
    path = folder / layout_of(folder).config
    entry = read_json(path).get("quantization_config") if path.is_file() else None
    return isinstance(entry, dict) and cast("dict[str, Any]", entry).get("quant_method") == "emloc"


def refuse_uncorrected(adapter: Adapter, origin: Manifest | None, instead: str = "") -> None:
    """Refuse an adapter of an emulator where an original is meant.

    Args:
        instead: what else could be done, to end the message with.

    Raises:
        MismatchError: it is one.
    """
    if trained_on_emulator(adapter, origin) is not None:
        raise MismatchError(
            f"Adapter {adapter.path} was trained on an emulator and is not corrected; run emloc "
            f"correct on it first{instead}."
        )


def require_original(
    adapter: Adapter, origin: Manifest | None, base: Checkpoint, digest: str, instead: str
) -> None:
    """Refuse a model that is not the original, or not the one that the adapter was made for.

    Args:
        origin: the adapter's manifest.
        digest: of the model's weights.
        instead: what the original is for, to end the message with.

    Raises:
        MismatchError: it is neither.
    """
    refuse_other_revision(adapter, origin, base.name)
    if "quantization_config" in base.config:
        raise MismatchError(
            f"{base.name} is quantised or an emulator; {instead} the original model."
        )
    if origin is not None and origin.base_model.digest != digest:
        raise MismatchError(
            f"Adapter {adapter.path} belongs to {origin.base_model.name_or_path}, but the weights of "
            f"{base.name} are different; pass that model."
        )


def require_belonging(
    adapter: Adapter, origin: Manifest | None, name: str, digest: str, kind: str | None
) -> None:
    """Refuse an adapter on a model that it was not made for.

    Args:
        origin: the adapter's manifest.
        name: the model's, for messages.
        digest: of the model's weights.
        kind: of the model by its manifest, if it has one.

    Raises:
        MismatchError: it belongs on another one.
    """
    refuse_other_revision(adapter, origin, name)
    anyway = "or pass allow_mismatch to score it anyway"
    if trained_on_emulator(adapter, origin) == digest:
        return
    if kind != "emulator":
        refuse_uncorrected(adapter, origin, f", {anyway}")
    if origin is None:
        return
    made_for = (
        origin.emulator if origin.kind == "adapter" and origin.emulator else origin.base_model
    )
    if made_for.digest == digest:
        return
    if kind == "merged_model":
        what = f"{name} is a merged model, which already contains an adapter"
    elif kind == "emulator" and origin.kind == "corrected_adapter":
        what = f"it is corrected for the original, but {name} is an emulator"
    else:
        what = f"the weights of {name} are different"
    raise MismatchError(
        f"Adapter {adapter.path} belongs to {made_for.name_or_path}, and {what}; pass the model that it "
        f"belongs to, {anyway}."
    )
