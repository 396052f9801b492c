"""What a process has worked out is not worked out again, and does not pile up."""

import pytest

from emloc.machine.remembered import Remembered


def test_an_answer_is_worked_out_once_and_the_oldest_goes_first():
    remembered: Remembered[str] = Remembered(2)
    asked: list[str] = []

    def answer(to: str) -> str:
        return remembered.answer(to, lambda: asked.append(to) or to.upper())

    assert [answer(to) for to in "abab"] == ["A", "B", "A", "B"]
    assert asked == ["a", "b"]
    answer("c")
    answer("b")
    assert asked == ["a", "b", "c"]
    answer("a")
    assert asked == ["a", "b", "c", "a"]


def test_none_is_an_answer():
    remembered: Remembered[None] = Remembered(2)
    asked: list[int] = []
    for _ in range(2):
        assert remembered.answer("x", lambda: asked.append(1)) is None
    assert asked == [1]


def test_what_failed_is_tried_again():
    remembered: Remembered[int] = Remembered(2)
    with pytest.raises(ZeroDivisionError):
        remembered.answer("x", lambda: 1 // 0)
    assert remembered.answer("x", lambda: 3) == 3
