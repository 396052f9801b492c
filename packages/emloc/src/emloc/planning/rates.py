"""Rates at which a device computes and reads, measured once in seconds and kept (`emloc plan --measure`)."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from emloc.artefacts.cache import cache_folder
from emloc.artefacts.json_files import read_json
from emloc.artefacts.small_files import write_json
from emloc.errors import CheckpointError
from emloc.machine.memory import return_large_blocks

NEAR = 1 << 20
"""Bytes of an operation's largest tensor up to which it is taken to stay in the processor's cache."""

FILE_BYTES = 256 << 20
"""Bytes that are written and read back to measure the disk."""


NEVER = 1e18
"""A rate at which nothing takes any time."""


@dataclass(frozen=True)
class Rates:
    """The speed of one device in one dtype.

    Attributes:
        products: multiplications of matrix products, a second.
        thin_products: the same where one side is a LoRA's rank.
        near: bytes that other operations read and write a second, where their tensors are small.
        far: the same where they are large.
        fresh: bytes a second of memory that the system clears before it gives it, as it does on a CPU
            for every tensor of `LARGE_BYTES` or more while a stage runs; on a GPU, it is `NEVER`.
        operation: seconds that an operation takes whatever its size.
        disk: bytes read a second from files that are not in the page cache.
    """

    products: float
    thin_products: float
    near: float
    far: float
    fresh: float
    operation: float
    disk: float


def known_rates(device: str, dtype: torch.dtype) -> Rates | None:
    """The rates that were kept for a device; None before they are measured."""
    path = _place(device, dtype)
    if not path.is_file():
        return None
    try:
        return Rates(**{name: float(value) for name, value in read_json(path).items()})
    except (CheckpointError, TypeError, ValueError):
        return None  # of another version: measured anew when asked for


def measured_rates(device: str, dtype: torch.dtype) -> Rates:
    """Measure, in some seconds, and keep the rates."""
    return_large_blocks()
    wide = torch.randn(1024, 1024, device=device).to(dtype)
    thin = torch.randn(1024, 16, device=device).to(dtype)
    near, far = (torch.ones(count, device=device) for count in (NEAR // 8, 8 << 20))
    small, large = torch.ones_like(near), torch.ones_like(far)
    with torch.no_grad():
        rates = Rates(
            products=1024**3 / _seconds(lambda: wide @ wide, device),
            thin_products=1024 * 1024 * 16 / _seconds(lambda: wide @ thin, device),
            near=3 * near.nbytes / _seconds(lambda: torch.mul(near, near, out=small), device),
            far=3 * far.nbytes / _seconds(lambda: torch.mul(far, far, out=large), device),
            fresh=_fresh(far, large, device),
            operation=_operation(device),
            disk=_disk(),
        )
    place = _place(device, dtype)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, asdict(rates))
    return rates


def _place(device: str, dtype: torch.dtype) -> Path:
    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    threads = "" if device.startswith("cuda") else f"-{torch.get_num_threads()}"
    name = f"{kind}{threads}-{str(dtype).removeprefix('torch.')}".replace(" ", "-").replace(
        "/", "-"
    )
    return cache_folder() / "rates" / f"{name}.json"


def _seconds(call: Callable[[], object], device: str, atleast: float = 0.3) -> float:
    """The median time of calls after a first one: what else the machine does slows training down, too."""
    call()
    _wait(device)
    times: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < atleast or len(times) < 3:
        begun = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return median(times)


def _fresh(far: Tensor, other: Tensor, device: str) -> float:
    """Bytes a second of the time that a new tensor takes longer than one that is there already."""
    if device.startswith("cuda"):
        return NEVER
    new = _seconds(lambda: far * far, device)
    there = _seconds(lambda: torch.mul(far, far, out=other), device)
    return far.nbytes / max(new - there, 1e-9)


def _operation(device: str, layers: int = 50) -> float:
    """Seconds that an operation of a small model takes, its share of Python's and autograd's included."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).to(device)
    x = torch.ones(2, 8, device=device)
    with torch.enable_grad():
        taken = _seconds(lambda: model(x).sum().backward(), device)
    return taken / (6 * layers)  # a product and its transpose, and of the backward as many again


def _disk() -> float:
    """Bytes a second of a file whose pages the system was asked to let go of."""
    with tempfile.NamedTemporaryFile(dir=_folder()) as file:
        block = os.urandom(1 << 20)
        for _ in range(FILE_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.read(1 << 22):
            pass
        return FILE_BYTES / (time.perf_counter() - started)


def _folder() -> Path:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
