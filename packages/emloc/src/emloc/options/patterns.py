"""Patterns of layer names, as PEFT matches its rank_pattern: a regular expression for the end of a name.

A pattern may be somebody else's, out of an adapter's configuration, and Python's matcher goes through all
the ways in which one could fit: `.*` ten times and a `!` have more of them for one name than a lifetime has
seconds. So the ways are counted before anything is matched.
"""

import importlib
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from emloc.errors import ConfigError

T = TypeVar("T")

LONGEST = 2000
"""Characters of a pattern."""
MOST_WAYS = 1_000_000
"""Ways in which one pattern may fit a name of `USUAL` characters: three times `.*`, and not four."""
USUAL = 80
MOST_STEPS = 100_000_000
"""Ways of all patterns over all names of one adapter: a second or so."""

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def match_pattern(patterns: Mapping[str, T], name: str) -> T | None:
    """The value of the first pattern that matches from a dot or the beginning to the end of `name`, or None.

    Raises:
        ConfigError: a pattern is no regular expression, or one that could take for ever.
    """
    for pattern, value in patterns.items():
        if _compiled(pattern).match(name):
            return value
    return None


def require_pattern(pattern: str) -> None:
    """Refuse what is no regular expression, or one that could take for ever.

    Raises:
        ConfigError: says which.
    """
    _compiled(pattern)


def require_matching(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Refuse a pattern that matches nothing: it is a typo, and would be found out hours later.

    Raises:
        ConfigError: names the option, the pattern and a name that there is.
    """
    for pattern in patterns:
        if not any(match_pattern({pattern: True}, name) for name in names):
            example = max(names, key=lambda name: name.count("."), default="(none)")
            raise ConfigError(
                f"{option}: {pattern!r} matches no layer; it must match the end of a name such as {example}."
            )


def require_affordable(patterns: Iterable[str], names: Sequence[str]) -> None:
    """Refuse patterns that would take too long over all of the names.

    Raises:
        ConfigError: they would, or one is no regular expression.
    """
    longest = max(map(len, names), default=0)
    ways = (_ways_of(pattern, longest) for pattern in patterns)
    if sum(count for count in ways if count > 1) * len(names) > MOST_STEPS:
        raise ConfigError(
            f"Its patterns could match {len(names)} names of up to {longest} characters in too many ways; "
            f"write fewer, or with fewer repetitions (such as .*)."
        )


@lru_cache(maxsize=1 << 16)
def _compiled(pattern: str) -> re.Pattern[str]:
    if _ways_of(pattern, USUAL) > MOST_WAYS:
        raise ConfigError(
            f"Pattern {_shown(pattern)} could match a name in too many ways; write it with fewer "
            f"repetitions (such as .*), none inside another."
        )
    return re.compile(_whole(pattern))


@lru_cache(maxsize=1 << 16)
def _ways_of(pattern: str, length: int) -> float:
    try:
        if len(pattern) > LONGEST:
            raise re.error(f"it has more than {LONGEST} characters")
        return _ways(_parser.parse(_whole(pattern)).data[1:], length)
    except (re.error, RecursionError, OverflowError) as problem:
        why = "it is nested too deeply" if isinstance(problem, RecursionError) else problem
        raise ConfigError(
            f"Pattern {_shown(pattern)} is not a regular expression: {why}."
        ) from problem


def _whole(pattern: str) -> str:
    """The expression that is matched from the beginning of a name: something and a dot, and the pattern."""
    return rf"(.*\.)?({pattern})$"


def _ways(parsed: Any, length: int) -> float:
    """The most ways in which a parsed pattern can fit a part of a text of this length; infinity for many."""
    ways = 1.0
    for operation, argument in parsed:
        ways *= _ways_of_part(str(operation), argument, length)
    return ways


def _ways_of_part(operation: str, argument: Any, length: int) -> float:
    if operation in _REPEATS:
        low, high, body = argument
        inner, high = _ways(body, length), min(int(high), length)
        if inner == 1:
            return max(1, high - low + 1)
        return sum(inner**times for times in range(low, high + 1)) if high <= 3 else math.inf
    if operation == "BRANCH":
        return sum(_ways(choice, length) for choice in argument[1])
    if operation == "GROUPREF_EXISTS":
        return sum(_ways(choice, length) for choice in argument[1:] if choice is not None)
    if operation in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _ways(argument[-1], length)
    if operation == "ATOMIC_GROUP":
        return _ways(argument, length)
    return 1


def _shown(pattern: str) -> str:
    return repr(pattern) if len(pattern) <= 80 else f"{pattern[:80]!r}…"
