"""The layers that transformers loads in few bits where it is given a `BitsAndBytesConfig`."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module


def layers_in_few_bits(model: Any, skip: Sequence[str] | None) -> list[str]:
    """Names of the linear layers that `replace_with_bnb_linear` replaces.

    Args:
        skip: `llm_int8_skip_modules`; None: the output head, what is tied to it and the last module.
    """
    left = HfQuantizer.get_modules_to_not_convert(
        model, None if skip is None else list(skip), getattr(model, "_keep_in_fp32_modules", None)
    )
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, left)
    ]
