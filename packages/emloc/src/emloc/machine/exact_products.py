"""Products of float32 in float32: by default torch lets GPUs round what convolutions multiply to 10 bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """Do without TF32 inside, whatever is set, and leave what was set afterwards."""
    backends: Any = torch.backends
    places: list[Any] = [backends.cuda.matmul, backends.cudnn]
    name, rounded, exact = "allow_tf32", {True}, False
    try:
        before = [getattr(place, name) for place in places]
    except RuntimeError:  # set by the newer names, after which the older ones are not to be used
        places = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        name, rounded, exact = "fp32_precision", {"tf32"}, "ieee"
        before = [getattr(place, name) for place in places]
    changed = [(place, value) for place, value in zip(places, before) if value in rounded]
    try:
        for place, _ in changed:
            setattr(place, name, exact)
        yield
    finally:
        for place, value in changed:
            setattr(place, name, value)
