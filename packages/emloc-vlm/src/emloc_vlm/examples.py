"""One row of a visual data set, whatever its form, as a chat with images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from emloc.errors import DataError
from emloc_vlm.images import ImageRef, image_source

PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
          "system": "system"}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One chat with images.

    Attributes:
        messages: turns whose content is a list of `{"type": "image"}` and `{"type": "text", "text"}`.
        images: in the order of their entries.
        references: accepted answers of the last turn; the turn itself holds the first.
        options: letters to texts, where the question is one of multiple choice.
        kind: what the benchmark sorts by, such as closed and open.
        metric: how the benchmark scores it.
        where: file and line.
    """

    messages: Sequence[Mapping[str, Any]]
    images: tuple[ImageRef, ...]
    references: tuple[str, ...]
    options: Mapping[str, str]
    kind: str | None
    metric: str | None
    where: str


def example_of(row: Mapping[str, Any], where: str, folder: Path) -> Example:
    """The row as a chat.

    Args:
        where: file and line, for messages.
        folder: where its image paths begin.

    Raises:
        DataError: it has no columns that we know, or is malformed.
    """
    if row.get("messages"):
        turns, inside = _from_messages(row["messages"], where)
    elif row.get("conversations"):
        turns, inside = _from_conversations(row["conversations"], where), []
    elif row.get("question") is not None and row.get("answer") is not None:
        turns, inside = _from_table(row), []
    else:
        raise DataError(
            f"{where} has the columns {', '.join(sorted(map(str, row)))}; needed are messages, "
            f"conversations, or image, question and answer. Name yours with column_map, for example "
            f"query=question."
        )
    given = _listed(row.get("images")) or _listed(row.get("image"))
    sources = [found if found is not None else given.pop(0) for found in inside if found or given]
    sources += given
    turns = _with_entries(turns, len(sources), where)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{where}: the chat must end with the assistant's turn.")
    answer = row.get("answer")
    references = [str(a) for a in _listed(answer)] or [_text(turns[-1])]
    return Example(
        turns,
        tuple(ImageRef(image_source(source, folder, where), where) for source in sources),
        tuple(references),
        row.get("options") or {},
        row.get("kind"),
        row.get("metric"),
        where,
    )


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else [value]


def _from_table(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    question = str(row["question"])
    options = cast("Mapping[str, str]", row.get("options") or {})
    question += "".join(f"\n{letter}. {text}" for letter, text in options.items())
    answer = str(_listed(row["answer"])[0]) if _listed(row["answer"]) else ""
    return [_turn("user", question), _turn("assistant", answer)]


def _from_conversations(turns: Any, where: str) -> list[dict[str, Any]]:
    chat: list[dict[str, Any]] = []
    for turn in turns:
        speaker = str(turn.get("from") or turn.get("role"))
        if speaker not in _ROLES:
            raise DataError(f"{where}: a turn from {speaker!r}; known are {', '.join(_ROLES)}.")
        value = turn.get("value", turn.get("content"))
        chat.append(_turn(_ROLES[speaker], str(value)))
    return chat


def _from_messages(turns: Any, where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """The turns with image entries left empty, and what those entries held (None: nothing)."""
    chat: list[dict[str, Any]] = []
    inside: list[Any] = []
    for turn in turns:
        content = turn.get("content")
        if isinstance(content, str):
            chat.append(_turn(str(turn["role"]), content))
            continue
        parts: list[dict[str, Any]] = []
        for part in content or []:
            if part.get("type") == "image":
                inside.append(
                    next((part[k] for k in ("image", "path", "url") if part.get(k)), None)
                )
                parts.append({"type": "image"})
            elif part.get("type") == "text":
                parts.append({"type": "text", "text": str(part["text"])})
            else:
                raise DataError(
                    f"{where}: a content entry of type {part.get('type')!r}; known are image and text."
                )
        chat.append({"role": str(turn["role"]), "content": parts})
    return chat, inside


def _turn(role: str, text: str) -> dict[str, Any]:
    """A turn whose `<image>` marks have become entries."""
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        # InternVL writes the mark on a line of its own; templates set images off themselves.
        piece = piece.strip("\n") if PLACEHOLDER in text else piece
        if piece:
            parts.append({"type": "text", "text": piece})
    return {"role": role, "content": parts or [{"type": "text", "text": ""}]}


def _with_entries(turns: list[dict[str, Any]], images: int, where: str) -> list[dict[str, Any]]:
    """As many image entries as images: without any marks, images come before the first question."""
    marks = sum(part["type"] == "image" for turn in turns for part in turn["content"])
    if marks == images:
        return turns
    if marks:
        raise DataError(f"{where}: {marks} places for images and {images} images.")
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = [{"type": "image"}] * images + turn["content"]
            return turns
    raise DataError(f"{where}: there are images and no turn of the user.")


def _text(turn: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")
