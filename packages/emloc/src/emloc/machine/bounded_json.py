"""JSON of somebody's, read within limits: no deeper, no longer and no larger in number than any use has.

Python's reader takes what breaks its users later: nesting that no recursion gets through, integers that no
float holds, half a character (`"\\ud83d"`) that no file can be written with, and a short text that becomes a
gigabyte of empty lists. Rows of data are bounded in depth alone: of what they hold, only what is used counts.
"""

import json
import re
from collections.abc import Callable
from typing import Any, cast

DEEPEST = 100
"""Objects and lists within one another."""

MOST_BYTES = 128 << 20
"""Bytes of a file beside a model's weights; the largest tokenizers have some 40 MiB."""

MOST_VALUES = 8_000_000
"""Values of such a file; the largest tokenizers have some 2 million."""

LONGEST_INTEGER = 40
"""Digits of a whole number in such a file; transformers writes some of 31 (`model_max_length`)."""

_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(
    text: str, fraction: Callable[[str], Any] = float, whole: Callable[[str], Any] = int
) -> Any:
    """The value of a JSON text.

    Args:
        fraction, whole: make numbers of those with a point or an exponent, and of the others.

    Raises:
        ValueError: it is no JSON (`json.JSONDecodeError`), is nested too deeply, or holds a number of more
            digits than Python reads; one sentence, without a full stop.
    """
    try:
        value: Any = json.loads(text, parse_float=fraction, parse_int=whole)
    except RecursionError as problem:
        raise _too_deep() from problem
    if text.count("[") + text.count("{") > DEEPEST:
        _refuse_deep(value)
    return value


def parse_document(text: str) -> Any:
    """The value of a JSON file beside a model's weights: `parse_json` within all limits.

    Raises:
        ValueError: as `parse_json`, or one of the limits is passed.
    """
    if text.count(",") + text.count("[") + text.count("{") > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES:,} values")
    value = parse_json(text, whole=_whole)
    if _HALF.search(text):  # only escapes can write one
        _refuse_halves(value)
    return value


def _whole(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)


def _refuse_deep(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [inner for one in level for inner in _inner(one) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise _too_deep()


def _inner(value: Any) -> Any:
    if isinstance(value, dict):
        return cast("dict[str, Any]", value).values()
    return cast("list[Any]", value) if isinstance(value, list) else ()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {DEEPEST} deep")


def _refuse_halves(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        half = ascii(problem.object[problem.start])
        raise ValueError(f"it holds half a character, {half}") from problem
