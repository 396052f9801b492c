"""Families of one's own for tests, by name, with the plugin module of each."""

from contextlib import AbstractContextManager, nullcontext

from emloc.testing import plugin_installed

OWN = {
    "classifier": "classifier_family",
    "text-to-text": "seq2seq_family",
    "text-to-text-bart": "seq2seq_family",
}


def installed(name: str) -> AbstractContextManager[None]:
    """Have a family's plugin discovered, where it is one of these."""
    return plugin_installed(OWN[name]) if name in OWN else nullcontext()
