"""The check that a chat template shows what the assistant says, so that no answer is learnt in part.

Templates split answers at marks of thought, write calls in place of words, or show the first call alone. What
they write need not be what the row has (space goes, thoughts move), so what does not stand there word for
word is replaced by something else: a template that shows it gives another text.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

from emloc.errors import DataError
from emloc.integrations.transformers.data.turns import Turn

RenderTurns: TypeAlias = Callable[[Sequence[Turn]], str]
TELLING = 20
"""Characters that do not stand in a chat by chance."""

_OTHER, _ANOTHER = "Something else.", "Anything else."
_SEAMS = re.compile(r"<[^<>\s]{1,40}>|◁/?think▷|\[/?[A-Z_]{2,40}\]")
"""Marks at which templates take answers apart."""
_LINES = re.compile(r"[\r\n]+")
_THOUGHTS_END = re.compile(
    r"</think(?:ing)?>|</thought>|</reasoning>|◁/think▷|\[/THINK\]|<channel\|>"
)
_SHOWN = 40


def other_than(text: str) -> str:
    """Words that are not these."""
    return _ANOTHER if text.strip() == _OTHER else _OTHER


def check_earlier_answers(
    turns: Sequence[Turn], whole: str, render: RenderTurns, where: str
) -> None:
    """Refuse a template that shows nothing of an answer before the last one.

    Thoughts are not counted: many templates show those of the last answer alone.

    Raises:
        DataError: names the turn.
    """
    doubtful = [
        index
        for index, turn in enumerate(turns[:-1])
        if turn["role"] == "assistant" and _is_in_doubt(turn, whole)
    ]
    if not doubtful:
        return
    # All of them at once, as a rendering each is much for a long chat of short answers.
    marks = {index: f"something_else_{index}_" for index in doubtful}
    probe = [_said(turn, marks[n]) if n in marks else turn for n, turn in enumerate(turns)]
    rendered = _rendered(render, probe) or ""
    for index in doubtful:
        if marks[index] in rendered:
            continue
        changed = [*turns[:index], _said(turns[index], marks[index]), *turns[index + 1 :]]
        if _rendered(render, changed) == whole:
            raise DataError(
                f"{where}: the model's chat template leaves out turn {index + 1} (assistant); take it out, "
                f"or use a model that takes such turns."
            )


def check_answer(
    turns: Sequence[Turn],
    index: int,
    whole: str,
    start: int | None,
    render: RenderTurns,
    where: str,
) -> None:
    """Refuse a template that leaves out words or a call of an answer that is learnt.

    Args:
        index: of the answer among the turns.
        start: its first character in the whole; None where that is not known.

    Raises:
        DataError: says what is left out.
    """
    turn, is_last = turns[index], index == len(turns) - 1
    own = whole[start or 0 :]

    def is_left_out(changed: Turn) -> bool:
        return _rendered(render, [*turns[:index], changed, *turns[index + 1 :]]) == whole

    texts = _texts(turn)
    ahead = own.lstrip() if start is not None else ""
    for part, text in enumerate(texts):
        begin = 0 if is_last else thoughts_of(text)
        words = text[begin:].strip()
        if ahead.startswith(words):
            ahead = ahead[len(words) :].lstrip()
            continue
        for first, end in _doubtful(text, begin, own):
            words = text[first:end]
            changed = text[:first] + other_than(words) + text[end:]
            if is_left_out(_with_texts(turn, [*texts[:part], changed, *texts[part + 1 :]])):
                raise DataError(
                    f"{where}: the model's chat template leaves out {_short(words)} of turn {index + 1} "
                    f"(assistant), which is to be learnt; remove it from the turn, or use a model whose "
                    f"template shows it."
                )
    for number, call in enumerate(_calls(turn)):
        name = _name(call)
        if name and is_left_out(_renamed(turn, number, f"{name}_or_other")):
            raise DataError(
                f"{where}: the model's chat template leaves out call {number + 1} ({name}) of turn "
                f"{index + 1}, which is to be learnt; remove it from the turn, or use a model whose template "
                f"shows it."
            )


def _is_in_doubt(turn: Turn, whole: str) -> bool:
    """Return whether the turn says something that may not stand in the whole, or by chance."""
    words = [text[thoughts_of(text) :].strip() for text in _texts(turn)]
    if any(len(one) >= TELLING and one in whole for one in words):
        return False
    return any(words) or any(_name(call) for call in _calls(turn))


def _doubtful(text: str, begin: int, own: str) -> list[tuple[int, int]]:
    """First and last character (exclusive) of what may not stand in an answer's own text, or by chance."""
    words = text[begin:].strip()
    if len(words) >= TELLING and words in own:
        return []
    pieces = list(_pieces(text, begin, len(text), _SEAMS))
    place = 0
    for first, end in pieces:
        start = own.find(text[first:end], place) if end - first >= TELLING else -1
        if start < 0:
            break
        place = start + end - first
    else:
        return []  # all stand there in their order
    parts: list[tuple[int, int]] = []
    for first, end in pieces:
        whole = text[first:end] in own
        parts += [(first, end)] if whole else _pieces(text, first, end, _LINES)
    return parts


