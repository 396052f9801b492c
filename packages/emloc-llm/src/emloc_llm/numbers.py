"""Numbers as people and models write them, read whole or not at all.

    12 = 12.0 = $12 = 12%   1,200 = 1200   1,5 = 1.5   1.200,50 = 1200.5   1/2 = 0.5   1e3 = 1000   −3 = -3

A comma before exactly three digits separates thousands, another one is a decimal comma. What has more to it
than a number and its unit (`12:30`, `x+3`, `1,2,3`, `2 million`) is none.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

_LONGEST = 100
"""Characters; longer runs of digits come from models that repeat themselves."""

_SPACE_IN_NUMBER = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_SIGNS = str.maketrans("\u2212\u2013\ufe63\uff0d\uff0b\uff0c\uff0e\uff0f\uff05\uff04", "----+,./%$")
"""Minus signs, and full-width forms."""
_CURRENCY = "$€£¥₹"
_PLAIN = r"(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?|\.\d+"
_OTHER = r"\d+,\d+|\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}"
_LETTERS = r"[^\W\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2189]+"
"""Without raised digits and fractions, which Python counts among them."""
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<before>[{_CURRENCY}]?)\s*(?P<sign2>[-+]?)"
    rf"(?:(?P<whole>\d+)\s+(?=\d+/))?(?P<first>{_PLAIN}|{_OTHER})"
    r"(?:[eE](?P<power>[-+]?\d{1,3})|\s?/\s?(?P<second>\d+))?"
    rf"(?P<unit>\s?[%°{_CURRENCY}][A-Z]?|\s?{_LETTERS}(?:/{_LETTERS}|[²³])?(?:\s{_LETTERS}){{0,2}})?"
)
_AMOUNT = re.compile(r"\b(?:k|hundred|thousand|million|billion|trillion|dozen|half|\w+illions?)\b")


class Number(NamedTuple):
    """A value, and the unit that was written with it, if any."""

    value: Fraction
    unit: str

    def same(self, other: "Number") -> bool:
        """Equal values; units count where both have one."""
        units = {unit for unit in (self.unit, other.unit) if unit}
        return self.value == other.value and len(units) <= 1


def read_number(text: str) -> Number | None:
    """The number that a text is, or None."""
    if len(text) > _LONGEST:
        return None
    text = _SPACE_IN_NUMBER.sub("", text.strip()).translate(_SIGNS)
    # Digits of any script; those that are raised are none.
    text = "".join(str(unicodedata.decimal(letter, letter)) for letter in text)
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["sign2"]):
        return None
    unit = f"{match['before'] or ''}{(match['unit'] or '').strip()}".casefold()
    if is_amount(unit) or (match["whole"] and match["power"]):
        return None
    value = Fraction(_english(match["first"]))
    if match["power"]:
        value *= Fraction(10) ** int(match["power"])
    if match["second"]:
        if int(match["second"]) == 0:
            return None
        value = int(match["whole"] or 0) + value / int(match["second"])
    negative = "-" in (match["sign"], match["sign2"])
    return Number(-value if negative else value, unit)


def is_amount(unit: str) -> bool:
    """Return whether words make another number of the one before them: `million`, `dozen`."""
    return _AMOUNT.search(unit.casefold()) is not None


def _english(digits: str) -> str:
    """Digits with a decimal point and no other separators."""
    if re.fullmatch(_PLAIN, digits) and not re.fullmatch(r"0,\d+", digits):
        return digits.replace(",", "")
    return digits.replace(".", "").replace(",", ".")
