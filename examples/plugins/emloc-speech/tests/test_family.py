"""The contract of every family: the whole method on a tiny model, promise by promise."""

from emloc.testing import FamilyContract


class TestSpeech(FamilyContract):
    family = "speech"
    plugin = "emloc_speech_hooks"
