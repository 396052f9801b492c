"""Chats as token ids, cut into what the assistant says and what it does not.

The tokenizer's chat template renders the chat, and `cut_chat` cuts it. Templates that mark the
assistant's words themselves (`{% generation %}`) are taken by their word.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emloc.config import DataOptions
from emloc.errors import DataError
from emloc.integrations.transformers.chat import cut_chat


@dataclass(frozen=True)
class Piece:
    """Part of a sample.

    Attributes:
        ids: its tokens.
        answer: whether the loss counts on it.
        text: the reference answer, where it is one.
    """

    ids: list[int]
    answer: bool
    text: str | None


def chat_pieces(messages: Any, tools: Any, tokenizer: Any, options: DataOptions) -> list[Piece]:
    """The chat in pieces, the last answer last.

    With `assistant_only_loss` every turn of the assistant is an answer, otherwise the last one.

    Raises:
        DataError: there is no template, or it cannot be cut into turns.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "The data set holds chat messages and the tokenizer has no chat template; use an instruct "
            "model, or prompt and completion columns."
        )
    tools = json.loads(tools) if isinstance(tools, str) else tools
    messages = [{k: v for k, v in turn.items() if v is not None} for turn in messages]
    reference = _content(messages[-1])
    if options.assistant_only_loss and "{% generation" in str(tokenizer.chat_template):
        return _marked(messages, tools, tokenizer, reference)

    def render(count: int, **options: Any) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:count], tools=tools or None, tokenize=False, **options
            )
        )

    pieces = [
        Piece(_tokens(tokenizer, text), answer, None)
        for text, answer in cut_chat(messages, render, options.assistant_only_loss)
    ]
    last = pieces.pop()
    return [*pieces, Piece(last.ids, True, reference)]


def _marked(messages: Sequence[Any], tools: Any, tokenizer: Any, reference: str) -> list[Piece]:
    """Runs of tokens that the template marks as the assistant's, and those between."""
    found = tokenizer.apply_chat_template(
        messages, tools=tools or None, return_assistant_tokens_mask=True, return_dict=True
    )
    pieces: list[Piece] = []
    for token, answer in zip(found["input_ids"], found["assistant_masks"]):
        if not pieces or pieces[-1].answer != bool(answer):
            pieces.append(Piece([], bool(answer), None))
        pieces[-1].ids.append(token)
    answers = [index for index, piece in enumerate(pieces) if piece.answer]
    if not answers:
        raise DataError("The tokenizer's chat template marks no words as the assistant's.")
    # What follows the last answer (a closing tag) belongs to it, without loss.
    last = pieces[answers[-1]]
    tail = [token for piece in pieces[answers[-1] + 1 :] for token in piece.ids]
    kept = pieces[: answers[-1]]
    closing = [Piece(tail, False, reference)] if tail else []
    return [*kept, Piece(last.ids, True, reference), *closing]


def _content(turn: Any) -> str:
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return json.dumps(turn["tool_calls"], ensure_ascii=False)
    return str(content)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
