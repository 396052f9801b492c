"""Run many forward calls of one model in lockstep, holding one unit's weights at a time.

A model that does not fit in memory can still run if all calls advance together: each call runs the
library's own forward in a greenlet, which is suspended whenever it is about to enter a *unit* (a
block, or any other module with weights). When all calls stand before the same unit, its weights are
loaded, each call runs through it and on to the next unit, and the weights are dropped. No model's
forward is copied or patched, so skips and several towers need no code of their own.

Memory: the resident tensors, one unit, and what each suspended call keeps alive (its hidden state), which
lies on the host where the device has memory of its own (`emloc.streaming.parking`).
A call runs on to the next unit before the next call is resumed, so after the last unit (the head)
only one call's logits exist at a time.

Autocast and `torch.no_grad` are each call's own; a call begins without gradients.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from greenlet import GreenletExit
from torch import nn

from emloc.errors import EmlocError
from emloc.streaming.call import Call, wait_before
from emloc.streaming.parking import Parking


class LockstepError(EmlocError, RuntimeError):
    """The calls do not pass the model's units in the same order."""


@contextmanager
def _rendezvous(model: nn.Module, units: Sequence[str]) -> Iterator[None]:
    def pause_before(name: str) -> Callable[..., None]:
        def pause(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            wait_before(name, (inputs, named))

        return pause

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            pause_before(name), prepend=True, with_kwargs=True
        )
        for name in units
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lockstep(
    model: nn.Module,
    units: Sequence[str],
    calls: Sequence[Call],
    visit: Callable[[str], AbstractContextManager[None]],
    enough: Callable[[Set[str | None]], bool] | None = None,
    device: torch.device | None = None,
) -> list[Any]:
    """Advance `calls` together through `units`; returns their results in order.

    Args:
        units: module names; must not contain one another.
        visit: entered when all calls stand before the named unit, left when all are through it.
        enough: asked whenever calls have left a unit, with the units that they stand before now (None: it
            has returned); if it says so they are abandoned, and their results are None.
        device: where the calls compute, the CPU by default.

    Raises:
        LockstepError: the calls stand before different units.
    """
    parking = None if device is None or device.type == "cpu" else Parking(device)
    for call in calls:
        call.use = None if parking is None else parking.use
    with _rendezvous(model, units), torch.no_grad(), parking or nullcontext():
        try:
            _advance(calls, parking)
            while True:
                waiting = {call.waiting_for for call in calls}
                if waiting == {None}:
                    return [call.result for call in calls]
                if enough is not None and enough(waiting):
                    return [None for _ in calls]
                if len(waiting) != 1:
                    raise LockstepError(
                        f"The calibration samples take different paths through the model: they wait "
                        f"for {sorted(map(str, waiting))} at once; give them the same structure."
                    )
                name = str(waiting.pop())
                with visit(name):
                    _advance(calls, parking)
        finally:
            for call in calls:
                if not call.dead:
                    call.throw(GreenletExit)


def _advance(calls: Sequence[Call], parking: Parking | None) -> None:
    for call in calls:
        if parking is None:
            call.advance()
        else:
            with parking.running(call):
                call.advance()
