"""What EMLoC is compared with, and the bench that compares."""

__version__ = "0.1.0"