def _pieces(text: str, begin: int, end: int, seams: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """The texts between seams, without the space around them."""
    place = begin
    for start, stop in [*(seam.span() for seam in seams.finditer(text, begin, end)), (end, end)]:
        piece = text[place:start]
        if piece.strip():
            first = place + len(piece) - len(piece.lstrip())
            yield first, first + len(piece.strip())
        place = stop


def thoughts_of(text: str) -> int:
    """Length of the thoughts that a text begins with."""
    return max((mark.end() for mark in _THOUGHTS_END.finditer(text)), default=0)


def _texts(turn: Turn) -> list[str]:
    content: Any = turn.get("content") or ""
    return [content] if isinstance(content, str) else [part.get("text", "") for part in content]


def _with_texts(turn: Turn, texts: Sequence[str]) -> Turn:
    content: Any = turn.get("content")
    if not content:
        return turn
    if isinstance(content, str):
        return {**turn, "content": texts[0]}
    parts = [{**part, "text": t} if "text" in part else part for part, t in zip(content, texts)]
    return {**turn, "content": parts}


def _said(turn: Turn, mark: str) -> Turn:
    """The turn with a mark for its words, save its thoughts, and for the names of its calls."""
    texts = [text[: thoughts_of(text)] + mark if text.strip() else text for text in _texts(turn)]
    turn = _with_texts(turn, texts)
    for number, call in enumerate(_calls(turn)):
        turn = _renamed(turn, number, mark) if _name(call) else turn
    return turn


def _calls(turn: Turn) -> Sequence[Mapping[str, Any]]:
    return cast("Sequence[Mapping[str, Any]]", turn.get("tool_calls") or [])


def _name(call: Mapping[str, Any]) -> str:
    function = call.get("function")
    inner = cast("Mapping[str, Any]", function) if isinstance(function, Mapping) else call
    name = inner.get("name")
    return name if isinstance(name, str) else ""


def _renamed(turn: Turn, number: int, name: str) -> Turn:
    """The turn with another name for one of its calls."""
    calls: list[Any] = list(_calls(turn))
    call = calls[number]
    is_inner = isinstance(call.get("function"), Mapping)
    calls[number] = (
        {**call, "function": {**call["function"], "name": name}}
        if is_inner
        else {**call, "name": name}
    )
    return {**turn, "tool_calls": calls}


def _rendered(render: RenderTurns, turns: Sequence[Turn]) -> str | None:
    """The rendered text; None where the template refuses, which shows that it reads what is changed."""
    try:
        return render(turns)
    except DataError:
        return None


def _short(words: str) -> str:
    return repr(words if len(words) <= _SHOWN else words[:_SHOWN] + "…")
