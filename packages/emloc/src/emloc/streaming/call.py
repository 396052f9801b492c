"""One forward call as a greenlet: it runs to the next unit, and waits there until it is resumed."""

from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from emloc.streaming.precision import Autocast


class Call(greenlet):
    """One forward call: `run()` returns its result; `context` is free for the hooks that it meets.

    Attributes:
        waiting_for: the unit that it stands before; None: it has returned.
        use: brings tensors back to the device that had to leave it while the call waited; None: none had.
    """

    def __init__(self, run: Callable[[], Any], context: Any = None) -> None:
        super().__init__(run)
        self.context = context
        self.waiting_for: str | None = None
        self.use: Callable[[Any], None] | None = None
        self.result: Any = None
        self._autocast: Autocast | None = None
        self._with_graph: bool | None = None

    def advance(self) -> None:
        """Run until the call stands before its next unit or has returned.

        Autocast, and whether a graph is recorded, belong to the thread, so a call that entered `autocast` or
        `no_grad` would leave it on for the others, and for good once two of them have left it in another
        order: each call has its own.
        """
        before, with_graph = Autocast.now(), torch.is_grad_enabled()
        if self._autocast is not None and self._with_graph is not None:
            self._autocast.set()
            torch.set_grad_enabled(self._with_graph)
        try:
            outcome = self.switch()
        finally:
            self._autocast, self._with_graph = Autocast.now(), torch.is_grad_enabled()
            before.set()
            torch.set_grad_enabled(with_graph)
        if self.dead:
            self.waiting_for, self.result = None, outcome
        else:
            self.waiting_for = outcome


def wait_before(unit: str, given: Any) -> None:
    """Suspend the call that runs, if one does, until the unit's turn comes.

    Args:
        given: all that the unit gets, on the device again afterwards.
    """
    call = current_call()
    if call is not None and call.parent is not None:
        call.parent.switch(unit)
        if call.use is not None:
            call.use(given)


def current_call() -> Call | None:
    """The call that is running, or None outside of lockstep."""
    running = getcurrent()
    return running if isinstance(running, Call) else None
