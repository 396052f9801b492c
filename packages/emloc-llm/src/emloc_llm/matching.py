"""Is a prediction the reference? Compared whole: as text, as JSON, by its final number or option."""

import json
import re
from decimal import Decimal
from typing import Any, cast

from emloc_llm.numbers import Number, is_amount, read_number

_MARK = re.compile(r"(?<!#)####(?!#)")
_OPTION = re.compile(r"\(?([a-h])[).]*", re.IGNORECASE)
_SAID_OPTION = re.compile(r"\(?([a-h])(?:[).:]*|\).*)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+(?![\w/])")
_SPACED_FRACTION = re.compile(r"(?<=\d)\s*/\s*(?=\d)")
_SPACED_SIGN = re.compile(r"([=≈(]\s*)([-\u2212\u2013])\s+(?=[\d$.])")
_MIXED = re.compile(r"(?<=\d) (?=\d+/\d)")
_INNER_SPACE = "\ue000"
"""Stands for the space inside a number while a line is cut into words; no text has it."""
_BEFORE = "*_`~()[]{}<>\"'“”‘’;:!?="
_AFTER = _BEFORE + ".,"
"""Marks that may stand around a number in a sentence, in Markdown or TeX."""


def matches(reference: str, prediction: str, answer: str = "auto") -> bool:
    """Return whether a prediction is the reference.

    `auto` compares numbers where the reference ends in GSM8K's `#### number`, letters where it ends in
    `#### letter`, JSON where it parses as an object or list, and text otherwise. The final number of a
    prediction without `####` is its last number; a letter has to be marked. Of JSON, `true` is not `1` and
    `1` is `1.0`; what has a key twice, or NaN, is none.

    Args:
        answer: auto, text, number, option or json.
    """
    kind = _kind(reference) if answer == "auto" else answer
    if kind == "number":
        wanted, answered = _final_number(reference), _final_number(prediction)
        return wanted is not None and answered is not None and wanted.same(answered)
    if kind == "option":
        right, said = _final_option(reference), _said_option(prediction)
        return right is not None and right == said
    if kind == "json":
        try:
            return _same(_json(reference), _json(prediction))
        except (ValueError, RecursionError):
            return False
    return reference.strip() == prediction.strip()


def _kind(reference: str) -> str:
    ending = _ending(reference)
    if ending is not None and _number_at(ending) is not None:
        return "number"
    if _final_option(reference) is not None:
        return "option"
    try:
        parsed = _json(reference)
    except (ValueError, RecursionError):
        return "text"
    return "json" if isinstance(parsed, dict | list) else "text"


def _marked(text: str) -> list[str]:
    """The text behind a line's last `####`, for every line that has one."""
    parts = [_MARK.split(line) for line in text.splitlines()]
    return [part_groups[-1].strip() for part_groups in parts if len(part_groups) > 1]


def _ending(text: str) -> str | None:
    """The marked text of the last line; None if nothing is marked."""
    marked = _marked(text.rstrip().rpartition("\n")[2])
    return marked[-1] if marked else None


def _final_option(reference: str) -> str | None:
    match = _OPTION.fullmatch(_ending(reference) or "")
    return match[1].lower() if match else None


def _said_option(prediction: str) -> str | None:
    """The last marked letter; a word that begins a heading is none."""
    options = [match for said in _marked(prediction) if (match := _SAID_OPTION.fullmatch(said))]
    return str(options[-1][1]).lower() if options else None


def _final_number(text: str) -> Number | None:
    """The last marked number; without one, the last of all that stands in no heading."""
    text = _BOXED.sub(r" \1 ", text)
    marked = [number for said in _marked(text) if (number := _number_at(said))]
    if marked or _ending(text) is not None:
        return marked[-1] if marked else None
    lines = (_joined(line) for line in text.splitlines() if not line.startswith("#"))
    words = [word for line in lines for word in line.split()]
    numbers = [
        number
        for word, following in zip(words, [*words[1:], ""])
        if not is_amount(following) and (number := _number_at(word.rpartition("=")[2]))
    ]
    return numbers[-1] if numbers else None


def _joined(line: str) -> str:
    """A line in which numbers that are written with spaces (`1 200`, `7 1/2`, `= - 3`) are single words."""
    line = _THOUSANDS.sub(lambda match: "".join(match[0].split()), line)
    line = _SPACED_FRACTION.sub("/", line)
    line = _SPACED_SIGN.sub(r"\1\2", line)
    return _MIXED.sub(_INNER_SPACE, line)


def _number_at(said: str) -> Number | None:
    """The number that a few words are, without what stands around it."""
    said = said.replace("\\", "").replace(_INNER_SPACE, " ").strip().lstrip(_BEFORE).rstrip(_AFTER)
    if len(said) > 2 and said[0] == said[-1] == "$":  # TeX
        said = said[1:-1]
    return read_number(said)


def _json(text: str) -> Any:
    """Parsed, with exact numbers.

    Raises:
        ValueError: it is no JSON.
    """
    return json.loads(
        text, object_pairs_hook=_object, parse_float=Decimal, parse_constant=_no_constant
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _same(one: Any, other: Any) -> bool:
    """Equal with all that is inside; kinds of values count, the way a number is written does not."""
    if isinstance(one, dict) and isinstance(other, dict):
        left, right = cast("dict[str, Any]", one), cast("dict[str, Any]", other)
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(one, list) and isinstance(other, list):
        items, others = cast("list[Any]", one), cast("list[Any]", other)
        return len(items) == len(others) and all(map(_same, items, others))
    numbers = (int, Decimal)
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, numbers):
        return type(one) is type(other) and one == other
    return isinstance(other, numbers) and one == other
