"""EMLoC for vision-language models.

Importing this package lets `AutoModelForImageTextToText.from_pretrained` load an emulator.
"""

from emloc.integrations.transformers import quantizer

__version__ = "0.1.0"

__all__ = ["quantizer"]
