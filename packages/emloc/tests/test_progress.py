"""A log gets lines, a terminal a bar; neither is broken by what is shown."""

import io

import pytest
from rich.console import Console

from emloc.machine import progress
from emloc.machine.progress import ProgressBar, headline, progress_bar, warn


@pytest.fixture
def log(monkeypatch):
    file = io.StringIO()
    made = Console(file=file, markup=False, highlight=False, soft_wrap=True)
    monkeypatch.setattr(progress, "console", made)
    return file


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def steps(total, seconds, completed=0):
    """Lines of a run whose steps take so long each."""
    clock = Clock()
    with ProgressBar("train", total, completed, clock) as bar:
        for step in range(completed, total):
            clock.now += seconds
            bar.advance(note=f"loss {step}")


def test_a_line_at_the_start_at_every_tenth_and_at_the_end(log):
    steps(100, 1.5)
    lines = log.getvalue().splitlines()
    assert lines[0] == "train: 0/100 (0%)"
    assert lines[1] == "train: 10/100 (10%), 0:00:15 so far, 0:02:15 left, loss 9"
    assert lines[-1] == "train: 100/100 (100%), 0:02:30 so far, loss 99"
    assert len(lines) == 11


def test_a_line_every_half_minute_where_a_tenth_takes_longer(log):
    steps(20, 31)
    assert len(log.getvalue().splitlines()) == 21


def test_quick_work_is_two_lines(log):
    steps(1000, 0.0001)
    assert len(log.getvalue().splitlines()) == 2


def test_a_resumed_run_starts_where_it_was(log):
    steps(10, 2, completed=6)
    lines = log.getvalue().splitlines()
    assert lines[0] == "train: 6/10 (60%)"
    assert "0:00:06 left" in lines[1]


def test_an_error_leaves_the_last_line(log):
    with pytest.raises(ValueError, match="x"), progress_bar("merge", 5) as advance:
        advance(2)
        raise ValueError("x")
    assert log.getvalue().splitlines()[-1].startswith("merge: 2/5 (40%)")


def test_nothing_in_a_log_is_a_control_character_or_wrapped_or_markup(log):
    long = "/data/" + "x" * 300 + "/run[/red][bold]"
    progress.console.print(f"compress: {long} is complete already")
    warn(f"{long} is odd")
    with progress_bar("draw", 3) as advance:
        advance(note="[/b]")
    text = log.getvalue()
    assert text.count(long) == 2
    assert "warning: " in text
    assert all(character.isprintable() or character == "\n" for character in text)


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
    file = io.StringIO()
    made = Console(file=file, force_terminal=True, no_color=True, markup=False)
    monkeypatch.setattr(progress, "console", made)
    with progress_bar("merge[/b]", 3) as advance:
        advance(3, note="[/b]")
    assert "3/3" in file.getvalue()
    assert "so far" not in file.getvalue()


def test_colours_are_not_where_they_are_not_wanted(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, force_terminal=True, markup=False))
    warn("odd")
    assert "\x1b[33m" not in file.getvalue()


@pytest.mark.parametrize(("name", "rest"), [("train", "→ [bold]folder"), ("merge", "")])
def test_a_headline_shows_what_it_is_given(log, name, rest):
    headline(name, rest)
    said = log.getvalue()
    assert said.startswith(f"{name} {rest}".rstrip() + " ─")
    assert said.endswith("\n")
