"""Load a model, or an emulator of one, and its tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from emloc.errors import CheckpointError


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model's folder, with a padding token.

    Raises:
        CheckpointError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as problem:
        raise CheckpointError(
            f"{path} has no tokenizer that transformers can read; copy tokenizer.json and "
            f"tokenizer_config.json of the model there."
        ) from problem
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(path: Path, auto_class: Any, dtype: str, device: str) -> Any:
    """A model or an emulator, its weights on `device`.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    try:
        return auto_class.from_pretrained(
            path, dtype=dtype, device_map={"": device}, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as problem:
        first = str(problem).strip().splitlines()[0]
        raise CheckpointError(f"{path} cannot be loaded: {first}") from problem
