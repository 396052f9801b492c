"""What suspended calls hold is on the host, and comes back as it was."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from emloc.streaming.call import Call, current_call
from emloc.streaming.lockstep import lockstep
from emloc.streaming.parking import Parking
from emloc.testing import pretend_device

WIDTH, TOKENS, CALLS = 16, 64, 8
STATE = TOKENS * WIDTH * 4


class Skipping(nn.Module):
    """Blocks whose outputs are read again after the next: what no argument of a block shows."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.positions = None

    def forward(self, x):
        if self.positions is None:  # kept by the module, and read by all calls
            self.positions = torch.linspace(0, 1, WIDTH, device=x.device).expand_as(x)
        states = [x + self.positions]
        for block in self.blocks:
            states.append(block(states[-1].view(2, -1, WIDTH)).view(-1, WIDTH) + states[-1])
        return sum(states)


def run(device, model, inputs, watch=None):
    names = [f"blocks.{index}" for index in range(4)]
    model = model.to(device)

    def forward(x):
        return model(x.to(device)).cpu()

    @contextmanager
    def visit(name):
        if watch is not None:
            watch(name)
        yield

    calls = [Call(lambda x=x: forward(x)) for x in inputs]
    return lockstep(model, names, calls, visit, device=torch.device(device))


@pytest.fixture
def inputs():
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(TOKENS, WIDTH, generator=drawn) for _ in range(CALLS)]


def fresh():
    torch.manual_seed(0)
    return Skipping()


def test_suspended_calls_leave_the_device(inputs):
    expected = run("cpu", fresh(), inputs)
    live = []
    with pretend_device() as card:
        model = fresh().to("cuda")
        weights = card.live_bytes
        results = run("cuda", model, inputs, lambda _: live.append(card.live_bytes - weights))
        assert all(torch.equal(one, other) for one, other in zip(expected, results))
        # At each unit nothing but the positions that the module keeps.
        assert max(live) <= STATE
        # While one call runs, it alone: four states, and a sum's temporaries.
        assert card.peak_bytes - weights <= 9 * STATE
        assert card.unfinished == 0
        # What is skipped crosses once: at each of four units what it read and what was made since go.
        assert card.to_host.bytes <= (CALLS * (2 * 4 + 1) + 1) * STATE


def test_what_calls_have_in_common_is_there_for_all(inputs):
    """Sums over calls, made by the first of them in a hook, as moments are."""

    def total(device):
        model, sums = fresh().to(device), {}

        def fold(module, read, _):
            assert current_call() is not None
            products = read[0].reshape(-1, WIDTH).T @ read[0].reshape(-1, WIDTH)
            sums[module] = products if module not in sums else sums[module].add_(products)

        for block in model.blocks:
            block.register_forward_hook(fold)
        run(device, model, inputs)
        return [sums[block].cpu() for block in model.blocks]

    expected = total("cpu")
    with pretend_device():
        there = total("cuda")
    assert all(torch.equal(one, other) for one, other in zip(expected, there))


def test_abandoned_calls_leave_everything_back(inputs):
    with pretend_device() as card:
        model = fresh().to("cuda")
        weights, kept = card.live_bytes, []

        def forward(x):
            here = x.to("cuda")
            kept.append(here)
            return model(here)

        calls = [Call(lambda x=x: forward(x)) for x in inputs]
        names = [f"blocks.{index}" for index in range(4)]
        lockstep(
            model, names, calls, lambda _: torch.no_grad(), lambda waiting: "blocks.2" in waiting,
            torch.device("cuda"),
        )  # fmt: skip
        assert all(torch.equal(there.cpu(), x) for there, x in zip(kept, inputs))
        model.positions = None
        kept.clear()
        assert card.live_bytes == weights


class Forgetful(Skipping):
    """Each block's output has a name that the next one takes over, without a use."""

    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            unread = x * 2  # noqa: F841 — a tensor that lives on while the call waits
        return x


@pytest.mark.parametrize("depth", [4, 12])
def test_what_died_while_it_was_away_is_let_go(inputs, depth, monkeypatch):
    away, send = [], Parking._send_away

    def counting(self, call):
        send(self, call)
        away.append(len(self._away))

    monkeypatch.setattr(Parking, "_send_away", counting)
    with pretend_device():
        model = Forgetful(depth).to("cuda")
        names = [f"blocks.{index}" for index in range(depth)]
        calls = [Call(lambda x=x: model(x.to("cuda")).cpu()) for x in inputs]
        lockstep(model, names, calls, lambda _: torch.no_grad(), device=torch.device("cuda"))
    # Of each call what it was given, its state and the unread one, however deep the model is.
    assert max(away) == 3 * CALLS


def test_where_bringing_back_fails_nothing_watches_on(inputs, monkeypatch):
    """Running out of memory there must not disturb the next calls of the process."""

    def fail(self, key):
        raise torch.OutOfMemoryError("full")

    with pretend_device():
        model, before = fresh().to("cuda"), len(_get_current_dispatch_mode_stack())
        calls = [Call(lambda x=x: model(x.to("cuda"))) for x in inputs]
        names = [f"blocks.{index}" for index in range(4)]
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(Parking, "_bring_back", fail)
            lockstep(model, names, calls, lambda _: torch.no_grad(), None, torch.device("cuda"))
        assert len(_get_current_dispatch_mode_stack()) == before
        other = fresh().to("cuda")
        again = [Call(lambda x=x: other(x.to("cuda")).sum()) for x in inputs]
        lockstep(other, names, again, lambda _: torch.no_grad(), None, torch.device("cuda"))
