"""The plugin's entry point: says what it offers and imports nothing heavy.

It is a module beside `emloc_vlm` and not inside, because importing `emloc_vlm` registers the emulator
format with transformers, which takes seconds, and `emloc --help` must not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from emloc.plugin import (
    IN_FEW_BITS,
    TEXT_OPTIONS,
    TRANSFORMER_BLOCKS,
    TRANSFORMERS_MODEL,
    DataOptions,
    EvaluateConfig,
    FamilyEntry,
    TrainConfig,
    hookimpl,
)
from emloc_vlm_options import FreezeOptions, ImageOptions, MetricOptions


def is_vlm(config: Mapping[str, Any]) -> bool:
    """Return whether a parsed `config.json` names a model that reads images and writes text."""
    if config.get("model_type") == "internvl_chat":
        return True
    names: Any = config.get("architectures")
    writes = isinstance(names, list) and any(
        str(name).endswith("ForConditionalGeneration") for name in names
    )
    return writes and isinstance(config.get("vision_config"), Mapping)


@hookimpl
def emloc_register_families() -> Sequence[FamilyEntry]:
    """Vision-language models."""
    return [
        FamilyEntry(
            name="vlm",
            summary="vision-language models of transformers (AutoModelForImageTextToText), InternVL",
            target="emloc_vlm.family:VLMFamily",
            recognises=is_vlm,
            offers=(TRANSFORMERS_MODEL, TRANSFORMER_BLOCKS, IN_FEW_BITS),
            options={
                **TEXT_OPTIONS,
                DataOptions: (*TEXT_OPTIONS[DataOptions], ImageOptions),
                TrainConfig: FreezeOptions,
                EvaluateConfig: (*TEXT_OPTIONS[EvaluateConfig], MetricOptions),
            },
        )
    ]
