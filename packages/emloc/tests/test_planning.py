"""The planner's own arithmetic, without a model."""

from dataclasses import replace

import pytest
import torch
from optimizer_reference import OPTIMISED, held_after_a_step
from pydantic import BaseModel, ValidationError

from emloc.formats.layer_format import GroupShape, tensor_bytes
from emloc.formats.low_rank import low_rank
from emloc.formats.low_rank_bytes import factorise_bytes
from emloc.linalg.gram import Moments
from emloc.linalg.lowrank import factorise
from emloc.options.amounts import Bytes
from emloc.planning.calls import Calls
from emloc.planning.ledger import StageMemory, largest, lines_of, total
from emloc.planning.live import LiveBytes
from emloc.planning.qlora import quantised_bytes
from emloc.planning.step import Passing
from emloc.planning.streaming import moment_bytes
from emloc.planning.training import optimizer_bytes


class Amount(BaseModel):
    memory: Bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 << 30), ("24GB", 24 * 10**9), ("24g", 24 << 30), ("24G", 24 << 30),
     ("1.5 GiB", 3 << 29), ("512MiB", 512 << 20), ("80MB", 80 * 10**6), ("1000", 1000),
     (1000, 1000), ("2tib", 2 << 40)],
)  # fmt: skip
def test_amounts_of_memory(text, count):
    assert Amount(memory=text).memory == count


@pytest.mark.parametrize("text", ["24 apples", "GiB", "-3GiB", "0", 0, "", "24GiBB", True])
def test_other_texts_are_no_amounts(text):
    with pytest.raises(ValidationError, match="expected an amount of memory such as 24GiB"):
        Amount(memory=text)


def test_lines_add_up():
    lines = lines_of(weights=5, suspended_calls=7, nothing=0)
    assert lines == {"weights": 5, "suspended calls": 7}
    assert largest([{"a": 3}, lines, {}]) is lines
    shown = StageMemory(lines, {}, {"adapter": 2}).as_json()
    assert shown["device_bytes"] == {"total": 12, "lines": lines}
    assert shown["disk_bytes"]["total"] == total({"adapter": 2})


SHAPES = [(24, 90, 7), (90, 24, 7), (60, 60, 20), (300, 1100, 100), (1100, 1300, 200),
          (1500, 1100, 200)]  # fmt: skip
"""d_out, d_in, rank: both sides, eigenproblems below and above the limit of dense ones."""


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("d_out", "d_in", "rank"), SHAPES)
def test_factorising_takes_what_is_planned(side, d_out, d_in, rank):
    """Counted operation by operation; LAPACK's own workspace is planned besides."""
    weight = torch.randn(d_out, d_in)
    moments = Moments(side, "layer")
    tokens = torch.randn(2 * max(d_in, d_out), d_in)
    moments.fold(tokens if side == "input" else tokens @ weight.T)
    shape = GroupShape(("layer",), (d_out,), d_in)
    assert moment_bytes(side, shape, 4) == moments.matrix.untyped_storage().nbytes()
    with LiveBytes() as live:
        live.mark([weight, moments.matrix], "given")
        before = live.now
        found = factorise(weight, moments, rank)
        made = live.peak.total - before
    assert tensor_bytes(shape, low_rank(rank), 4) == (found.left.numel() + found.right.numel()) * 4
    planned = factorise_bytes(side, shape, rank, 4)
    assert made <= planned
    assert planned <= 2.5 * made + 3 * min(d_out, d_in) ** 2 * 8


KINDS = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD}


@pytest.mark.parametrize("optim", KINDS)
def test_optimisers_hold_what_is_planned(optim):
    parameters = [torch.nn.Parameter(torch.zeros(*shape)) for shape in OPTIMISED]
    held = held_after_a_step(KINDS[optim](parameters, lr=0.1), parameters)
    assert optimizer_bytes(optim, OPTIMISED, 4) == pytest.approx(held, abs=4 * 8 * len(OPTIMISED))


def test_prodigy_and_eight_bits():
    shapes = [(64, 128), (5, 10)]
    assert optimizer_bytes("prodigy", shapes, 4) == pytest.approx(16 * (64 * 128 + 50), abs=16)
    eight = optimizer_bytes("adamw_8bit", shapes, 4)
    assert eight == 2 * (64 * 128 + 32 * 4) + (2 * 50 * 4 + 4)  # the small one stays in 32 bits


def test_nf4_as_bitsandbytes_stores_it():
    """Half a byte per weight and an eighth of a bit of scales, for a layer of 4096 × 4096."""
    numel = 4096 * 4096
    bits = 8 * quantised_bytes(numel) / numel
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.001)


def test_calls_wait_in_memory_that_comes_in_powers_of_two():
    """The suspended calls of a device are in torch's pinned memory, which comes so."""
    block = [Passing(before=5 << 20, peak=9 << 20, after=3 << 20)]
    calls = Calls(7, 0, 10, {"block": block}, 0, 0, parked=True)
    assert calls.waiting == 7 * (8 << 20)
    assert replace(calls, blocks={"block": [Passing(0, 0, 0)]}).waiting == 0
    assert replace(calls, parked=False).waiting == 0
