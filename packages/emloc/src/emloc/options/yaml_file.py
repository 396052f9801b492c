"""YAML as people mean it: a value keeps the text that was typed, and an option's type decides what it is.

YAML 1.1 would make `no` a boolean, `2024-01-05` a date, `010` eight, `1:30` ninety and `1e-3` text. Here a
plain value becomes a number or a boolean only where its text can be had back from it (`3`, `0.25`,
`true`); everything else stays text, which options parse as they parse the command line's. `null`, `~` and
nothing are null; a key that stands twice is refused; keys are text.

A short file may mean a long one, by aliases of aliases: what it means is counted before it is made.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from emloc.errors import ConfigError
from emloc.machine.special_files import refuse_special

NULLS = ("", "~", "null", "Null", "NULL")
_MERGE, _TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"
_LONGEST_NUMBER = 24
MOST_BYTES = 4 << 20
MOST_VALUES = 100_000
"""Values of a file, and of what its aliases and merged mappings make of it."""
MOST_OPTIONS = 10_000
"""The same of a file of options."""
DEEPEST = 50
"""Mappings and lists within one another."""


class BoundedLoader(yaml.SafeLoader):
    """PyYAML's own, within the limits of this module: a ConfigError names the line where one is passed."""

    most = MOST_VALUES

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}
        self._depth = self._count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count what a node holds, that of aliases included; refuse one that holds itself."""
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        self._depth += 1
        self._count += 1
        if self._depth > DEEPEST:
            raise ConfigError(f"line {line}: it is nested more than {DEEPEST} deep")
        if self._count > self.most:
            raise ConfigError(f"line {line}: it holds more than {self.most:,} values")
        node = cast("Node", super().compose_node(parent, index))
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise ConfigError(f"line {line}: *{event.anchor} occurs inside what it refers to")
        else:
            inner = node.value if isinstance(node.value, list) else ()
            parts = (part if isinstance(part, tuple) else (part,) for part in inner)
            self._sizes[id(node)] = 1 + sum(
                self._sizes.get(id(n), 1) for part in parts for n in part
            )
        if self._sizes[id(node)] > self.most:
            raise ConfigError(f"line {line}: it holds more than {self.most:,} values")
        return node


def load_bounded(text: str) -> Any:
    """YAML 1.1 within the limits of this module, ten times as fast where it has no aliases.

    Raises:
        ConfigError: a limit is passed.
        yaml.YAMLError: it is no YAML.
    """
    parser: Any = getattr(yaml, "CSafeLoader", None)  # of libyaml, which PyYAML may lack
    if parser is None:
        return yaml.load(text, BoundedLoader)
    count = depth = 0
    for event in yaml.parse(text, parser):
        if isinstance(event, yaml.AliasEvent):
            return yaml.load(text, BoundedLoader)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        if count > MOST_VALUES or depth > DEEPEST:
            raise ConfigError(
                f"it holds more than {MOST_VALUES:,} values, or is nested more than {DEEPEST} deep"
            )
    return yaml.load(text, parser)


class _Loader(BoundedLoader):
    """Resolves nothing by itself but the merging of mappings."""

    most = MOST_OPTIONS

    yaml_implicit_resolvers: ClassVar[Any] = {
        "<": [(_MERGE, yaml.SafeLoader.yaml_implicit_resolvers["<"][0][1])],
    }

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Refuse keys that stand twice, and keys that are no text."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in cast("list[tuple[Node, Node]]", node.value):
            if key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                raise ConfigError(f"line {line}: a key should be a plain name")
            if key.value in lines:
                first = lines[key.value]
                raise ConfigError(
                    f"line {line}: the key {key.value} occurs twice, first in line {first}"
                )
            lines[key.value] = line
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Keys are text whatever they look like."""
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep) for key, value in node.value}

    def construct_text(self, node: ScalarNode) -> Any:
        """A quoted value is text; a plain one may be more."""
        return node.value if node.style else plain_value(str(node.value))


_Loader.add_constructor(_TEXT, _Loader.construct_text)


def plain_value(text: str) -> Any:
    """Null, a boolean or a number where the text is how those are written, else the text."""
    if text in NULLS:
        return None
    if text in ("true", "false"):
        return text == "true"
    if len(text) <= _LONGEST_NUMBER and text[0] in "-0123456789":
        for kind in (int, float):
            try:
                if str(kind(text)) == text:
                    return kind(text)
            except ValueError:
                continue
    return text


def text_of(value: Any) -> str:
    """The text that a number or boolean of `plain_value` was made from."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_value(text: str) -> Any:
    """The value of `key=value`: a list, mapping or quoted text in YAML, else as a plain value is.

    What only looks like YAML (`[V] dog`, `a photo: sks`, `# 1`) is text; nothing is text too, as on a
    command line, and not null.
    """
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError):  # a ConfigError is a ValueError
            return text
    return plain_value(text) if text else text


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: there is no file, it is not UTF-8 or not YAML, or holds something else; one sentence.
    """
    try:
        refuse_special(path, ConfigError)
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path} is larger than {MOST_BYTES >> 20} MiB, too long for a run.")
        text = path.read_text("utf-8")
    except FileNotFoundError as problem:
        raise ConfigError(f"No file {path}.") from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(
            f"{path} is not UTF-8 (byte {problem.start}); save it as UTF-8."
        ) from problem
    except (OSError, ValueError) as problem:
        if isinstance(problem, ConfigError):
            raise
        why = getattr(problem, "strerror", None) or problem
        raise ConfigError(f"Cannot read {str(path)[:200]!r}: {why}.") from problem
    try:
        content: Any = yaml.load(text, _Loader)
    except ConfigError as problem:
        raise ConfigError(f"{path}, {problem}.") from None
    except RecursionError as problem:
        raise ConfigError(f"{path} is nested too deeply.") from problem
    except (yaml.YAMLError, ValueError) as problem:  # ValueError: an explicit tag that does not fit
        raise ConfigError(f"{path} is not valid YAML: {_where(problem)}.") from problem
    if not isinstance(content, dict):
        fault = "is empty" if content is None else "is not a mapping"
        raise ConfigError(f"{path} {fault}; it should hold keys and values.")
    return cast("dict[str, Any]", content)


def _where(problem: Exception) -> str:
    mark = getattr(problem, "problem_mark", None)
    said = getattr(problem, "problem", None) or " ".join(str(problem).split())
    if "'\\t'" in said:
        said = "a tab, but only spaces may indent"
    return said if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {said}"
