"""The plugin's entry point: says what it offers, and imports nothing heavy.

It is a module beside `emloc_speech`, because importing that imports transformers,
and `emloc --help` must not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from emloc.plugin import (
    TRANSFORMERS_MODEL,
    DataOptions,
    FamilyEntry,
    LengthOptions,
    SplitOptions,
    hookimpl,
)


def recognises(config: Mapping[str, Any]) -> bool:
    """Tell from a parsed `config.json` alone."""
    names = config.get("architectures")
    return isinstance(names, list) and "WhisperForConditionalGeneration" in names


@hookimpl
def emloc_register_families() -> Sequence[FamilyEntry]:
    """The family, which is imported once one of its models is opened."""
    return [
        FamilyEntry(
            name="speech",
            summary="Whisper: audio to text",
            target="emloc_speech.family:SpeechFamily",
            recognises=recognises,
            options={DataOptions: (SplitOptions, LengthOptions)},
            offers=(TRANSFORMERS_MODEL,),
        )
    ]
