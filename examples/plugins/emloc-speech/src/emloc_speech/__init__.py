"""EMLoC for Whisper, which writes down what it hears.

Importing it lets transformers' `from_pretrained` load an emulator.
"""

from emloc_speech.family import SpeechFamily

__all__ = ["SpeechFamily"]
