"""One forward call as a greenlet: it runs to the next unit, and waits there until it is resumed."""

from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet


class Call(greenlet):
    """One forward call: `run()` returns its result; `context` is free for the hooks that it meets."""

    def __init__(self, run: Callable[[], Any], context: Any = None) -> None:
        super().__init__(run)
        self.context = context
        self.waiting_for: str | None = None
        self.result: Any = None

    def advance(self) -> None:
        """Run until the call stands before its next unit or has returned."""
        outcome = self.switch()
        if self.dead:
            self.waiting_for, self.result = None, outcome
        else:
            self.waiting_for = outcome


def current_call() -> Call | None:
    """The call that is running, or None outside of lockstep."""
    running = getcurrent()
    return running if isinstance(running, Call) else None
