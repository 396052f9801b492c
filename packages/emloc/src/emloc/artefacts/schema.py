"""Typed descriptions of the JSON that others write, asked once, where it is read.

A schema says of what kind the values are that EMLoC looks at, and how large; what it does not look at may be
anything. Where a value is of another kind, one sentence names the file, the place and what stands there.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from emloc.errors import CheckpointError, EmlocError

SchemaT = TypeVar("SchemaT", bound=BaseModel)

Size = Annotated[int, Field(ge=1, le=1 << 31)]
"""A number of rows, columns, layers and the like."""

Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e30, le=1e30)]

Name = Annotated[str, Field(min_length=1, max_length=4096)]
"""Name of a file, a model, a layer."""

_SHOWN = 60


def _stays_inside(name: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        raise ValueError("it should be the name of a file in the folder")
    return name


FileName = Annotated[Name, AfterValidator(_stays_inside)]
"""Name of a file in the folder that the document lies in, or below."""


class Schema(BaseModel):
    """A description of some keys of an object; others may be there."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


def conforming(
    schema: type[SchemaT],
    content: Mapping[str, Any],
    where: Path | str,
    error: type[EmlocError] = CheckpointError,
) -> SchemaT:
    """The object as the schema describes it.

    Args:
        where: the file, for messages.
        error: that is raised.

    Raises:
        EmlocError: of the type `error`, in one sentence on the first value that is of another kind.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as problem:
        raise error(
            f"{where}: {first_fault(problem)}; correct it or download it again."
        ) from problem


def first_fault(problem: ValidationError) -> str:
    """`groups.0.rank is 'x': input should be a valid integer`: the first of what is wrong."""
    first = problem.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "its content"
    place = place if len(place) <= _SHOWN else f"{place[:_SHOWN]}…"
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    message = message[:1].lower() + message[1:]
    if first["type"] == "missing":
        return f"{place} is missing"
    shown = repr(first["input"])
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return f"{place} is {shown}: {message}"
