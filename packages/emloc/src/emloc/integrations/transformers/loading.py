"""Load a model, or an emulator of one, and its tokenizer."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.read_errors import reading
from emloc.artefacts.whole_weights import require_whole
from emloc.errors import CheckpointError
from emloc.integrations.transformers.skeleton import empty_model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model's folder, with a padding token.

    Raises:
        CheckpointError: there is none.
    """
    hint = "copy tokenizer.json and tokenizer_config.json of the model there"
    with reading(path, "has no tokenizer that transformers can read", hint):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    longest = getattr(tokenizer, "model_max_length", None)
    if longest is not None and not isinstance(longest, (int, float)):
        raise CheckpointError(
            f"The tokenizer of {path} has model_max_length = {str(longest)[:60]!r}, which is not a number; "
            f"correct it in its tokenizer_config.json."
        )
    give_padding(tokenizer, path)
    return tokenizer


def give_padding(tokenizer: Any, path: Path) -> None:
    """Pad with the end of a text, or with the unknown, where a tokenizer has no padding of its own.

    Raises:
        CheckpointError: it has none of the three.
    """
    if tokenizer.pad_token_id is not None:
        return
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"The tokenizer of {path} has neither pad_token, eos_token nor unk_token, so nothing can be "
            f"padded or ended; set them in its tokenizer_config.json."
        )


def load_model(checkpoint: Checkpoint, auto_class: Any, dtype: str, device: str) -> Any:
    """A model or an emulator, its weights on `device`, in eval mode.

    Args:
        checkpoint: as the class stores it, or a view that says what it would have stored.
        dtype: as torch calls it; `auto`: as stored.

    Raises:
        CheckpointError: transformers cannot load it, or a parameter is in none of its files.
    """
    if checkpoint.translated:
        return _filled(checkpoint, auto_class, dtype, device)
    path = checkpoint.path
    kind: Any = dtype
    # What is stored, as streams read it; transformers' own `auto` is what the config names.
    if dtype == "auto" and "quantization_config" not in checkpoint.config:
        kind = checkpoint.main_dtype
    with reading(path, "cannot be loaded", "check that it is complete"):
        model, report = auto_class.from_pretrained(
            path,
            dtype=kind,
            device_map={"": device},
            trust_remote_code=False,
            output_loading_info=True,
        )
    require_whole(path, report["missing_keys"])
    return model


def _filled(checkpoint: Checkpoint, auto_class: Any, dtype: str, device: str) -> Any:
    """The skeleton with the tensors of a view, one by one."""
    wanted = checkpoint.main_dtype if dtype == "auto" else getattr(torch, dtype)
    model: Any = empty_model(checkpoint, auto_class, wanted)
    for name in checkpoint.tensors:
        owner, _, leaf = name.rpartition(".")
        module, value = model.get_submodule(owner), checkpoint.read(name)
        expected = getattr(module, leaf).shape
        if value.shape != expected:
            raise CheckpointError(
                f"{checkpoint.name}: tensor {name} is {tuple(value.shape)}, its config.json implies "
                f"{tuple(expected)}; config and shards do not belong together."
            )
        if leaf in module._buffers:
            setattr(module, leaf, value.to(device))
        else:
            setattr(module, leaf, nn.Parameter(value.to(device, wanted), requires_grad=False))
    model.tie_weights()
    require_whole(checkpoint.path, [n for n, p in model.named_parameters() if p.is_meta])
    return model.to(device)
