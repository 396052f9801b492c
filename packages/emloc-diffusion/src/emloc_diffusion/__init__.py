"""EMLoC for diffusion models of diffusers.

Importing this package lets diffusers load an emulator, as a component or within its pipeline.
"""

from emloc.integrations.diffusers import quantizer

__version__ = "0.1.0"

__all__ = ["quantizer"]
