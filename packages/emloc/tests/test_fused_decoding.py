"""Decoding in one pass: the kernel in Triton's interpreter against torch's operations, and without Triton."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from emloc.formats.coded_matrix import CodedMatrix
from emloc.formats.trellis_matrix import TrellisMatrix
from emloc.layers import fused_decoding
from emloc.layers.coded_weight import CodedWeight
from emloc.layers.trellis_weight import TrellisWeight
from emloc.linalg.row_rounding import rounded_parts
from emloc.testing import pretend_device

KERNEL = "emloc.layers.triton_decoding"

SHAPES = [(3, 576), (2, 100), (3, 1), (2, 1100)]
"""Rows and columns: of whole groups, of a shorter last one, of one number, and of more than one program."""


def coded(rows: int, columns: int, bits: int, group_size: int) -> CodedWeight:
    """A random weight on its grid."""
    draw = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=draw)
    matrix = CodedMatrix(rows, columns, bits, group_size)
    parts = [matrix.encoded(grid, codes) for grid, codes in rounded_parts(weight, bits, group_size)]
    stored = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return matrix.decoded(stored.__getitem__)


def along_a_trellis(rows: int, columns: int, bits: int, group_size: int) -> TrellisWeight:
    """A weight of random codes."""
    draw = torch.Generator().manual_seed(rows)
    matrix = TrellisMatrix(rows, columns, bits, group_size)
    stored = {
        name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
        if kind == torch.uint8
        else torch.rand(shape, generator=draw).view(torch.int32)
        for name, (shape, kind) in matrix.stored()
    }
    return matrix.decoded(stored.__getitem__)


def check_the_kernels() -> int:
    """Compare the kernels with torch's operations, bit for bit, where Triton is; returns how many."""
    compared = 0
    from emloc.layers.triton_decoding import decode, decode_trellis

    for bits, group_size in ((2, 32), (3, 64), (4, 128), (8, 32)):
        for rows, columns in SHAPES:
            weight = coded(rows, columns, bits, group_size)
            dtype = torch.float32 if bits == 3 else torch.float16
            into = torch.full((rows, columns), float("nan"), dtype=dtype)
            fused_decoding.launch(decode, weight, into)
            assert torch.equal(into, weight.dense(dtype)), (bits, group_size, rows, columns)
            compared += 1
    for bits, group_size in ((1, 32), (2, 128), (3, 64), (4, 128)):
        for rows, columns in [(9, 100), (66, 20)]:
            weight = along_a_trellis(rows, columns, bits, group_size)
            into = torch.full((rows, columns), float("nan"), dtype=torch.float16)
            fused_decoding.launch_trellis(decode_trellis, weight, into)
            assert torch.equal(into, weight.dense(torch.float16)), (bits, rows, columns)
            compared += 1
    return compared


def test_the_kernels_give_the_same_numbers(in_triton):
    assert in_triton(__file__, "check_the_kernels") == 24


@pytest.fixture
def cuda_build(monkeypatch):
    """A pretended device in a build that says that it is CUDA's, with a Triton that `problem` decides on."""
    problems = []

    def launch(kernel, weight, into):
        if problems:
            raise problems[-1]
        for start, part in weight._parts():
            into[start : start + len(part)] = part

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(fused_decoding, "launch", launch)
    monkeypatch.setattr(fused_decoding, "launch_trellis", launch)
    monkeypatch.setitem(
        sys.modules, KERNEL, SimpleNamespace(decode=object(), decode_trellis=object())
    )
    fused_decoding._kernels.cache_clear()
    with pretend_device():
        yield problems
    fused_decoding._kernels.cache_clear()


@pytest.mark.parametrize(
    "problem",
    [
        RuntimeError("Failed to find C compiler\nmore"),
        subprocess.CalledProcessError(1, "gcc"),
        AssertionError(""),
    ],
    ids=repr,
)
def test_where_the_kernel_cannot_run_torch_decodes(cuda_build, capsys, problem):
    """Once with a warning: no compiler, none of Python's headers, no library of the driver's."""
    weight = coded(5, 100, 3, 32)
    expected = weight.dense(torch.float32)
    there = weight.to(torch.device("cuda"))
    cuda_build.append(problem)
    assert torch.equal(there.dense(torch.float32).cpu(), expected)
    assert torch.equal(there.dense(torch.float32).cpu(), expected)
    assert capsys.readouterr().err.count("Triton cannot run here") == 1


def test_a_lack_of_memory_stays_one(cuda_build):
    there = coded(5, 100, 3, 32).to(torch.device("cuda"))
    cuda_build.append(torch.cuda.OutOfMemoryError("no room"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        there.dense(torch.float32)
    cuda_build.clear()
    assert fused_decoding.decode_at_once(there, torch.empty(5, 100, device="cuda"))
    cuda_build.append(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        there.dense(torch.float32)


def test_a_weight_is_decoded_into_memory_that_is_there():
    weight = coded(5, 100, 3, 32)
    into = torch.empty(5, 100, dtype=torch.float64)
    assert weight.dense(torch.float64, into) is into
    assert torch.equal(into, weight.dense(torch.float64))
