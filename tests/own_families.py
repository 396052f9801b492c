"""Families of one's own for tests, by name, with the plugin module of each."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from emloc.testing import plugin_installed

ENCODER = Path(__file__).parent.parent / "examples/plugins/emloc-encoder/src"

OWN = {
    "classifier": "classifier_family",
    "text-to-text": "seq2seq_family",
    "text-to-text-bart": "seq2seq_family",
}


@contextmanager
def encoders() -> Iterator[None]:
    """Have the encoders of `examples/plugins` discovered."""
    sys.path.insert(0, str(ENCODER))
    try:
        with plugin_installed("emloc_encoder_hooks"):
            yield
    finally:
        sys.path.remove(str(ENCODER))


def installed(name: str) -> AbstractContextManager[None]:
    """Have a family's plugin discovered, where it is one of these."""
    return plugin_installed(OWN[name]) if name in OWN else nullcontext()
