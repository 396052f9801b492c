"""Patterns of layer names, as PEFT matches its rank_pattern.

A pattern is a regular expression that must match from a dot or the beginning to the end of a name.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from emloc.errors import ConfigError

T = TypeVar("T")


def match_pattern(patterns: Mapping[str, T], name: str) -> T | None:
    """The value of the first pattern that matches the end of `name`, or None.

    Raises:
        ConfigError: a pattern is no regular expression.
    """
    for pattern, value in patterns.items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as problem:
            raise ConfigError(
                f"Pattern {pattern!r} is not a regular expression: {problem}."
            ) from problem
        if matched:
            return value
    return None
