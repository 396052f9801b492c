"""The layers that diffusers loads in few bits where it is given a `BitsAndBytesConfig`."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def layers_in_few_bits(model: Any, skip: Sequence[str] | None) -> list[str]:
    """Names of the linear layers that its `replace_with_bnb_linear` replaces; convolutions stay.

    Args:
        skip: `llm_int8_skip_modules`; unlike transformers, diffusers leaves nothing by itself.
    """
    left = [*(skip or ()), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] not in left
        and not any(f"{key}." in name or key == name for key in left)
    ]
