"""The plugin's entry point: says what it offers, and imports nothing heavy.

It is a module beside `emloc_encoder`, because importing that imports transformers,
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
    # yours: the classes that checkpoints of this kind name.
    names = config.get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


@hookimpl
def emloc_register_families() -> Sequence[FamilyEntry]:
    """The family, which is imported once one of its models is opened."""
    return [
        FamilyEntry(
            name="encoder",
            summary="models of the kind encoder",
            target="emloc_encoder.family:EncoderFamily",
            recognises=recognises,
            # yours: the options that `data` reads, as `dataset_split` and `max_length` here.
            options={DataOptions: (SplitOptions, LengthOptions)},
            offers=(TRANSFORMERS_MODEL,),
        )
    ]
