"""Sentences, warnings and the one progress bar that a stage prints on standard error while it works.

On a terminal the bar moves. Anywhere else (a log of nohup, CI or SLURM) it is a line at the start, one
whenever another tenth is done or half a minute has passed, and one at the end; no line has a control
character, and none is wrapped.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)

LINE_SHARE = 0.1
"""Another line after so much of the whole, …"""

LINE_SECONDS = 30.0
"""… or after so long, …"""

QUIET_SECONDS = 1.0
"""… but none so soon after the last."""


def warn(text: str) -> None:
    """Print a warning."""
    console.print(f"[yellow]warning:[/] {escape(text)}", markup=True)


def headline(name: str, rest: str = "") -> None:
    """A rule across the console with a title, `name` in bold."""
    title = Text.assemble((name, "bold"), f" {rest}".rstrip())
    console.rule(title, align="left")


@contextmanager
def working(on: str) -> Iterator[None]:
    """Something whose length is not known: a spinner, or a line where nothing moves."""
    if moves(console):
        with console.status(on):
            yield
    else:
        console.print(f"{on} …")
        yield


def moves(shown_on: Console) -> bool:
    """Return whether a bar can be redrawn there."""
    return shown_on.is_terminal and not shown_on.is_dumb_terminal


class ProgressBar:
    """The progress of `total` steps, from `completed` on.

    Args:
        clock: seconds; for tests.
    """

    def __init__(
        self,
        description: str,
        total: int,
        completed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.total, self.completed = description, total, completed
        self.note = ""
        self._clock = clock
        self._bar = _bar() if moves(console) else None
        self._first = completed
        self._started = self._said_at = clock()
        self._said = -1

    def __enter__(self) -> "ProgressBar":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self.completed, note=""
            )
        else:
            self._say()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._said != self.completed or kind is not None:
            self._say()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Some steps more are done; `note` stands beside them until another does."""
        self.move_to(self.completed + steps, note)

    def move_to(self, completed: int, note: str | None = None) -> None:
        """Show that so many steps are done."""
        self.completed = completed
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, note=self.note)
        elif completed < self.total and self._due():
            self._say()

    def _due(self) -> bool:
        quiet = self._clock() - self._said_at
        further = self.completed - self._said >= LINE_SHARE * self.total
        return quiet >= LINE_SECONDS or (further and quiet >= QUIET_SECONDS)

    def _say(self) -> None:
        now = self._clock()
        self._said, self._said_at = self.completed, now
        share = f" ({self.completed / self.total:.0%})" if self.total else ""
        parts = [f"{self.description}: {self.completed}/{self.total}{share}"]
        done, seconds = self.completed - self._first, now - self._started
        if done or seconds >= QUIET_SECONDS:
            parts.append(f"{_span(seconds)} so far")
        if done and self.completed < self.total:
            parts.append(f"{_span(seconds / done * (self.total - self.completed))} left")
        if self.note:
            parts.append(self.note)
        console.print(", ".join(parts))


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _bar() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Yields `advance(steps=1, note=None)` of a `ProgressBar`."""
    with ProgressBar(description, total) as bar:
        yield bar.advance


def quiet_libraries() -> None:
    """Libraries' own bars would fill a log with carriage returns; on a terminal they stay.

    Only variables of the environment are set, which they read when they are imported.
    """
    if not moves(console):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
