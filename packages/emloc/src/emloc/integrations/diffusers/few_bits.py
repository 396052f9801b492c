"""The layers that diffusers loads in few bits where it is given a `BitsAndBytesConfig`, on any device."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
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


@contextmanager
def four_bits_anywhere(device: str) -> Generator[None]:
    """Let diffusers load in four bits on a CPU, which it refuses though bitsandbytes computes there.

    Only its check of the machine is left out, and only for that long.
    """
    from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    name = "bitsandbytes_4bit"
    own: Any = AUTO_QUANTIZER_MAPPING[name]

    def unchecked(*_: Any, **__: Any) -> None:
        pass

    if device == "cpu":
        kind: Any = type(own.__name__, (own,), {"validate_environment": unchecked})
        AUTO_QUANTIZER_MAPPING[name] = kind
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[name] = own
