"""Lockstep gives what plain forwards give, bit for bit, and holds one unit at a time."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

from emloc.streaming.call import Call, current_call, wait_before
from emloc.streaming.lockstep import LockstepError, lockstep


class Skipping(nn.Module):
    """Blocks with long skips, as in a UNet: the first block's output is used by the last."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(6, 9), nn.Linear(9, 5)])
        self.up = nn.ModuleList([nn.Linear(5, 9), nn.Linear(18, 6)])

    def forward(self, x):
        first = self.down[0](x).relu()
        second = self.up[0](self.down[1](first).relu())
        return self.up[1](torch.cat([first, second], -1))


UNITS = ["down.0", "down.1", "up.0", "up.1"]


def test_bit_exact_and_in_order():
    torch.manual_seed(0)
    model = Skipping()
    inputs = [torch.randn(3, 6) for _ in range(4)]
    visited, inside = [], []

    @contextmanager
    def visit(name):
        visited.append(name)
        inside.append(name)
        yield
        inside.remove(name)
        assert not inside

    calls = [Call(lambda x=x: model(x), context=i) for i, x in enumerate(inputs)]
    seen = []
    hook = model.up[0].register_forward_hook(lambda *_: seen.append(current_call().context))
    results = lockstep(model, UNITS, calls, visit)
    hook.remove()
    assert current_call() is None
    assert visited == UNITS
    assert seen == [0, 1, 2, 3]
    for result, x in zip(results, inputs):
        assert torch.equal(result, model(x))
        assert not result.requires_grad


def test_what_is_enough_abandons_the_rest():
    model = Skipping()
    reached = []
    model.up[0].register_forward_hook(lambda *_: reached.append(1))

    @contextmanager
    def visit(name):
        yield

    calls = [Call(lambda: model(torch.randn(2, 6))) for _ in range(3)]
    asked = []

    def enough(waiting):
        asked.append(set(waiting))
        return waiting == {"up.0"}

    assert lockstep(model, UNITS, calls, visit, enough) == [None] * 3
    assert asked == [{"down.0"}, {"down.1"}, {"up.0"}]
    assert reached == []
    assert all(call.dead for call in calls)
    assert not model.up[0]._forward_pre_hooks


def test_an_error_in_one_call_ends_all_and_cleans_up():
    model = Skipping()
    calls = [Call(lambda: model(torch.randn(2, 6))), Call(lambda: model(torch.randn(2, 7)))]

    @contextmanager
    def visit(name):
        yield

    with pytest.raises(RuntimeError, match="shape"):
        lockstep(model, UNITS, calls, visit)
    assert all(call.dead for call in calls)
    assert not model.down[0]._forward_pre_hooks


def test_different_paths_are_refused():
    model = Skipping()

    @contextmanager
    def visit(name):
        yield

    calls = [Call(lambda: model(torch.randn(2, 6))), Call(lambda: model.up[0](torch.randn(2, 5)))]
    with pytest.raises(LockstepError, match="different paths"):
        lockstep(model, UNITS, calls, visit)


def test_each_call_has_its_own_autocast():
    """Calls that enter it, are suspended, and leave it in the order of entering: it is on for no other."""
    seen = []

    def run(dtype):
        with torch.autocast("cpu", dtype):
            wait_before("unit", None)
            seen.append(torch.get_autocast_dtype("cpu"))
        seen.append(torch.is_autocast_enabled("cpu"))

    dtypes = (torch.bfloat16, torch.float16)
    calls = [Call(partial(run, dtype)) for dtype in dtypes]
    for _ in range(2):
        for call in calls:
            call.advance()
            assert not torch.is_autocast_enabled("cpu")
    assert seen == [torch.bfloat16, False, torch.float16, False]


def test_each_call_records_its_own_graph():
    """Calls that turn gradients off and on between units: of no other, and not of what runs between them."""
    seen = []

    def run(inside, outside):
        torch.set_grad_enabled(outside)
        with torch.set_grad_enabled(inside):
            wait_before("unit", None)
            seen.append(torch.is_grad_enabled())
        seen.append(torch.is_grad_enabled())

    calls = [Call(partial(run, *modes)) for modes in ((False, True), (True, False))]
    for _ in range(2):
        for call in calls:
            call.advance()
            assert torch.is_grad_enabled()
    assert seen == [False, True, True, False]
