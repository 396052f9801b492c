"""Options about a base that bitsandbytes held in few bits while a LoRA was trained, as transformers calls
them.
"""

from typing import Literal

from pydantic import Field

from emloc.options.base import StageConfig
from emloc.options.types import Names

QuantType = Literal["nf4", "fp4"]


class FewBitsOptions(StageConfig):
    """Without any: as the config of the model that the adapter names says, and else NF4, doubly quantised."""

    load_in_4bit: bool = Field(
        False, description="the adapter was trained on the base in 4 bits, not on an emulator"
    )
    load_in_8bit: bool = Field(
        False, description="the adapter was trained on the base in 8 bits, not on an emulator"
    )
    bnb_4bit_quant_type: QuantType | None = Field(
        None,
        description="data type of the 4-bit base: nf4, fp4; by default as its config says, or nf4",
    )
    bnb_4bit_use_double_quant: bool | None = Field(
        None,
        description="whether the 4-bit base was doubly quantised; by default as its config says, or "
        "true",
    )
    llm_int8_skip_modules: Names | None = Field(
        None, description="layers that were not quantised, as in BitsAndBytesConfig"
    )


FEW_BITS = tuple(FewBitsOptions.model_fields)
"""Names of these options."""
