"""A device that is none: what torch's documentation says of CUDA tensors holds for its own."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import dropout, embedding, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from emloc.machine.device import device_here
from emloc.machine.memory import PeakMemory
from emloc.testing import pretend_device

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card():
    with pretend_device() as traffic:
        yield traffic


def on_both(function, *tensors):
    """The results on the CPU and on the device, from equal random numbers."""
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        results.append(function(*(tensor.to(device) for tensor in tensors)).cpu())
    return results


def test_a_tensor_says_where_it_is(card):
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device="cuda:0"),
        torch.as_tensor(np.ones(2), device="cuda"),
        torch.ones(2).to("cuda"),
        torch.ones(2).cuda(),
        torch.ones(2).to(torch.zeros(1, device="cuda")),
        torch.arange(3, device=torch.device("cuda")),
    ]
    made += [torch.zeros_like(made[0]), made[0].new_zeros(3), made[0].new_tensor([1])]
    with torch.device("cuda"):
        made.append(torch.ones(1))
    for tensor in made:
        assert tensor.device == CUDA
        assert tensor.is_cuda
        assert tensor.get_device() == 0
    assert made[0].to("cuda") is made[0]
    assert made[0].cpu().device.type == "cpu"
    assert torch.ones(1).device.type == "cpu"
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:1")


def test_devices_do_not_mix(card):
    x, host = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    table = torch.ones(5, 3, device="cuda")
    for mix in (
        lambda: x + host,
        lambda: host.add_(x),
        lambda: x.add_(host),
        lambda: linear(x, host),
        lambda: torch.cat([x, host]),
        lambda: torch.where(host > 0, x, x),
        lambda: embedding(torch.tensor([1]), table),
        lambda: host[torch.tensor([1], device="cuda")],
        lambda: torch.tensor(1.0).add_(x.sum()),
        lambda: torch._foreach_add_([x], [host]),
    ):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mix()


def test_scalars_and_indices_of_the_host_are_allowed(card):
    x = torch.arange(6.0, device="cuda").reshape(2, 3)
    assert (x * torch.tensor(2.0)).tolist() == [[0, 2, 4], [6, 8, 10]]
    assert (x + 1).device == CUDA
    assert x[torch.tensor([1])].tolist() == [[3, 4, 5]]
    assert x[..., [0, 2]].tolist() == [[0, 2], [3, 5]]
    x[[1]] = 7
    assert x[1].tolist() == [7, 7, 7]
    assert card.to_device.count == 0


def test_transfers_are_counted_by_direction(card):
    x = torch.ones(10).to("cuda")
    y = torch.zeros(5, dtype=torch.float64)
    y.copy_(x[:5])  # 20 bytes of float32 are read
    x.to(torch.float16)
    x.tolist()
    assert (card.to_device.count, card.to_device.bytes) == (1, 40)
    assert (card.to_host.count, card.to_host.bytes) == (2, 20 + 40)


def test_reading_a_value_is_counted_and_numpy_refused(card):
    x = torch.tensor([1.5, 2.5], device="cuda")
    assert x.sum().item() == float(x.sum()) == 4.0
    assert bool(x[0] > 1)
    assert f"{x[0]:.2f}" == "1.50"
    assert card.reads == 4
    assert x[x > 2].tolist() == [2.5]
    assert torch.nonzero(x).shape == (2, 1)
    assert card.waits == 2
    for read in (x.numpy, lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            read()
    with pytest.raises(BufferError):
        np.from_dlpack(x)


def test_pinned_memory(card):
    x = torch.ones(3)
    pinned = x.pin_memory()
    assert pinned.is_pinned()
    assert pinned[1:].is_pinned()
    assert torch.empty(2, pin_memory=True).is_pinned()
    assert not x.is_pinned()
    pinned.to("cuda", non_blocking=True)
    assert card.unpinned == 0
    here = x.to("cuda", non_blocking=True)
    assert card.unpinned == 1
    there = here.to("cpu", non_blocking=True)
    there.to("cuda")
    torch.cuda.synchronize()
    there + 1
    assert card.unfinished == 0
    here.to("cpu", non_blocking=True) + 1
    assert card.unfinished == 1
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        here.pin_memory()


def test_live_bytes_are_those_of_storages(card):
    x = torch.zeros(1000, device="cuda")
    view = x[:10]
    assert card.live_bytes == torch.cuda.memory_allocated() == 4000
    y = x * 2
    assert card.live_bytes == 8000
    del x, y
    assert card.live_bytes == 4000
    del view
    gc.collect()
    assert card.live_bytes == 0
    assert card.peak_bytes == torch.cuda.max_memory_allocated() == 8000
    torch.cuda.reset_peak_memory_stats()
    assert card.peak_bytes == 0


def test_the_limit_of_a_process_is_kept(card):
    torch.cuda.set_per_process_memory_fraction(1000 / torch.cuda.mem_get_info()[1])
    held = torch.zeros(200, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        held * 2
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert (held * 2).shape == held.shape


def test_a_stage_measures_it_as_cuda(card):
    assert device_here("auto") == "cuda"
    with PeakMemory("cuda") as peak:
        torch.zeros(5000, device="cuda")
    assert peak.peak_bytes == 20_000


def test_gradients_live_on_the_device_and_are_the_hosts(card):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def gradient(x):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
        model.to(x.device)
        checkpoint(model, x.requires_grad_(), use_reentrant=False).square().mean().backward()
        assert all(p.grad.device == x.device for p in model.parameters())
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert torch.equal(*on_both(gradient, x))


def test_a_gradient_crosses_with_its_transfer(card):
    weight = torch.ones(3, requires_grad=True)
    (weight.to("cuda") * torch.arange(3.0, device="cuda")).sum().backward()
    assert weight.grad.device.type == "cpu"
    assert weight.grad.tolist() == [0, 1, 2]


@pytest.mark.parametrize("masked", ["no", "causal", "bool", "float"])
def test_attention_is_the_hosts(card, masked):
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 8, generator=drawn) for _ in range(3))
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = {"bool": allowed, "float": torch.randn(5, 5, generator=drawn)}.get(masked)

    def attend(q, k, v):
        q.requires_grad_()
        here = None if mask is None else mask.to(q.device)
        attended = scaled_dot_product_attention(q, k, v, here, is_causal=masked == "causal")
        return torch.autograd.grad(attended.square().sum(), q)[0]

    assert torch.equal(*on_both(attend, q, k, v))


@pytest.mark.parametrize("named", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_an_optimiser_steps_on_the_device(card, named):
    def step(x):
        weight = nn.Parameter(x.detach().clone())
        optimizer = torch.optim.AdamW([weight], lr=0.1, **named)
        for _ in range(3):
            weight.square().sum().backward()
            nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach()

    assert torch.equal(*on_both(step, torch.arange(4.0)))


def test_autocast_is_cudas(card):
    layer = nn.Linear(3, 5).to("cuda")
    x = torch.ones(2, 3, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer(x).float().softmax(-1).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float32


def test_a_custom_function_runs_on_it(card):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            context.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(context, gradient):
            assert gradient.device == context.saved_tensors[0].device == CUDA
            return 2 * gradient

    x = torch.ones(2, device="cuda", requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2]


def test_random_numbers_are_the_hosts(card):
    def draw(x):
        generator = torch.Generator(x.device).manual_seed(3)
        drawn = torch.randn(4, device=x.device, generator=generator)
        return drawn + torch.rand_like(x) + dropout(x, 0.5)

    assert torch.equal(*on_both(draw, torch.ones(4)))
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(1, device="cuda", generator=torch.Generator())


def test_pools_of_threads_and_inference_mode_see_it(card):
    with ThreadPoolExecutor(1) as pool:
        moved = pool.submit(torch.ones(3).to, "cuda").result()
        made = pool.submit(torch.ones, 3, device="cuda").result()
    with torch.inference_mode():
        x = torch.ones(2, 3).to("cuda", torch.float64)
        assert linear(x, x).device == moved.device == made.device == CUDA
        with pytest.raises(RuntimeError, match="same device"):
            linear(x, torch.ones(2, 3, dtype=torch.float64))
    assert card.to_device.count == 2


def test_modules_keep_their_parameters(card):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    shared = model[0].weight
    model.to("cuda")
    assert model[0].weight is model[1].weight is shared
    assert isinstance(shared, nn.Parameter)
    model(torch.ones(1, 2, device="cuda")).sum().backward()
    assert copy.deepcopy(model)[0].weight.device == CUDA
    model.zero_grad()
    model.to("cpu")
    assert shared.device.type == "cpu"


def test_nothing_of_it_stays():
    with pretend_device():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    assert torch.accelerator.current_accelerator() is None
    assert torch.Generator is torch._C.Generator
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        torch.zeros(1, device="cuda")
