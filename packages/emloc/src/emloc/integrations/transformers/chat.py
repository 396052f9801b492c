"""A chat as its template renders it: the whole, the prompt of the last answer, and where answers stand.

A turn of the assistant begins where the template puts its prompt for an answer and ends where the next turn
begins. Templates that mark the assistant's words themselves (`{% generation %}`) are taken by their word.
Positions are those of characters, so an answer is found where it stands and never by its words.

Templates are programs of somebody's. Some refuse a turn, some leave one out: both are errors here, since a
model must not learn from half a row.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from emloc.artefacts.read_errors import first_line
from emloc.errors import CheckpointError, DataError
from emloc.integrations.transformers.data.turns import Chat, Turn
from emloc.integrations.transformers.shown import (
    TELLING,
    check_answer,
    check_earlier_answers,
    other_than,
)
from emloc.machine.progress import console

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_USUAL_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "id"})


@dataclass(frozen=True)
class Rendered:
    """A chat as text.

    Attributes:
        text: the whole.
        prompt: what a model is given to answer the last turn.
        answers: first and last character (exclusive) of what the loss counts on, in order.
        last: first character of the last answer.
    """

    text: str
    prompt: str
    answers: Sequence[tuple[int, int]]
    last: int


def render(
    chat: Chat, tokenizer: Any, every_answer: bool, where: str, completion_only: bool = True
) -> Rendered:
    """The chat by the template of a tokenizer or processor.

    Args:
        every_answer: of the chat, instead of the last one or the completion.
        completion_only: where the row tells prompt and completion apart, nothing of the prompt is learnt.

    Raises:
        DataError: there is no template, it refuses the chat, leaves out a turn or part of an answer, or
            cannot be cut.
        CheckpointError: it is no template.
    """
    template = _template(tokenizer, chat.tools, where)
    _check_keys(chat, template, where)
    chat = _with_fitting_arguments(chat, tokenizer, where)
    turns = list(chat.turns)

    def text(turns: Sequence[Turn], prompt: bool = False) -> str:
        return _apply(chat, turns, tokenizer, prompt, where)

    whole = text(turns)
    prompt = text(turns[:-1], prompt=True)
    if not whole.startswith(prompt):
        raise DataError(
            f"{where}: the chat template renders a prompt differently once it is answered, so the answer "
            f"cannot be cut off; use prompt and completion columns."
        )
    last = len(prompt)
    for index, turn in enumerate(turns):
        _check_rendered(turns, index, turn, whole, text, where)
    _say_unshown_keys(turns, whole, template, text)
    check_earlier_answers(turns, whole, text, where)
    check_answer(turns, len(turns) - 1, whole, last, text, where)
    # As TRL has it: of a completion all is learnt, its turns of others as well, and of its prompt nothing.
    first, begin = (0, 0) if every_answer else (len(turns) - 1, last)
    if completion_only and chat.completion is not None:
        first = len(turns) - chat.completion
        head = text(turns[:first], prompt=True)
        if not whole.startswith(head):
            raise DataError(
                f"{where}: the completion does not begin where the chat template ends the prompt; let it "
                f"begin with the assistant's turn, or use messages."
            )
        begin = len(head)
    earlier = [n for n, turn in enumerate(turns[:-1]) if turn["role"] == "assistant" and n >= first]
    if not every_answer:
        for index in earlier:
            check_answer(turns, index, whole, None, text, where)
        return Rendered(whole, prompt, [(begin, len(whole))], last)
    if _MARKS.search(template):
        for index in earlier:
            check_answer(turns, index, whole, None, text, where)
        marked = _marked(chat, tokenizer, template, whole, where)
        marked = [(max(start, begin), end) for start, end in marked if end > begin]
        return Rendered(whole, prompt, marked, last)
    answers: list[tuple[int, int]] = []
    for index in earlier:
        head, through = text(turns[:index], prompt=True), text(turns[: index + 1])
        if not (whole.startswith(through) and through.startswith(head)):
            raise DataError(
                f"{where}: the chat template renders turn {index + 1} differently once the chat goes on, so "
                f"the answer cannot be cut out; leave assistant_only_loss out."
            )
        check_answer(turns, index, whole, len(head), text, where)
        answers.append((len(head), len(through)))
    return Rendered(whole, prompt, [*answers, (last, len(whole))], last)


def _template(tokenizer: Any, tools: Any, where: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{where} is a chat, but the model has no chat template; use an instruct model, or prompt and "
            f"completion columns."
        )
    try:
        if hasattr(tokenizer, "get_chat_template"):
            return str(tokenizer.get_chat_template(None, tools))
        return str(tokenizer._resolve_chat_template(None))
    except (ValueError, AttributeError) as problem:
        raise CheckpointError(f"The model's chat template cannot be chosen: {problem}") from problem


def _apply(chat: Chat, turns: Sequence[Turn], tokenizer: Any, prompt: bool, where: str) -> str:
    if not turns:
        raise DataError(f"{where}: the chat begins with the assistant's turn, so nothing is asked.")
    try:
        return str(
            tokenizer.apply_chat_template(
                list(turns),
                tools=chat.tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **chat.options,
            )
        )
    except jinja2.TemplateSyntaxError as problem:
        raise CheckpointError(
            f"The model's chat template is not a Jinja template ({problem}); download it again."
        ) from problem
    except Exception as problem:  # a template is a program, which may fail in any way
        first = first_line(problem)
        raise DataError(
            f"{where}: the model's chat template refuses the chat ({first}); change the row, or use a model "
            f"that takes such chats."
        ) from problem


def _with_fitting_arguments(chat: Chat, tokenizer: Any, where: str) -> Chat:
    """The chat with the arguments of its calls as the template takes them.

    Most templates write them as JSON themselves. Some (DeepSeek V3's) join them to text, which fails for
    objects: those get the JSON.
    """
    if not any(turn.get("tool_calls") for turn in chat.turns):
        return chat
    try:
        _apply(chat, chat.turns, tokenizer, False, where)
    except DataError as problem:
        if not isinstance(problem.__cause__, TypeError):
            raise
        turns = [_with_text_arguments(turn) for turn in chat.turns]
        return replace(chat, turns=turns)
    return chat


def _with_text_arguments(turn: Turn) -> Turn:
    calls: Sequence[Any] = turn.get("tool_calls") or ()

    def as_text(call: Mapping[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": as_text(call["function"])}
        return {**call, "arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}

    return {**turn, "tool_calls": [as_text(call) for call in calls]} if calls else turn


def _check_keys(chat: Chat, template: str, where: str) -> None:
    """Refuse a turn's keys that the template does not even mention, since it leaves them out."""
    if chat.tools and "tools" not in template:
        _say_once("The model's chat template shows no tools: the column tools is not used")
    for number, turn in enumerate(chat.turns, start=1):
        if turn.get("tool_calls") and "tool_calls" not in template:
            raise DataError(
                f"{where}: turn {number} calls a tool, but the model's chat template leaves such calls out; "
                f"use a model that calls tools."
            )


def _say_unshown_keys(turns: Sequence[Turn], whole: str, template: str, text: Any) -> None:
    """Say which keys of turns show nowhere, such as names; of the answer that is learnt, which do not show
    there, for templates show thoughts of the last answer alone."""
    for key in sorted({key for turn in turns for key in turn} - _USUAL_KEYS):
        having = [index for index, turn in enumerate(turns) if key in turn]
        if having[-1] == len(turns) - 1:
            having = having[-1:]
        # The first and the last one stand for all: each is a rendering of the chat.
        some = dict.fromkeys((having[0], having[-1]))
        if not any(_shows(turns, index, key, whole, template, text) for index in some):
            _say_once(f"The model's chat template does not show {key!r} of turns: it is not used")


def _shows(
    turns: Sequence[Turn], index: int, key: str, whole: str, template: str, text: Any
) -> bool:
    """Return whether a template shows a turn's key, by what it writes: it may mention another thing's."""
    value = turns[index][key]
    words = value.strip() if isinstance(value, str) else ""
    if key not in template and words not in whole:
        return False
    if not words:
        return key in template
    others = [*turns]
    others[index] = {**turns[index], key: other_than(words)}
    try:
        return text(others) != whole
    except DataError:  # so it is read
        return True


@cache
def _say_once(sentence: str) -> None:
    """Once per sentence and process."""
    console.print(sentence, markup=False, highlight=False)


def _check_rendered(
    turns: Sequence[Turn], index: int, turn: Turn, whole: str, text: Any, where: str
) -> None:
    """Refuse a template that leaves out a turn of others than the assistant."""
    if isinstance(turn.get("content"), list) and repr(turn["content"]) in whole:
        raise CheckpointError(
            f"{where}: the model's chat template takes only text and writes content entries as Python "
            f"objects; put the template of the model's processor into its folder."
        )
    if turn["role"] == "assistant" or not turn.get("content"):
        return
    content: Any = turn["content"]
    parts: list[Any] = [content] if isinstance(content, str) else content
    texts = [part if isinstance(part, str) else part.get("text", "") for part in parts]
    known = turn["role"] == "user" or max(map(len, texts)) >= TELLING
    if known and all(one.strip() in whole for one in texts):
        return
    # Not there as it is written, which may be the template's way, or too short to tell.
    words = other_than("".join(texts))
    other = words if isinstance(content, str) else [{"type": "text", "text": words}]
    changed = [*turns[:index], {**turn, "content": other}, *turns[index + 1 :]]
    try:
        without = text(changed)
    except DataError:  # so it is read
        return
    if without == whole:
        raise DataError(
            f"{where}: the model's chat template leaves out turn {index + 1} ({turn['role']}); take it out, "
            f"or use a model that takes such turns."
        )


def _marked(
    chat: Chat, tokenizer: Any, template: str, whole: str, where: str
) -> list[tuple[int, int]]:
    """The tokens that the template marks as the assistant's."""
    names: Mapping[str, Any] = getattr(tokenizer, "tokenizer", tokenizer).special_tokens_map
    texts, spans = render_jinja_template(
        conversations=[list(chat.turns)],
        tools=chat.tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**names, **chat.options},
    )
    marked_spans = [(int(start), int(end)) for start, end in spans[0] if end > start]
    if texts[0] != whole or not marked_spans:
        raise DataError(f"{where}: the chat template marks no words as the assistant's.")
    return marked_spans
