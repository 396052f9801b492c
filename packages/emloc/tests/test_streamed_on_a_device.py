"""Weights that come and go on a pretended CUDA device: the CPU's gradients, and an order without races."""

from functools import partial
from math import prod
from types import SimpleNamespace

import pytest
import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.machine import pinned
from emloc.streaming.streamed_model import StreamedModel
from emloc.testing import pretend_device
from emloc.testing.toy_family import ToyFamily, write_toy
from emloc.testing.toy_model import ToySizes

FAMILY = ToyFamily()
SIZES = ToySizes(side=2, blocks=6, width=64, hidden=200)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint.open(write_toy(tmp_path_factory.mktemp("toy") / "model", SIZES, 0))


@pytest.fixture
def streamed(checkpoint, tmp_path):
    """`streamed(device, ...)`: losses of two micro-batches, and gradients of the convolutions' biases."""

    def run(device, dtype=torch.float32, bits=None, weights="ram"):
        model = StreamedModel(FAMILY, checkpoint, dtype, device, weights, "ram", tmp_path, bits)
        shifts = {}

        def add(name, module, inputs, output):
            shape = (1, output.shape[1], *(1 for _ in output.shape[2:]))
            shift = shifts.setdefault(name, torch.zeros(shape, dtype=dtype, device=device))
            return output + shift.requires_grad_()

        for group in FAMILY.layer_groups(model.model):
            model.model.get_submodule(group[0]).register_forward_hook(partial(add, group[0]))

        def loss_of(seed):
            draw = torch.Generator().manual_seed(seed)
            pictures = torch.randn(3, SIZES.channels, SIZES.side, SIZES.side, generator=draw)
            labels = torch.randint(SIZES.classes, (3,), generator=draw)
            batch = {"pictures": pictures.to(device), "labels": labels.to(device)}
            loss, _ = FAMILY.loss(model.model, batch)
            return loss, float(loss.detach())

        losses = model.gradients([partial(loss_of, seed) for seed in range(2)])
        return losses, {name: shift.grad.cpu() for name, shift in shifts.items()}

    return run


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"weights": "disk"},
        {"dtype": torch.float64},
        {"weights": "disk", "dtype": torch.float64},
        {"bits": 4},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_cpu(streamed, given):
    losses, gradients = streamed("cpu", **given)
    with pretend_device() as card:
        same_losses, same_gradients = streamed("cuda", **given)
        assert card.unpinned == 0, "copies from ordinary memory stop the processor"
        assert card.peak_bytes > 0
    assert same_losses == pytest.approx(losses, rel=1e-6)
    assert gradients.keys() == same_gradients.keys()
    assert all(gradient.any() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_two_units_at_most_lie_on_the_device(streamed, checkpoint):
    block = [info for name, info in checkpoint.tensors.items() if name.startswith("blocks.0.")]
    unit = sum(prod(info.shape) for info in block) * 4
    with pretend_device() as card:
        streamed("cuda")
        assert card.live_bytes < unit / 10
        assert 2 * unit <= card.peak_bytes < 3 * unit


def test_copies_and_computing_wait_for_each_other(streamed, monkeypatch):
    """No copy into the room of weights that may still be read, no reading of what may not be there yet."""
    waits = []

    def stream(name):
        def wait_stream(other):
            waits.append((name, other.name))

        return SimpleNamespace(name=name, wait_stream=wait_stream)

    computing, copying = stream("computing"), stream("copying")
    with pretend_device(), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda device=None: copying)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: computing)
        streamed("cuda")
    # Room is taken where it is computed, so copies wait for that; then what computes waits for them.
    assert len(waits) >= 4 * SIZES.blocks
    assert waits == [("copying", "computing"), ("computing", "copying")] * (len(waits) // 2)


def test_a_step_computes_with_the_weights_of_the_step_before_it(checkpoint, tmp_path):
    """In autocast, which keeps casts of what is learnt: none of them outlives its step."""

    def losses(changed):
        """The losses of two steps, between which `changed` is added to what is learnt."""
        model = StreamedModel(FAMILY, checkpoint, torch.float32, "cpu", "ram", "ram", tmp_path)
        draw = torch.Generator().manual_seed(0)
        learnt = torch.randn(SIZES.width, SIZES.width, generator=draw).requires_grad_()

        def add(module, inputs, output):
            return output + torch.nn.functional.linear(output, learnt)

        [*_, last] = FAMILY.layer_groups(model.model)
        model.model.get_submodule(last[0]).register_forward_hook(add)
        pictures = torch.randn(3, SIZES.channels, SIZES.side, SIZES.side, generator=draw)
        batch = {"pictures": pictures, "labels": torch.arange(3)}

        def loss_of():
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = FAMILY.loss(model.model, batch)
            return loss, float(loss.detach())

        [before] = model.gradients([loss_of])
        assert learnt.grad is not None
        with torch.no_grad():
            learnt.add_(changed)
        [after] = model.gradients([loss_of])
        return before, after

    first, same = losses(0.0)
    assert same == first
    _, other = losses(1.0)
    assert abs(other - first) > 1e-3 * first


@pytest.mark.parametrize("refused", [0, 2])
def test_large_weights_wait_in_pages_that_cuda_knows(streamed, monkeypatch, refused):
    """To the same gradients, also where CUDA refuses more pages, whose error is taken away then."""
    losses, gradients = streamed("cpu")
    pages = []

    def register(address, size, flags):
        assert address % pinned.PAGE == size % pinned.PAGE == 0
        pages.append(size)
        return refused

    with pretend_device(), monkeypatch.context() as patch:
        patch.setattr(pinned, "LARGE", 64)
        runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0)
        patch.setattr(torch.cuda, "cudart", lambda: runtime)
        same_losses, same_gradients = streamed("cuda")
    assert len(pages) > 4 * SIZES.blocks
    assert same_losses == pytest.approx(losses, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-4, atol=1e-6)
