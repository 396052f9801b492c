"""EMLoC for models of the kind encoder.

Importing it lets transformers' `from_pretrained` load an emulator.
"""

from emloc_encoder.family import EncoderFamily

__all__ = ["EncoderFamily"]
