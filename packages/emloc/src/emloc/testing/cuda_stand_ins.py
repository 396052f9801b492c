"""Stand-ins for the parts of `torch.cuda` that libraries ask, while a pretend device is there.

Kept few: what is not here fails as in a build of torch without CUDA. All streams are one, in the order of the
calls, there are no events, and random numbers are the host's.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from emloc.testing.cuda_claim import claim_cuda
from emloc.testing.device_storage import DEVICE
from emloc.testing.traffic import Traffic

MEMORY = 24 << 30
"""Bytes that the device says to have."""


@contextmanager
def cuda_stand_ins(traffic: Traffic) -> Iterator[None]:
    """Let `torch.cuda` answer for one device while inside.

    Raises:
        RuntimeError: there is a real CUDA device, which would be taken for the pretended one.
    """
    if torch.cuda.is_available():
        raise RuntimeError("a CUDA device is here; hide it with CUDA_VISIBLE_DEVICES=''")
    card = _Card(traffic)
    with ExitStack() as stack:
        for name in (name for name in vars(_Card) if not name.startswith("__")):
            stack.enter_context(patch.object(torch.cuda, name, getattr(card, name)))
            if name in vars(torch.cuda.random):
                stack.enter_context(patch.object(torch.cuda.random, name, getattr(card, name)))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        stack.enter_context(claim_cuda())
        yield


class _Card:
    """Functions of `torch.cuda`, by its names."""

    def __init__(self, traffic: Traffic) -> None:
        self.__traffic = traffic
        self.__properties = SimpleNamespace(
            name="pretend device", total_memory=MEMORY, major=8, minor=0, multi_processor_count=1
        )

    def _lazy_init(self) -> None: ...

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...

    def device(self, device: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self, device: Any = None) -> None:
        self.__traffic.synchronize()

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return self.__properties

    def get_device_name(self, device: Any = None) -> str:
        return self.__properties.name

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return self.__properties.major, self.__properties.minor

    def memory_allocated(self, device: Any = None) -> int:
        return self.__traffic.live_bytes

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.__traffic.peak_bytes

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.__traffic.reset_peak()

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return MEMORY - self.__traffic.live_bytes, MEMORY

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        self.__traffic.limit = None if fraction >= 1 else int(fraction * MEMORY)

    def empty_cache(self) -> None: ...

    def Stream(self, device: Any = None) -> SimpleNamespace:
        return _STREAM

    def current_stream(self, device: Any = None) -> SimpleNamespace:
        return _STREAM

    def stream(self, stream: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def cudart(self) -> SimpleNamespace:
        return SimpleNamespace(cudaHostRegister=_succeed, cudaHostUnregister=_succeed)

    # `torch.manual_seed` sets the host's generator, which is drawn from.
    def manual_seed(self, seed: int) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    def get_rng_state_all(self) -> list[Tensor]:
        return [torch.get_rng_state()]

    def set_rng_state_all(self, new_states: Sequence[Tensor]) -> None:
        torch.set_rng_state(new_states[0])


def _succeed(*_: Any) -> int:
    return 0


_STREAM = SimpleNamespace(wait_stream=_succeed)
_host_generator = torch.Generator


class _Generator(torch.Generator):
    """A generator that says that it is the device's and draws what the host's would."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type == "cpu":
            return _host_generator()
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None: ...

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return DEVICE
