"""Host memory that a GPU copies from while it computes.

torch's own pinned memory comes in powers of two, so that a model's weights would take up to twice their size.
Here large tensors get the pages that they need, which CUDA is told of.
"""

import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

PAGE = 4096
LARGE = 1 << 20
"""Bytes from which on a tensor gets pages of its own."""


def to_pinned(tensor: Tensor) -> Tensor:
    """A copy of a GPU's tensor in torch's pool of pinned memory, which is there in the order of the stream.

    The host may not read it before the stream is done; copies back to the GPU in the same stream may.
    """
    room = torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)
    return room.copy_(tensor.detach(), non_blocking=True)


def pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, for as long as the process needs it; in ordinary memory if CUDA refuses.

    Copies from ordinary memory give the same values, and the processor waits for them.
    """
    size = tensor.numel() * tensor.element_size()
    if size < LARGE:
        return tensor.cpu().contiguous().pin_memory()
    room = torch.empty(-(-size // PAGE) * PAGE + PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % PAGE
    pages = room[start : start + -(-size // PAGE) * PAGE]
    made = pages[:size].view(tensor.dtype).view(tensor.shape)
    made.copy_(tensor)
    runtime: Any = torch.cuda.cudart()
    address = pages.data_ptr()
    if int(runtime.cudaHostRegister(address, pages.numel(), 0)) == 0:
        weakref.finalize(made, runtime.cudaHostUnregister, address).atexit = False
    else:
        # The refusal stays CUDA's last error, and a kernel would raise it: this one, and not the next.
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda").add_(1)
    return made
