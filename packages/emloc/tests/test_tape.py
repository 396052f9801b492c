"""Sizes on a tape against the same layers in torch, counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tape_reference import ROWS, WIDTH, counted, sized
from torch import nn
from torch.utils.checkpoint import checkpoint

from emloc.layers.low_rank_linear import LowRankLinear
from emloc.planning.operations import Forward, Layer
from emloc.planning.step import Precision, StepTape
from emloc.planning.tape import Tape

LAYERS = {
    "activation": (nn.functional.silu, lambda f, x: f.activation(x)),
    "layer_norm": (lambda x: nn.functional.layer_norm(x, [WIDTH]), lambda f, x: f.layer_norm(x, WIDTH)),
    "slice": (lambda x: x[:7] * 2, lambda f, x: f.new(f.slice(x, 7 * WIDTH))),
    "split": (
        lambda x: torch.mul(*x.chunk(2)),
        lambda f, x: f.mul(*f.split(x, [x.numel // 2] * 2)),
    ),
    "cat": (
        lambda x: torch.cat([x.exp(), x.exp()]).exp(),
        lambda f, x: _exp(f, f.cat(_exp(f, x), _exp(f, x))),
    ),
    "added_twice": (
        lambda x: x + x.exp() + x.exp().exp(),
        lambda f, x: f.add(f.add(x, _exp(f, x)), _exp(f, _exp(f, x))),
    ),
}  # fmt: skip


def _exp(forward, x):
    out = forward.tape.new(x.numel, x.itemsize)
    return forward.tape.operation([x], out, [out])


@pytest.mark.parametrize("name", LAYERS)
def test_operations(name):
    real, planned = LAYERS[name]
    assert sized(planned, (ROWS, WIDTH)) == counted(real, (ROWS, WIDTH))


def test_attention():
    attention = nn.functional.scaled_dot_product_attention
    head = 6
    shapes = [(2, 4, 9, head)] * 3
    planned = sized(lambda f, *x: f.attention(*x, head=head), *shapes)
    real = counted(attention, *shapes)
    assert planned[:2] == real[:2]
    # Gradients of leaves are copied into the leaves' own layout; within a model there are none.
    assert planned[2] < real[2] < planned[2] + 4 * 2 * 4 * 9 * head


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_linear_layers_with_factors(rank, dtype, itemsize):
    made = nn.Linear(WIDTH, 33, dtype=dtype)
    if rank:
        made = LowRankLinear(WIDTH, 33, rank, True, dtype)
    real = counted(made.requires_grad_(False), (ROWS, WIDTH), dtype=dtype)
    layer = Layer(WIDTH, 33, rank, "x", 1)
    assert sized(lambda f, x: f.linear(x, layer), (ROWS, WIDTH), itemsize=itemsize) == real


@pytest.mark.parametrize("rank", [None, 5])
def test_frozen_convolutions_keep_their_input(rank):
    from emloc.layers.low_rank_conv import LowRankConv2d

    conv = nn.Conv2d(8, 12, 3, stride=2, padding=1)
    if rank:
        conv = LowRankConv2d.like(conv, rank)
    real = counted(conv.requires_grad_(False), (2, 8, 10, 10))
    layer = Layer(72, 12, rank, channels=8)
    assert sized(lambda f, x: f.conv(x, layer, 2 * 25), (2, 8, 10, 10)) == real


def block(forward, x):
    return [forward.add(x, _exp(forward, forward.activation(x)))]


def test_a_block_run_twice():
    def run(x):
        for _ in range(3):
            x = checkpoint(lambda x: x + nn.functional.silu(x).exp(), x, use_reentrant=False)
        return x

    def planned(forward, x):
        for _ in range(3):
            [x] = forward.tape.checkpoint(lambda x: block(forward, x), x)
        return x

    after, forward_peak, backward_peak = counted(run, (ROWS, WIDTH))
    rng = 3 * torch.get_rng_state().numel()  # checkpoint keeps torch's generator
    planned = sized(planned, (ROWS, WIDTH))
    assert after - rng <= planned[0] <= after
    assert planned[1] == pytest.approx(forward_peak, abs=rng)
    assert planned[2] == pytest.approx(backward_peak, abs=rng)


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(0, 12),
    width=st.integers(1, 40),
    twice=st.booleans(),
    learns=st.booleans(),
    wanted=st.booleans(),
)
def test_repeated_blocks_count_as_each_by_itself(depth, width, twice, learns, wanted):
    """Largest moments forward and back, and what is alive in between."""

    def layers(forward, x):
        layer = Layer(width, width, lora_rank=2 if learns else 0)
        return [forward.add(x, forward.activation(forward.linear(x, layer)))]

    def moments(stack):
        forward = Forward(StepTape(), Precision(4))
        tape = forward.tape
        x = tape.new(ROWS * width, 4)
        x = tape.wanting_gradient(x) if wanted else x

        def run(x):
            return layers(forward, x)

        x = stack(tape, (lambda x: tape.checkpoint(run, x)) if twice else run, x)
        found = [tape.now, tape.peak]
        tape.peak = tape.now
        if x.key is not None:
            tape.backward(x)
        return [*found, tape.peak]

    def one_by_one(tape, run, x):
        for _ in range(depth):
            [x] = run(x)
        return x

    repeated = moments(lambda tape, run, x: tape.repeat(run, depth, [x])[0])
    assert repeated == moments(one_by_one)


def test_nothing_is_left_alive():
    tape = Tape()
    x = tape.wanting_gradient(tape.new(10, 4))
    x = tape.operation([x], tape.new(10, 4), [x])
    tape.backward(x)
    del x
    assert tape.now == 0
