"""A bench's records, as `results.jsonl` has them: a line of JSON per cell."""

from pathlib import Path
from typing import Any

from emloc.errors import ConfigError
from emloc.machine.bounded_json import parse_json
from emloc.machine.special_files import refuse_special

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """All lines of one file, in their order.

    Raises:
        ConfigError: there is no such file, or a line of it is not a record.
    """
    refuse_special(path, ConfigError)
    if not path.is_file():
        raise ConfigError(
            f"there is no {path}; give records as emloc bench writes them (results.jsonl)"
        )
    records: list[Record] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path} cannot be read as UTF-8 text; give results.jsonl.") from problem
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("dataset"), str):
            raise ConfigError(
                f"line {number} of {path} is not a record; give records as emloc bench writes them "
                f"(results.jsonl)"
            )
        records.append(record)
    return records
