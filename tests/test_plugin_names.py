"""The promise of `emloc.plugin`: its names, with their parameters, fields and methods, are those of a file.

A name or a parameter that is gone, renamed or moved breaks plugins that require this minor version of
emloc. Such a change waits for the next one, and the changelog says what plugins have to do. Where the file
should change, run

    python tests/test_plugin_names.py

and commit it together with the change: additions at any time, all else with a new minor version.
"""

import inspect
import json
from pathlib import Path

from pydantic import BaseModel

import emloc.plugin

GOLDEN = Path(__file__).with_name("plugin_names.json")


def parameters(function):
    """`(self, batch, layer=None, *, seed=0)`: without types, which Python versions spell differently."""
    parts, keywords = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            parts, keywords = [*parts, "*"], True
        keywords = keywords or parameter.kind is parameter.VAR_POSITIONAL
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        given = "" if parameter.default is parameter.empty else f"={said(parameter.default)}"
        parts.append(f"{star}{parameter.name}{given}")
    return f"({', '.join(parts)})"


def said(value):
    plain = value is None or isinstance(value, bool | int | float | str | tuple | list | dict)
    return repr(value) if plain else "…"


def options(kind):
    return {
        name: "required"
        if field.is_required()
        else said(field.get_default(call_default_factory=True))
        for name, field in kind.model_fields.items()
    }


def members(kind):
    """Public methods and attributes that the class has of emloc, its parents' included."""
    ours = [base for base in kind.__mro__ if base.__module__.split(".")[0] == "emloc"]
    made = {}
    for base in reversed(ours):
        for name in inspect.get_annotations(base):
            if not name.startswith("_"):
                made[name] = "attribute"
        for name, value in vars(base).items():
            if name.startswith("_"):
                continue
            value = getattr(value, "__func__", value)
            made[name] = parameters(value) if inspect.isfunction(value) else "attribute"
    return made


def described(value):
    if isinstance(value, type) and issubclass(value, Exception):
        return {"is": [base.__name__ for base in value.__mro__[1:-2]], "exit_code": value.exit_code}
    if isinstance(value, type) and issubclass(value, BaseModel):
        return {"options": options(value)}
    if isinstance(value, type):
        protocol = getattr(value, "_is_protocol", False)
        return members(value) if protocol else {"__init__": parameters(value), **members(value)}
    if callable(value) and hasattr(value, "__code__"):
        return parameters(value)
    return said(value) if isinstance(value, str) else type(value).__name__


def promised():
    return {name: described(getattr(emloc.plugin, name)) for name in sorted(emloc.plugin.__all__)}


def test_names_and_signatures_are_those_that_were_promised():
    now, before = promised(), json.loads(GOLDEN.read_text("utf-8"))
    changed = sorted(
        name for name in now.keys() | before.keys() if now.get(name) != before.get(name)
    )
    assert not changed, f"{changed} of emloc.plugin changed; {GOLDEN.name}: {__doc__}"


def test_the_docstring_states_the_promise():
    text = " ".join(emloc.plugin.__doc__.split())
    assert "keeps its name, its parameters and its meaning" in text
    major, minor, _ = emloc.__version__.split(".")
    assert f"emloc>={major}.{minor},<{major}.{int(minor) + 1}" in text


def test_everything_listed_is_there_and_documented():
    assert len(set(emloc.plugin.__all__)) == len(emloc.plugin.__all__)
    assert set(emloc.plugin.__all__) <= set(dir(emloc.plugin))
    for name in emloc.plugin.__all__:
        value = getattr(emloc.plugin, name)
        assert not isinstance(value, type) or value.__doc__, name


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(promised(), indent=1, ensure_ascii=False) + "\n", "utf-8")
