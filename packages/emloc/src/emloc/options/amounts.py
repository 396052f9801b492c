"""Amounts of memory as people write them: 24GiB, 24GB, 24g, 25769803776."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)\s*", re.IGNORECASE)


def parse_bytes(text: Any) -> Any:
    """A number of bytes. `24GB` are 24·10⁹; `24GiB`, `24G` and `24g` are 24·2³⁰, as for a GPU's memory.

    Raises:
        ValueError: it is none.
    """
    if text is None or (isinstance(text, int) and not isinstance(text, bool) and text > 0):
        return text
    match = _PATTERN.fullmatch(str(text))
    if match is None or float(match[1]) == 0:
        raise ValueError("expected an amount of memory such as 24GiB, 24GB or 25769803776")
    number, unit, suffix = match.groups()
    decimal = suffix.lower() == "b" and unit
    factor = 1000 ** ("kmgt".index(unit.lower()) + 1) if decimal else _UNITS[unit.lower()]
    return int(float(number) * factor)


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
