"""Options made of keywords, with one sentence on the first that is wrong."""

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from emloc.errors import ConfigError
from emloc.options.text import whole_numbers

_SHOWN_CHARACTERS = 100

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """` Did you mean X?` for an unknown name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def build(model: type[ConfigT], options: Mapping[str, Any], where: str) -> ConfigT:
    """Validate options; `where` names their origin in messages.

    A path that one stage returned is taken where another one expects a name.

    Raises:
        ConfigError: one sentence on the first thing wrong.
    """
    named = {name: _as_text(value) for name, value in options.items()}
    try:
        return model(**whole_numbers(model, named))
    except ValidationError as problem:
        raise ConfigError(f"{where}: {_sentence(model, problem.errors()[0])}") from problem


def _as_text(value: Any) -> Any:
    """A path, or a list with paths, as text; all else as it is. Options that are paths take either."""
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if isinstance(value, list):
        return [_as_text(item) for item in cast("list[Any]", value)]
    return value


def _sentence(model: type[BaseModel], first: ErrorDetails) -> str:
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"unknown option {name}.{nearest(name, cast('dict[str, Any]', model.model_fields))}"
    if first["type"] == "missing":
        return f"{name} is required ({model.model_fields[name].description})."
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        allowed = _allowed(model, name)
        message += f".{nearest(first['input'], allowed)}" if allowed else ""
    shown = repr(first["input"])
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[: _SHOWN_CHARACTERS - 1]}…"
    start = f"{name} = {shown}: " if name else ""
    end = "" if message.endswith(("?", ".")) else "."
    return f"{start}{message[0].lower()}{message[1:]}{end}"


def _allowed(model: type[BaseModel], name: str) -> list[str]:
    field = model.model_fields.get(name)
    values = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
    return [value for value in values if isinstance(value, str)]
