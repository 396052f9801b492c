"""The plugin's entry point: says what it offers and imports nothing heavy.

It is a module beside `emloc_llm` and not inside, because importing `emloc_llm` registers the emulator
format with transformers, which takes seconds, and `emloc --help` must not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from emloc.plugin import (
    IN_FEW_BITS,
    TEXT_OPTIONS,
    TRANSFORMER_BLOCKS,
    TRANSFORMERS_MODEL,
    EvaluateConfig,
    FamilyEntry,
    TaskOptions,
    hookimpl,
)

_ENDINGS = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "BertGenerationDecoder")


def is_causal_lm(config: Mapping[str, Any]) -> bool:
    """Return whether a parsed `config.json` names a causal language model."""
    names: Any = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(_ENDINGS) for name in names)


@hookimpl
def emloc_register_families() -> Sequence[FamilyEntry]:
    """Causal language models."""
    return [
        FamilyEntry(
            name="llm",
            summary="causal language models of transformers (AutoModelForCausalLM)",
            target="emloc_llm.family:LLMFamily",
            recognises=is_causal_lm,
            options={
                **TEXT_OPTIONS,
                EvaluateConfig: (*TEXT_OPTIONS[EvaluateConfig], TaskOptions),
            },
            offers=(TRANSFORMERS_MODEL, TRANSFORMER_BLOCKS, IN_FEW_BITS),
        )
    ]
