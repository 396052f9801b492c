"""The meaning of an option's text, wherever it was typed.

A command line gives text alone. A YAML file and `key=value` give numbers and booleans too (`yaml_file`),
which an option that is text takes as they were typed. In the end all is parsed by the option's own type.
"""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from emloc.options.yaml_file import NULLS, text_of


def from_command_line(field: FieldInfo, text: Any) -> Any:
    """`--option TEXT`: `null` or `~` is None where the option may be None, all else is text."""
    return None if text and text in NULLS and type(None) in _leaves(field.annotation) else text


def from_file(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Options as YAML gave them, those that are text as they were typed."""
    fields = model.model_fields
    return {
        name: _as_typed(fields[name].annotation, value) if name in fields else value
        for name, value in values.items()
    }


def whole_numbers(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Text such as `64` or `1e3` as a number where an option is a whole one; all else as it is.

    One of a few whole numbers (a `Literal`) is compared as it is, so text would be none of them.
    """
    fields = model.model_fields
    return {
        name: _whole(value) if isinstance(value, str) and _is_whole(fields, name) else value
        for name, value in values.items()
    }


def _is_whole(fields: Mapping[str, FieldInfo], name: str) -> bool:
    return name in fields and _leaves(fields[name].annotation) <= {int, type(None)}


def _whole(text: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        return text
    try:
        return int(text)  # a float would round what is long
    except ValueError:
        return int(number) if number.is_integer() else text


def _as_typed(annotation: Any, value: Any) -> Any:
    wanted = _leaves(annotation)
    several = _items(annotation) or wanted  # a list may stand for `a,b`, and one value for a list
    if isinstance(value, list):
        return [_text(several, one) for one in cast("list[Any]", value)]
    if isinstance(value, dict):
        given = cast("dict[str, Any]", value)
        return {key: _text(several, one) for key, one in given.items()}
    return _text(several if wanted & {list, dict} else wanted, value)


def _text(wanted: set[Any], value: Any) -> Any:
    is_text = bool(wanted & {str, Path}) and not wanted & {int, float, bool}
    if isinstance(value, bool):  # which would be the number 1, where a number is wanted
        is_text = bool not in wanted and Any not in wanted
    return text_of(value) if is_text and isinstance(value, (int, float)) else value


def _leaves(annotation: Any) -> set[Any]:
    """The types that an option may be; of a list, `list`; of names given one by one, `str`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _leaves(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return {leaf for part in get_args(annotation) for leaf in _leaves(part)}
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    return {origin or annotation}


def _items(annotation: Any) -> set[Any]:
    """The types of a list's items, or of a mapping's values."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _items(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return {leaf for part in get_args(annotation) for leaf in _items(part)}
    return _leaves(get_args(annotation)[-1]) if origin in (list, dict) else set()
