"""The base itself, held in few bits by bitsandbytes, as what an adapter was trained on: QLoRA.

PEFT's config says nothing of it. Where the model that it names is here, and was stored in few bits, that says
how; else the options do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from emloc.adapters.adapted_weights import part_weights
from emloc.adapters.rounding import RoundedBase, Rounding
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_base import (
    named_base,
    refuse_other_revision,
    require_base,
    revision_of,
)
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.intact import require_read
from emloc.artefacts.json_files import read_json
from emloc.artefacts.layout import layout_of
from emloc.artefacts.locate import folder_here
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.config import CorrectConfig
from emloc.correction.trained_on import refuse_corrected
from emloc.errors import ConfigError, MismatchError
from emloc.extend.family import ModelFamily
from emloc.machine.progress import console
from emloc.options.few_bits import FEW_BITS


@dataclass(frozen=True)
class OnRoundedBase:
    """`TrainedOn` the base in few bits.

    Attributes:
        adapter: what was trained.
        origin: its manifest.
    """

    adapter: Adapter
    origin: Manifest | None
    rounding: Rounding

    @classmethod
    def of(cls, config: CorrectConfig, adapter: Adapter) -> "OnRoundedBase":
        """The base in few bits, for an adapter that was trained on it.

        Raises:
            MismatchError: the adapter was trained on something else.
            ConfigError: options contradict what is known of the base, or each other.
        """
        origin = require_read(adapter.path, fresh=True)
        refuse_corrected(adapter, origin)
        stated = _stated(adapter, origin)
        rounding = _rounding(config, stated)
        if stated is None and not _asked(config):
            console.print(
                f"correct: nothing says how the base was stored while {adapter.path} was trained; assuming "
                f"{rounding.shown} (options: {', '.join(FEW_BITS)})"
            )
        return cls(adapter, origin, rounding)

    @property
    def _made_from(self) -> ModelReference | None:
        """The original, where the adapter was trained on a light model of ours."""
        known = self.origin is not None and self.origin.emulator is not None
        return self.origin.base_model if self.origin is not None and known else None

    @property
    def base_name(self) -> str:
        """See `TrainedOn`."""
        if self._made_from is not None:
            return self._made_from.name_or_path
        return require_base(self.adapter, self.origin, "correct")

    @property
    def single_file_config(self) -> str | None:
        """See `TrainedOn`."""
        return None if self._made_from is None else self._made_from.single_file_config

    def require_base(self, base: Checkpoint, digest: str) -> None:
        """See `TrainedOn`."""
        refuse_other_revision(self.adapter, self.origin, base.name)
        if "quantization_config" in base.config:
            raise MismatchError(
                f"{base.name} is quantised or an emulator; pass the original as model_name_or_path."
            )
        if self._made_from is not None and self._made_from.digest != digest:
            raise MismatchError(
                f"Adapter {self.adapter.path} was trained on a light model of "
                f"{self._made_from.name_or_path}, but the weights of {base.name} are different; pass that "
                f"model."
            )

    @property
    def family(self) -> str | None:
        """See `TrainedOn`."""
        return None if self.origin is None else self.origin.family

    def require_parts(self, adapter: Adapter, base: Checkpoint) -> None:
        """See `TrainedOn`."""
        for name, part in adapter.parts.items():
            part_weights(part, base.part(name))

    def weights(self, family: ModelFamily, model: nn.Module, base: Checkpoint) -> RoundedBase:
        """See `TrainedOn`."""
        return RoundedBase.of(self.rounding, family, model, base)

    def settings(self) -> Mapping[str, Any]:
        """See `TrainedOn`."""
        return {"rounding": self.rounding.as_json()}

    def reference(self) -> None:
        """See `TrainedOn`."""


def _stated(adapter: Adapter, origin: Manifest | None) -> Mapping[str, Any] | None:
    """The setting of bitsandbytes in the config of the model that the adapter was trained on.

    Raises:
        MismatchError: it was trained on an emulator, in full precision, or in few bits of another kind.
    """
    name = named_base(adapter, origin) or str(adapter.config.get("base_model_name_or_path") or "")
    entry = _quantisation(name, revision_of(adapter))
    method = None if entry is None else entry.get("quant_method")
    if method == "bitsandbytes":
        return entry
    on_emulator = origin is not None and origin.emulator is not None and origin.method is None
    if method == "emloc" or on_emulator:
        raise MismatchError(
            f"Adapter {adapter.path} was trained on the emulator {name}; pass that as emulator."
        )
    if method is not None:
        raise MismatchError(
            f"Adapter {adapter.path} was trained on {name}, which {method} holds in few bits; its rounding "
            f"cannot be reproduced: only bitsandbytes' bases can be corrected for."
        )
    streamed = None if origin is None else origin.settings.get("stream_bits")
    if streamed is not None:
        raise MismatchError(
            f"Adapter {adapter.path} was trained on {name} with blocks in {streamed} bits (stream_bits), "
            f"which are not bitsandbytes' and are not corrected for; take a few steps on the original "
            f"with emloc polish, or merge it as it is."
        )
    if origin is not None:
        said = f"of the method {origin.method}" if origin.method else "in full precision"
        raise MismatchError(
            f"Adapter {adapter.path} was trained on {name} {said}, not on a base that bitsandbytes held in "
            f"few bits; there is nothing to correct."
        )
    return None


def _quantisation(name: str, revision: str | None) -> Mapping[str, Any] | None:
    """`quantization_config` of a folder, or of a hub id that is in the cache; None if there is none."""
    folder = folder_here(name, revision)
    path = None if folder is None else folder / layout_of(folder).config
    entry = read_json(path).get("quantization_config") if path and path.is_file() else None
    return cast("Mapping[str, Any]", entry) if isinstance(entry, dict) else None


def _asked(config: CorrectConfig) -> bool:
    return any(getattr(config, name) not in (None, False) for name in FEW_BITS)


def _rounding(config: CorrectConfig, stated: Mapping[str, Any] | None) -> Rounding:
    """The setting by the config that states it and the options, which may not contradict it.

    Raises:
        ConfigError: they do, or one another; or 16-bit copies are held beside the 8 bits.
    """
    known = {} if stated is None else dict(stated)
    for option in FEW_BITS:
        asked = getattr(config, option)
        if asked in (None, False) and option != "bnb_4bit_use_double_quant":
            continue
        if asked is None:
            continue
        if stated is not None and (stated.get(option) or False) != asked:
            raise ConfigError(
                f"correct: {option}={asked} contradicts the model that the adapter was trained on, whose "
                f"config says {stated.get(option)}; leave the option out."
            )
        known[option] = asked
    if known.get("llm_int8_has_fp16_weight"):
        raise ConfigError(
            "correct: llm_int8_has_fp16_weight held the base in 16 bits; there is nothing to correct."
        )
    eight = bool(known.get("load_in_8bit"))
    of_four = [option for option in FEW_BITS if "4bit" in option and known.get(option)]
    if eight and of_four and stated is None:
        raise ConfigError(f"correct: load_in_8bit and {of_four[0]} contradict each other.")
    skip = known.get("llm_int8_skip_modules")
    if eight:
        return Rounding(8, skip=skip)
    # What a config leaves out has transformers' defaults; without one, QLoRA's are more likely.
    kind, double = ("nf4", True) if stated is None else ("fp4", False)
    return Rounding(
        4,
        known.get("bnb_4bit_quant_type", kind),
        bool(known.get("bnb_4bit_use_double_quant", double)),
        skip,
    )
