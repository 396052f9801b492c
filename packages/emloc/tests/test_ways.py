"""The ways to a LoRA side by side: the time of a step, what fits, what is recommended."""

import pytest
import torch
from torch import nn

from emloc.planning import rates as rates_module
from emloc.planning.ledger import StageMemory
from emloc.planning.rates import Rates, known_rates, measured_rates
from emloc.planning.ways import POLISHED, Room, Way, known_gain, recommended
from emloc.planning.work import of_depth, seconds_of

INFINITE = 1e300
NONE = {name: INFINITE for name in Rates.__dataclass_fields__} | {"operation": 0.0}
PRODUCTS_ALONE = Rates(**NONE | {"products": 1.0, "thin_products": 1.0})
BYTES_ALONE = Rates(**NONE | {"near": 1.0, "far": 1.0})
FRESH_ALONE = Rates(**NONE | {"fresh": 1.0})


def loss_of(model, batch):
    return model(batch["x"]).sum(), 1


@pytest.mark.parametrize(("rows", "d_in", "d_out"), [(7, 16, 24), (80, 100, 96)])
def test_products_of_forward_and_backward_are_counted(rows, d_in, d_out):
    """The weight's gradient is one more product; the input wants none."""
    with torch.device("meta"):
        model, batch = nn.Linear(d_in, d_out, bias=False), {"x": torch.empty(rows, d_in)}
    seconds = seconds_of(model, batch, loss_of, False, PRODUCTS_ALONE)
    assert seconds == 2 * rows * d_in * d_out


def test_convolutions_and_attention_are_counted():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    with torch.device("meta"):
        conv = nn.Conv2d(3, 5, 3, padding=1, bias=False).requires_grad_(False)
        pixels = {"x": torch.empty(2, 3, 8, 8)}
        heads = torch.empty(2, 4, 32, 16)

    def forward_alone(model, batch):
        with torch.no_grad():
            made = model(batch["x"])
        return made.sum() + torch.zeros((), requires_grad=True), 1

    assert seconds_of(conv, pixels, forward_alone, False, PRODUCTS_ALONE) == 2 * 64 * 3 * 5 * 9
    products = seconds_of(Attention(), {"x": heads}, forward_alone, False, PRODUCTS_ALONE)
    assert products == 2 * (2 * 4 * 32 * 32 * 16)


@pytest.mark.parametrize(("rows", "fresh"), [(1024, 1024 * 512 * 4), (256, 0)])
def test_new_memory_of_large_results_is_counted(rows, fresh):
    """The system gives large results new memory; what is written in place is there already."""

    def forward_alone(model, batch):
        with torch.no_grad():
            made = model(batch["x"]).add_(1)
        return made[0, 0] + torch.zeros((), requires_grad=True), 1

    with torch.device("meta"):
        model, batch = nn.Linear(16, 512, bias=False), {"x": torch.empty(rows, 16)}
    seconds = seconds_of(model, batch, forward_alone, False, FRESH_ALONE)
    assert seconds == pytest.approx(fresh, abs=1e-9)


def test_bytes_of_what_is_no_product_are_counted_and_views_are_free():
    class Doubled(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return x.view(-1).view(x.shape).t() * 2

    def nothing(model, batch):
        model(batch["x"])
        return torch.zeros((), requires_grad=True), 1

    with torch.device("meta"):
        batch = {"x": torch.empty(10, 20)}
    empty = seconds_of(nn.Identity(), batch, nothing, False, BYTES_ALONE)
    assert seconds_of(Doubled(), batch, nothing, False, BYTES_ALONE) - empty == 2 * 200 * 4


def test_a_deep_model_is_counted_by_shallow_ones():
    asked = []

    def seconds(blocks):
        asked.append(tuple(blocks))
        return 5.0 + 2.0 * blocks[0] + 3.0 * blocks[1]

    assert of_depth([40, 7], seconds) == 5 + 80 + 21
    assert max(max(blocks) for blocks in asked) == 3
    assert of_depth([], lambda blocks: 4.0) == 4.0


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path))
    monkeypatch.setattr(rates_module, "FILE_BYTES", 4 << 20)
    assert known_rates("cpu", torch.float32) is None
    measured = measured_rates("cpu", torch.float32)
    assert min(vars(measured).values()) > 0
    assert known_rates("cpu", torch.float32) == measured
    assert known_rates("cpu", torch.bfloat16) is None
    [file] = (tmp_path / "rates").iterdir()
    file.write_text("{}")
    assert known_rates("cpu", torch.float32) is None


def way(name, device, seconds, gain):
    return Way(name, StageMemory({"weights": device}), seconds, gain)


WAYS = (
    way("LoRA on the base", 100, 4.0, 1.0),
    way("streamed LoRA on the base", 20, 8.0, 1.0),
    way("QLoRA on the base", 40, 4.5, 0.91),
    way("emulator", 30, 5.0, 0.97),
)


@pytest.mark.parametrize(
    ("memory", "name"),
    [
        (100, "LoRA on the base"),
        (40, "streamed LoRA on the base"),
        (20, "streamed LoRA on the base"),
        (10, None),
    ],
)
def test_what_is_recommended_fits_and_is_best(memory, name):
    best = recommended(WAYS, Room(memory))
    assert (best and best[0].name) == name


def test_of_ways_that_are_as_good_the_quicker_one_is_recommended():
    nearly = [*WAYS[:3], way("emulator", 30, 5.0, 0.99)]
    best = recommended(nearly, Room(40))
    assert best is not None
    assert best[0].name == "emulator"
    assert "1.1 times as long as QLoRA on the base" in best[1]


def test_without_times_the_emulator_is_preferred_where_it_is_as_good():
    untimed = [way(each.name, each.memory.device["weights"], None, each.gain) for each in WAYS]
    best = recommended(untimed[2:], Room(40))
    assert best is not None
    assert best[0].name == "emulator"
    assert "--measure" in best[1]


def test_ram_and_disk_are_room_as_well():
    kept = Way(
        "x", StageMemory({"weights": 1}, {"blocks in ram": 50}, {"checkpoints": 9}), 1.0, 1.0
    )
    assert kept.fits(Room(10, 50, 9))
    assert not kept.fits(Room(10, 49, 9))
    assert not kept.fits(Room(10, 50, 8))


def test_gains_are_known_between_what_was_measured():
    assert known_gain("auto", 2.35) == pytest.approx(0.95)
    assert 0.95 < known_gain("auto", 2.8) < 0.98
    assert known_gain("auto", 30.0) == known_gain("auto", 4.2)
    assert known_gain("auto", 1.5) is None
    assert known_gain("nf4", 4.1) is None
    assert known_gain("auto", 2.35, POLISHED) == known_gain("auto", 4.0, POLISHED) == 0.99
    assert known_gain("low_rank", 6.4, POLISHED) is None
