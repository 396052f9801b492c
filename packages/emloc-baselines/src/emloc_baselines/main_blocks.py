"""The blocks of a model's main stack: a decoder of text without the towers beside it, or an encoder."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn


def main_blocks(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Select the `blocks` that lie in what transformers calls the model's decoder; of an encoder, all."""
    decoder = cast(Any, model).get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    prefix = f"{name}." if name else ""
    return [block for block in blocks if block.startswith(prefix)]
