"""The question whether kernels of Triton run here, asked by running them once."""

from collections.abc import Callable

import torch


def why_not(attempt: Callable[[], None]) -> str | None:
    """Run kernels on the current GPU; returns the first line of what they raised, None where they ran.

    Raises:
        RuntimeError: the GPU has not the memory to find out, or met an error before.
    """
    torch.cuda.synchronize()  # an error that was there before is not Triton's
    try:
        attempt()
        torch.cuda.synchronize()
    except Exception as problem:  # of Triton, of the compiler that it calls, of what that writes
        if isinstance(problem, torch.OutOfMemoryError) or "out of memory" in str(problem).lower():
            raise
        return (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return None
