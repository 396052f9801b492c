"""A process held to an amount of memory: in a process of its own, as a limit on this one would bite all."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from emloc.errors import EmlocError, MemoryLimitError
from emloc.machine.memory import PeakMemory
from emloc.machine.memory_limit import CUDA_CONTEXT, can_limit, is_out_of_memory, limit_memory

BEGIN = """
import numpy, torch
from emloc.errors import MemoryLimitError
from emloc.machine.memory import PeakMemory, anonymous_bytes
MIB = 1 << 20
"""

BEYOND = """
with PeakMemory(limit=100 * MIB) as peak:
    kept = torch.ones(50 * MIB // 4)
print("held", peak.peak_bytes // MIB)
del kept
try:
    kept = []
    with PeakMemory(limit=100 * MIB) as peak:
        for _ in range(8):
            kept.append(make())
except MemoryLimitError as problem:
    print(peak.peak_bytes // MIB, problem)
kept = torch.ones(400 * MIB // 4)
print("lifted", kept.numel() * 4 // MIB)
"""


@pytest.mark.parametrize(
    "make",
    ["torch.ones(40 * MIB // 4)", "numpy.ones(40 * MIB, dtype='int8')", "bytearray(40 * MIB)"],
)
def test_an_allocation_beyond_the_limit_fails_and_the_limit_is_lifted(make):
    assert can_limit("cpu")
    code = f"{BEGIN}\nmake = lambda: {make}\n{BEYOND}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    within, beyond, lifted = done.stdout.splitlines()
    assert 45 <= int(within.split()[1]) <= 60
    held, said = beyond.split(" ", 1)
    assert 70 <= int(held) <= 105
    assert "It needs more than memory=100.0 MiB: it held " in said
    assert lifted == "lifted 400"


def test_other_errors_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), PeakMemory(limit=1 << 40):
        raise ZeroDivisionError("of another kind")
    assert issubclass(MemoryLimitError, EmlocError)
    assert issubclass(MemoryLimitError, MemoryError)


@pytest.mark.parametrize(
    "problem",
    [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("std::bad_alloc"),
     RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
     torch.OutOfMemoryError("CUDA out of memory.")],
)  # fmt: skip
def test_failed_allocations_are_known_also_under_other_errors(problem):
    def read():
        try:
            raise problem
        except type(problem) as cause:
            raise ValueError("shard is corrupt") from cause

    assert is_out_of_memory(problem)
    with pytest.raises(ValueError, match="shard") as outer:
        read()
    assert is_out_of_memory(outer.value)
    assert not is_out_of_memory(ValueError("shard is corrupt"))


def test_on_a_gpu_the_allocator_gets_what_the_context_leaves(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30)
    )
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, device: asked.append((share, device)),
    )
    lift = limit_memory("cuda:1", 24 << 30)
    assert asked == [(((24 << 30) - CUDA_CONTEXT) / (80 << 30), "cuda:1")]
    lift()
    assert asked[-1] == (1.0, "cuda:1")
    limit_memory("cuda:1", 200 << 30)
    assert asked[-1] == (1.0, "cuda:1")
