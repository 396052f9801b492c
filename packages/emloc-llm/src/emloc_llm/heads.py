"""Heads that are more than a weight: TRL's way to a loss, by the head's weight alone, is not theirs.

Training finds out by itself (`emloc_llm.training`); a plan has nothing to compare and goes by these.
"""

HEADS_OF_THEIR_OWN = frozenset(
    {
        "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "inkling_text", "llama4_text",
        "megatron-bert", "modernbert-decoder", "recurrent_gemma", "rembert", "roberta",
        "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
    }
)  # fmt: skip
"""Types of models, as `model_type` of their text's config has it."""
