"""Models without weights: parameters on the meta device, real buffers."""

import contextlib
from collections.abc import Iterator

from accelerate import init_empty_weights

from emloc.machine.memory import streaming_memory


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Have the parameters of models that are made inside of the block on the meta device.

    Each is allocated before it goes there, untouched, and leaves a hole in the heap if it came from it; a
    model's worth of holes would then keep what a stage frees. Buffers (rotary frequencies and the like) stay
    real, since no checkpoint stores them.
    """
    with streaming_memory(), init_empty_weights(include_buffers=False):
        yield
