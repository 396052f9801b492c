"""The plugin's entry point: says what it offers, and imports nothing heavy.

It is a module beside `emloc_encoder`, because importing that imports transformers,
and `emloc --help` must not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from emloc.plugin import (
    IN_FEW_BITS,
    TRANSFORMER_BLOCKS,
    TRANSFORMERS_MODEL,
    DataOptions,
    FamilyEntry,
    LengthOptions,
    SplitOptions,
    hookimpl,
)

MODEL_TYPES = frozenset(
    {"albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "roberta"}
)


HEADS = ("ForSequenceClassification", "ForMaskedLM", "ForPreTraining", "Model")


def recognises(config: Mapping[str, Any]) -> bool:
    """Tell from a parsed `config.json` whether it is of a classifier, or of what may become one."""
    names, kind = config.get("architectures"), config.get("model_type")
    heads = isinstance(names, list) and any(str(name).endswith(HEADS) for name in names)
    return heads and isinstance(kind, str) and kind in MODEL_TYPES


@hookimpl
def emloc_register_families() -> Sequence[FamilyEntry]:
    """The family, which is imported once one of its models is opened."""
    return [
        FamilyEntry(
            name="encoder",
            summary="text classifiers of transformers: BERT, RoBERTa, DeBERTa, ModernBERT and others",
            target="emloc_encoder.family:EncoderFamily",
            recognises=recognises,
            options={DataOptions: (SplitOptions, LengthOptions)},
            offers=(TRANSFORMERS_MODEL, TRANSFORMER_BLOCKS, IN_FEW_BITS),
        )
    ]
