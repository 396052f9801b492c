"""A CUDA device that is none, for tests on machines without one.

    with pretend_device() as card:
        model.to("cuda")                      # tensors on cuda:0, whose values are on the host
        loss(model(x.to("cuda"))).backward()
    assert card.to_host.count == 0

Inside, `torch.cuda.is_available()`, tensors may be made on and moved to `cuda`, and every operation of torch
that would fail on CUDA for its tensors' devices fails with CUDA's error: two devices mixed, `numpy()` of a
tensor of the device, `pin_memory()` of one. Transfers with their bytes, values read and the bytes that live
on the device are counted (`Traffic`). Results are the CPU's, bit for bit.

Libraries look for CUDA when they are imported, so import them before, as a program without a GPU would.

It does not see kernels (what CUDA has not implemented, other numerics, dtypes that it refuses), streams and
races, the allocator (rounding, fragmentation, workspaces), or what happens without torch.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emloc.testing.cuda_stand_ins import cuda_stand_ins
from emloc.testing.device_calls import Calls
from emloc.testing.device_operations import operate
from emloc.testing.traffic import Traffic


@contextmanager
def pretend_device() -> Iterator[Traffic]:
    """Have a device `cuda:0` in this thread, and in pools of threads, while inside; yields its counts.

    Raises:
        RuntimeError: there is a real one.
    """
    traffic = Traffic()
    with (
        cuda_stand_ins(traffic),
        _pretending(traffic),
        patch.object(ThreadPoolExecutor, "submit", _submitting(traffic)),
    ):
        yield traffic


@contextmanager
def _pretending(traffic: Traffic) -> Iterator[None]:
    """The state of one thread: the modes, and that its autograd starts no others."""
    with _Operations(traffic), Calls(), torch.autograd.set_multithreading_enabled(False):
        yield


def _submitting(traffic: Traffic) -> Callable[..., Any]:
    submit = ThreadPoolExecutor.submit

    def submit_pretending(
        pool: ThreadPoolExecutor, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        return submit(pool, _pretending(traffic)(call), *args, **kwargs)

    return submit_pretending


class _Operations(TorchDispatchMode):
    """Run every operation below autograd as the device does."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # then torch leaves composed operations whole
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        return operate(self._traffic, func, args, kwargs)
