"""Live bytes against counts by hand, and fake tensors against real ones."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from emloc.planning.live import SAVED, LiveBytes
from emloc.planning.step import Instant, StepSizes
from emloc.planning.trace import (
    Depths,
    count_step,
    extrapolate,
    materialise,
    trace_forward,
    trace_step,
)

KIB = 1024


def test_counts_storages_until_they_are_let_go():
    with LiveBytes() as live:
        a = torch.zeros(256)
        assert live.now == KIB
        view = a.view(16, 16)[1:]
        assert live.now == KIB
        del a
        assert live.now == KIB
        b = view + 1
        assert live.now == KIB + 15 * 64
        del view, b
        assert live.now == 0
    assert live.peak.total == KIB + 15 * 64


def test_phases_have_peaks_of_their_own():
    with LiveBytes() as live:
        with live.phase("small"):
            a = torch.zeros(256)
        with live.phase("large"):
            b = torch.zeros(512)
            del b
        with live.phase("small"):
            pass
        live.mark([a], "weights")
    assert live.phases["small"].total == KIB
    assert live.phases["large"].total == 3 * KIB
    assert live.of("weights") == KIB


def test_what_autograd_keeps_is_told_apart():
    x = torch.zeros(256, requires_grad=True)
    with LiveBytes() as live:
        with live.saving():
            y = (x * 2).exp()  # exp keeps its result, a multiplication by a number nothing
        assert live.of(SAVED) == KIB
        assert live.now == KIB
        y.sum().backward()
        del y
        assert live.now == KIB  # the gradient
    assert x.grad is not None


class Mixed(nn.Module):
    """Linear, normalised, attended, and added up from two sides."""

    def __init__(self, width=24, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        for layer in self.layers:
            q = layer(self.norm(x)).unflatten(-1, (4, -1)).transpose(1, 2)
            attended = nn.functional.scaled_dot_product_attention(q, q, q)
            x = x + attended.transpose(1, 2).flatten(2)
        return x


def loss_of(model, batch):
    squares = model(batch["x"]).square()
    return squares.sum(), squares.numel()


def test_fake_tensors_count_as_real_ones_do():
    batch = {"x": torch.zeros(3, 7, 24)}
    real = count_step(Mixed(), batch, loss_of, autocast=False)
    with torch.device("meta"):
        empty = Mixed()
    fake = trace_step(empty, batch, loss_of, autocast=False)
    assert fake == real
    assert real.largest.kept > 0


def test_a_deep_model_is_counted_from_shallow_ones():
    counted = []

    def count(blocks):
        counted.append(tuple(blocks))
        with torch.device("meta"):
            model = Mixed(depth=blocks[0])
        return trace_step(model, {"x": torch.zeros(3, 7, 24)}, loss_of, autocast=False)

    deep = extrapolate(Depths([9], count))
    assert counted == [(2,), (3,)]
    assert deep == count([9])


def test_materialise_keeps_ties_and_dtypes():
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(3, 3, dtype=torch.bfloat16), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    with FakeTensorMode():
        materialise(model)
    assert model[1].weight is model[0].weight
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].bias.dtype == torch.float32


def test_what_lies_in_a_file_is_ignored():
    mapped = torch.zeros(256)
    with LiveBytes() as live:
        live.ignore(mapped)
        view = mapped[1:]
        assert live.now == 0
        copy = view + 1
        assert live.now == 255 * 4
        del view, copy
        assert live.now == 0


def test_blocks_are_passed_in_whichever_order_they_run():
    """A decoder may be listed before the encoder that runs first, and a block may be skipped."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.skipped, self.encoder, self.head = (
                nn.Linear(4, size, bias=False, device="meta") for size in (8, 2, 4, 1000)
            )

        def forward(self, x):
            x = self.decoder(self.encoder(x))
            return self.head(x[:, :4]).sum()

    def passed(*blocks):
        batch = {"x": torch.empty(3, 4, device="meta")}
        sizes = trace_forward(
            Model(), blocks, batch, lambda model, fake: model(fake["x"]), watched={}
        )
        return [tuple(one) for one in sizes.blocks[None]]

    listed = passed("encoder", "decoder")
    assert listed[1][2] - listed[1][0] == 3 * 8 * 4
    assert max(peak for _, peak, _ in listed) < 3 * 1000 * 4
    assert passed("decoder", "encoder") == listed
    assert passed("decoder", "skipped", "encoder") == listed


@pytest.mark.parametrize(
    ("blocks", "counted"), [([3], [[3]]), ([3, 2], [[3, 2]]), ([4], [[2], [3]])]
)
def test_shallow_models_are_counted_as_they_are(blocks, counted):
    asked = []

    def count(depths):
        asked.append(list(depths))
        return StepSizes({"forward": Instant(kept=10 * sum(depths))})

    sizes = extrapolate(Depths(blocks, count))
    assert asked == counted
    assert sizes.phases["forward"].kept == 10 * sum(blocks)
