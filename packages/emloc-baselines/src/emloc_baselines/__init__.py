"""The methods that EMLoC is compared with, and the bench that compares.

Importing this package lets transformers load pruned models (`emloc_baselines.pruned_format`).
"""

from emloc_baselines import pruned_format

__version__ = "0.1.0"

__all__ = ["pruned_format"]
