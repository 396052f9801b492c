"""Cut a chat, as a template renders it, into what the assistant says and what it does not.

A turn of the assistant begins where the template puts its prompt for an answer and ends where the next
turn begins.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emloc.errors import DataError


def cut_chat(
    messages: Sequence[Mapping[str, Any]], render: Callable[..., str], every_answer: bool
) -> list[tuple[str, bool]]:
    """Consecutive texts, each with whether it is an answer; the last one is.

    Args:
        render: the first `count` messages as text, optionally with `add_generation_prompt=True`.
        every_answer: cut at every turn of the assistant instead of the last one only.

    Raises:
        DataError: the chat does not end with an answer, or its template cannot be cut.
    """
    if messages[-1].get("role") != "assistant":
        raise DataError(f"A chat must end with the assistant's turn: {messages}.")
    whole = render(len(messages))
    first = 0 if every_answer else len(messages) - 1
    pieces: list[tuple[str, bool]] = []
    done = 0
    for index in range(first, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        head = render(index, add_generation_prompt=True)
        turn = render(index + 1)
        if not (whole.startswith(head) and whole.startswith(turn)):
            raise DataError(
                "The tokenizer's chat template renders a prompt differently once it is answered; use "
                "prompt and completion columns."
            )
        pieces.append((whole[done : len(head)], False))
        pieces.append((whole[len(head) : len(turn)], True))
        done = len(turn)
    return pieces
