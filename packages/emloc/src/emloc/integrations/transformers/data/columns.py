"""The columns that a row's form takes, and the names that people give them.

What a row holds besides is said once per column: nothing is left out without a word.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from emloc.config import nearest
from emloc.errors import ConfigError, DataError
from emloc.integrations.transformers.data.rows import Row
from emloc.machine.progress import console

CHAT = ("tools", "system", "chat_template_kwargs")
"""Columns that any chat may have beside its turns."""

Forms: TypeAlias = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]

FORMS: Forms = {
    "messages": (("messages",), CHAT),
    "conversations": (("conversations",), CHAT),
    "alpaca": (("instruction", "output"), ("input", "history", *CHAT)),
    "prompt": (("prompt", "completion"), CHAT),
    "text": (("text",), ()),
}
"""Columns that each form needs, by its name, and those that it may have besides."""


_LISTS = ("messages", "conversations")


def form_of(row: Mapping[str, Any], forms: Forms = FORMS) -> str | None:
    """The first form whose columns the row has, with something in them (an empty text is something)."""
    for name, (needed, _) in forms.items():
        if all(_is_there(row, column) for column in needed):
            return name
    return None


def known_columns(forms: Forms) -> tuple[str, ...]:
    """All columns of these forms, without repetition."""
    return tuple(
        dict.fromkeys(column for pair in forms.values() for part in pair for column in part)
    )


def check_column_map(mapping: Mapping[str, str], known: Sequence[str]) -> None:
    """Refuse a map to what is no column of ours, or of two columns to one.

    Raises:
        ConfigError: names both.
    """
    for theirs, ours in mapping.items():
        if ours not in known:
            raise ConfigError(
                f"column_map maps {theirs} to {ours}, which is none of "
                f"{', '.join(dict.fromkeys(known))}."
            )
    twice = [ours for ours in mapping.values() if list(mapping.values()).count(ours) > 1]
    if twice:
        raise ConfigError(f"column_map maps two columns to {twice[0]}; remove one.")


def renamed(rows: Iterable[Row], mapping: Mapping[str, str], name: str) -> Iterator[Row]:
    """The rows with our column names. A column of ours that another one is mapped to gives way to it.

    Raises:
        DataError: the first row has no column of a mapped name.
    """
    if not mapping:
        yield from rows
        return
    for number, row in enumerate(rows):
        if number == 0:
            for theirs in mapping.keys() - row.keys():
                hint = nearest(theirs, list(row))
                raise DataError(f"Data set {name} has no column {theirs} (column_map).{hint}")
        kept = {key: value for key, value in row.items() if key not in mapping.values()}
        cells = {mapping.get(key, key): value for key, value in row.items() if key in mapping}
        rest = {key: value for key, value in kept.items() if key not in mapping}
        yield Row({**rest, **cells}, row.where, row.folder)


def say_unused(
    rows: Iterable[Row],
    name: str,
    forms: Forms = FORMS,
    others: Sequence[str] = (),
) -> Iterator[Row]:
    """The same rows; tells the user once of each column that holds something and is not used.

    Args:
        name: of the data set.
        others: columns that are used with any form.
    """
    said: set[str] = set()
    takes = {form: {*needed, *more, *others} for form, (needed, more) in forms.items()}
    for row in rows:
        form = form_of(row, forms)
        if form is not None:
            unused = [
                column
                for column, value in row.items()
                if column not in takes[form] and column not in said and value not in (None, "", [])
            ]
            if unused:
                said.update(unused)
                console.print(
                    f"Data set {name}: the column{'s' * (len(unused) > 1)} {', '.join(map(str, unused))} "
                    f"{'is' if len(unused) == 1 else 'are'} not used ({row.where})",
                    markup=False,
                    highlight=False,
                )
        yield row


def _is_there(row: Mapping[str, Any], column: str) -> bool:
    """An empty cell of a CSV is an empty text, and no turns."""
    value = row.get(column)
    return value is not None and value != [] and (value != "" or column not in _LISTS)
