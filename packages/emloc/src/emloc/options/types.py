"""Types of options: what may be typed for each, and the names that libraries give to choices."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field

from emloc.options.patterns import require_pattern
from emloc.options.yaml_file import parse_value, text_of


def split(value: Any) -> Any:
    """`a,b` or `[a, b]` from a command line as a list; one number as a list of one."""
    if isinstance(value, (int, float)):
        return [value]
    if not isinstance(value, str):
        return value
    if value.startswith("[") and isinstance(listed := parse_value(value), list):
        return [_typed(one) for one in cast("list[Any]", listed)]
    return [part.strip() for part in value.split(",") if part.strip()]


def _typed(value: Any) -> Any:
    """Parse what was typed in a list or mapping, for the option's own type to read."""
    return text_of(value) if isinstance(value, (int, float)) else value


def _pairs(value: Any) -> Any:
    """`a=b,c=d` or `{a: b}` from a command line as a mapping."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("{") and isinstance(mapped := parse_value(text), dict):
        return {name: _typed(one) for name, one in cast("dict[str, Any]", mapped).items()}
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if any("=" not in part for part in parts):
        raise ValueError("expected name=value,name=value or {name: value}")
    return dict(part.rsplit("=", 1) for part in parts)


def _patterns(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse names that are no regular expressions, before anything is matched with them."""
    for pattern in value:
        require_pattern(pattern)
    return value


LONGEST_NAME = 255
"""Bytes of a file's name, at most, on every file system in use."""


def joined(value: Any) -> Any:
    """A list of data sets as the comma-separated text that a command line gives; `~` is the home folder."""
    if isinstance(value, list):
        value = ",".join(map(str, cast("list[Any]", value)))
    if not isinstance(value, str) or not value.strip():
        return _home(value)
    return ",".join(str(_home(part)) if part.strip() else part for part in value.split(","))


def _limit(value: Any) -> Any:
    return "none" if value is None else value


def _home(value: Any) -> Any:
    """`~` as the home folder, in what may be a path; an empty name, of a variable that is not set, is
    refused, and one that no disk can have."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("it is empty; name something, or leave the option out")
    refuse_long(value)
    return os.path.expanduser(value) if value[:1] == "~" else value


def _named(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("it is empty; name a folder")
    return os.path.expanduser(value) if isinstance(value, str | Path) else value


def refuse_long(name: str) -> None:
    """Refuse a name that no disk can have.

    Raises:
        ValueError: it is one.
    """
    longest = max(len(part.encode("utf-8", "surrogatepass")) for part in name.split("/"))
    if longest > LONGEST_NAME and "://" not in name:
        raise ValueError(f"it has a name of {longest} bytes; file systems allow {LONGEST_NAME}")


Names = Annotated[list[str], BeforeValidator(split)]
TextMap = Annotated[dict[str, str], BeforeValidator(_pairs)]
RatioMap = Annotated[
    dict[str, Annotated[float, Field(gt=0, le=1)]],
    BeforeValidator(_pairs),
    AfterValidator(_patterns),
]
CountMap = Annotated[
    dict[str, Annotated[int, Field(ge=1)]], BeforeValidator(_pairs), AfterValidator(_patterns)
]
Located = Annotated[str, BeforeValidator(_home)]
"""A local folder or file, or a hub id."""

OutputDir = Annotated[Path, BeforeValidator(_named)]
"""A folder's name; `~` is the home folder, as in a shell."""

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Optimizer = Literal[
    "adamw_torch_fused", "adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit",
    "paged_adamw_32bit", "adafactor", "sgd", "prodigy",
]  # fmt: skip
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt",
]  # fmt: skip
"""transformers' schedules that need nothing but a length and a warm-up."""

DEQUANTISED = "dequantised"
"""A word in place of a limit: no correction, but the weights that the LoRA was trained beside in few bits."""

Limit = Annotated[
    Annotated[float, Field(ge=0)] | Literal["auto", "none", "dequantised"], BeforeValidator(_limit)
]

GivenLimit = Annotated[
    Annotated[float, Field(ge=0)] | Literal["none", "dequantised"], BeforeValidator(_limit)
]
"""A limit that is not left to data."""
