"""One row of a visual data set, whatever its form, as a chat with images."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from PIL import Image

from emloc.errors import DataError
from emloc.integrations.transformers.data.columns import CHAT, FORMS, Forms, form_of
from emloc.integrations.transformers.data.texts import answer_of, listed, mapped, text_of
from emloc.integrations.transformers.data.turns import Chat, Turn, chat_of
from emloc_vlm.images import ImageRef, image_source

PLACEHOLDER = "<image>"
VISUAL_FORMS: Forms = {
    **{name: columns for name, columns in FORMS.items() if name != "text"},
    "table": (("question", "answer"), ("options", "kind", *CHAT)),
}
IMAGE_COLUMNS = ("image", "images")
REFERENCES = "answer"
_TURNS_BEFORE = re.compile(r"(^|\n)\Z")
_LIKE_IMAGE = re.compile(r"image|img|picture|photo|figure|pixel", re.IGNORECASE)
_NAMES_A_ROW = re.compile(r"(^|[_ ])(id|index|idx|size|width|height|count)s?$", re.IGNORECASE)
_KEYS = ("image", "path", "url", "image_url")


@dataclass(frozen=True)
class Example:
    """One chat with images.

    Attributes:
        chat: turns whose content is a list of `{"type": "image"}` and `{"type": "text", "text"}`.
        images: in the order of their entries.
        references: accepted answers of the last turn, which holds the first itself; none where it calls
            tools, which the template writes (`emloc_vlm.encode.references_of`).
        options: letters to texts, where the question is one of multiple choice.
        kind: what the benchmark sorts by, such as closed and open.
        metric: how the benchmark scores it.
        where: file and line.
    """

    chat: Chat
    images: tuple[ImageRef, ...]
    references: tuple[str, ...]
    options: Mapping[str, str]
    kind: str | None
    metric: str | None
    where: str

    @property
    def messages(self) -> Sequence[Turn]:
        """The turns."""
        return self.chat.turns


def example_of(
    row: Mapping[str, Any], where: str, folder: Path, metric: str | None = None
) -> Example:
    """The row as a chat.

    Args:
        where: file and line, for messages.
        folder: where its image paths begin.
        metric: how the benchmark scores it, if it is one's.

    Raises:
        DataError: it has no columns that we know, or is malformed.
    """
    options = mapped(row["options"], "options", where) if row.get("options") else {}
    options = {key: text_of(one, f"option {key}", where) for key, one in options.items()}
    chat = _chat(row, options, where)
    given, alone = _listed(row.get("images"), where), _listed(row.get("image"), where)
    twice = next((one for one in alone if isinstance(one, str) and one in given), None)
    if twice is not None:
        raise DataError(
            f"{where}: the columns image and images both name {twice!r}; leave one of them out, or it is "
            f"shown twice."
        )
    given += alone
    turns, sources = _placed([dict(turn) for turn in chat.turns], given, where)
    if not sources:
        _check_no_image(row, where)
    accepted = row.get(REFERENCES)
    references = [
        answer_of(one, "answer", where)
        for one in (accepted if isinstance(accepted, (list, tuple)) else [accepted])
        if one is not None
    ]
    kind = row.get("kind")
    return Example(
        replace(chat, turns=turns),
        tuple(ImageRef(image_source(source, folder, where), where) for source in sources),
        tuple(references) or _said(turns[-1]),
        options,
        None if kind is None else text_of(kind, "kind", where),
        metric,
        where,
    )


def _chat(row: Mapping[str, Any], options: Mapping[str, str], where: str) -> Chat:
    form = form_of(row, VISUAL_FORMS)
    if form is None:
        raise DataError(
            f"{where} has the columns {', '.join(sorted(map(str, row)))}; expected messages, conversations, "
            f"or image, question and answer. Name yours with column_map, for example query=question."
        )
    if form == "table":
        question = text_of(row["question"], "question", where)
        question += "".join(f"\n{letter}. {text}" for letter, text in options.items())
        answer = row["answer"]
        first = answer[0] if isinstance(answer, (list, tuple)) else answer
        turns = [("user", question), ("assistant", answer_of(first, "answer", where))]
        messages = [{"role": role, "content": content} for role, content in turns]
        row = {**{key: row.get(key) for key in CHAT}, "messages": messages}
    chat = chat_of(row, where, _content)
    if chat is None:
        raise DataError(
            f"{where}: prompt and completion are plain text; name them question and answer with column_map, "
            f"or write turns."
        )
    return chat


def _content(value: Any, what: str, where: str) -> list[dict[str, Any]]:
    """Content as entries; those of images hold their `source`, None where a column has it."""
    if not isinstance(value, (list, tuple)):
        return _marked(text_of(value, what, where))
    entries: list[dict[str, Any]] = []
    kinds = [part.get("type") for part in value if isinstance(part, Mapping)]
    placed = "image" in kinds or "image_url" in kinds  # marks are then but words
    for part in cast("Sequence[Any]", value):
        entry = cast("Mapping[str, Any]", part) if isinstance(part, Mapping) else {}
        kind = entry.get("type")
        if kind in ("image", "image_url"):
            source = next((entry[key] for key in _KEYS if entry.get(key)), None)
            if kind == "image_url" and isinstance(source, Mapping):
                source = cast("Mapping[str, Any]", source).get("url")
            entries.append({"type": "image", "source": source})
        elif kind == "text":
            text = text_of(entry.get("text"), f"a text entry of {what}", where)
            entries += [{"type": "text", "text": text}] if placed else _marked(text)
        else:
            raise DataError(
                f"{where}: {what} has an entry of type {kind!r}; expected image or text."
            )
    return entries


def _marked(text: str) -> list[dict[str, Any]]:
    """Text whose `<image>` marks have become entries.

    A mark on a line of its own takes the line's end with it, for templates set images off themselves. All
    other space stays.
    """
    entries: list[dict[str, Any]] = []
    pieces = text.split(PLACEHOLDER)
    for index, piece in enumerate(pieces):
        if index:
            entries.append({"type": "image", "source": None})
        kept = piece
        if index and _TURNS_BEFORE.search(pieces[index - 1]):
            kept = re.sub(r"\A\r?\n", "", kept)
        if index == len(pieces) - 2 and not pieces[-1]:
            kept = re.sub(r"\r?\n\Z", "", kept)
        if kept:
            entries.append({"type": "text", "text": kept})
    return entries or [{"type": "text", "text": ""}]


def _placed(turns: list[Turn], given: list[Any], where: str) -> tuple[list[Turn], list[Any]]:
    """The turns with bare image entries, and the images' sources in the order of the entries.

    Without any marks, images come before the first question.
    """
    places = [
        entry for turn in turns for entry in turn.get("content", []) if entry["type"] == "image"
    ]
    empty = sum(entry["source"] is None for entry in places)
    if given and not places:
        asked = next((turn for turn in turns if turn["role"] == "user"), None)
        if asked is None:
            raise DataError(f"{where}: there are images but no user turn.")
        entries = [{"type": "image", "source": source} for source in given]
        asked["content"] = [*entries, *asked["content"]]
    elif empty != len(given):
        raise DataError(
            f"{where}: {len(places)} places for images, but {len(places) - empty + len(given)} images."
        )
    rest = iter(given)
    sources: list[Any] = []
    for turn in turns:
        entries = turn.get("content", [])
        for entry in entries:
            if entry["type"] == "image":
                sources.append(next(rest) if entry["source"] is None else entry["source"])
        if entries:
            turn["content"] = [
                {key: one for key, one in entry.items() if key != "source"} for entry in entries
            ]
    return turns, sources


def _check_no_image(row: Mapping[str, Any], where: str) -> None:
    """Refuse a row without images that has one in a column of another name."""
    used = {column for pair in VISUAL_FORMS.values() for part in pair for column in part}
    for column, value in row.items():
        if column not in used and value and _is_image(column, value):
            raise DataError(
                f"{where}: the column {column} seems to hold an image, but images are read from the columns "
                f"image and images; pass column_map {column}=image, or remove the column."
            )


def _is_image(column: str, value: Any) -> bool:
    if _NAMES_A_ROW.search(column):
        return False  # said, as other columns that are not used are
    one = value[0] if isinstance(value, (list, tuple)) else value
    if isinstance(one, (bytes, Image.Image)):
        return True
    if isinstance(one, Mapping):
        return {"bytes", "path"} & one.keys() != set()
    if not isinstance(one, str):
        return False
    named = Path(one).suffix.lower() in Image.registered_extensions() if len(one) < 4096 else False
    return named or bool(_LIKE_IMAGE.search(column)) or one.startswith("data:image")


def _listed(value: Any, where: str) -> list[Any]:
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        return listed(value, "images", where)
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else [value]


def _said(turn: Turn) -> tuple[str, ...]:
    """The words of a turn that calls no tools."""
    return () if turn.get("tool_calls") else (words_in(turn),)


def words_in(turn: Turn) -> str:
    """The text among a turn's entries."""
    return "".join(one["text"] for one in turn.get("content", []) if one["type"] == "text")
