"""Text is text: nothing else is made into it.

`str()` of an object is Python and no answer, of a float it is another number than was written, and of
nothing it is `None`. So where a text belongs, anything else is refused. Only what a chat's schema has as
objects (turns, tools, the calls of tools) may be objects, and those may be written as JSON text; in a
template they become JSON as the template says. One thing has the same text in every language: an answer may
be a whole number.
"""

from collections.abc import Mapping
from typing import Any, cast

from emloc.errors import DataError
from emloc.machine.bounded_json import parse_json

_KINDS = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object",
          type(None): "missing", bytes: "bytes"}  # fmt: skip
_SHOWN = 60


def text_of(value: Any, what: str, where: str) -> str:
    """The value, which has to be text.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, str):
        return value
    kind = _KINDS.get(type(value), f"of the type {type(value).__name__}")
    if value is None:
        raise DataError(f"{where}: {what} is missing.")
    raise DataError(
        f"{where}: {what} is {kind} ({_short(value)}) but should be text; write it as text, in quotes."
    )


def answer_of(value: Any, what: str, where: str) -> str:
    """An answer, which has to be text or a whole number.

    Raises:
        DataError: it is something else.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if whole else text_of(value, what, where)


def listed(value: Any, what: str, where: str) -> list[Any]:
    """A list, also out of JSON text.

    Raises:
        DataError: it is no list.
    """
    parsed = _parsed(value, what, where)
    if not isinstance(parsed, (list, tuple)):
        raise DataError(f"{where}: {what} should be a list but is {_short(value)}.")
    return list(cast("list[Any]", parsed))


def mapped(value: Any, what: str, where: str) -> dict[str, Any]:
    """An object, also out of JSON text.

    Raises:
        DataError: it is no object.
    """
    parsed = _parsed(value, what, where)
    if not isinstance(parsed, Mapping):
        raise DataError(f"{where}: {what} should be an object but is {_short(value)}.")
    return dict(cast("Mapping[str, Any]", parsed))


def _parsed(value: Any, what: str, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as problem:
        raise DataError(
            f"{where}: {what} is text but not JSON ({_short(value)}); write it as JSON."
        ) from problem


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
