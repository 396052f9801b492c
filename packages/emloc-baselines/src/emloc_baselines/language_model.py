"""The blocks of the language model, where a model has towers beside it; of an encoder all."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn


def decoder_blocks(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Select the `blocks` that lie in what transformers calls the model's decoder."""
    decoder = cast(Any, model).get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    prefix = f"{name}." if name else ""
    return [block for block in blocks if block.startswith(prefix)]
