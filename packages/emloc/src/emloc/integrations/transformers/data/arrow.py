"""Rows out of Arrow: parquet files, and what the datasets library has loaded.

Arrow knows one type per column, so in a column of objects every object has every key: those that a row was
written without are null. Null and missing cannot be told apart there, and both are taken as missing.

Pictures, sounds and videos are not decoded: that would fetch what a row's path names, were it an address.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from emloc.artefacts.read_errors import unreadable
from emloc.errors import DataError
from emloc.integrations.transformers.data.rows import Row

_BATCH = 256


def parquet_rows(file: BinaryIO, name: str, folder: Path) -> Iterator[Row]:
    """The rows of an open parquet file.

    Raises:
        DataError: it is damaged.
    """
    from pyarrow.parquet import ParquetFile

    def opened() -> tuple[Any, Iterable[Any]]:
        table: Any = ParquetFile(file)
        return table.schema_arrow, table.iter_batches(batch_size=_BATCH)

    return _typed_rows(opened, "parquet", name, folder)


def arrow_rows(file: BinaryIO, name: str, folder: Path) -> Iterator[Row]:
    """The rows of an open Arrow file, as `datasets.save_to_disk` writes it.

    Raises:
        DataError: it is damaged.
    """
    from pyarrow import ArrowInvalid, ipc

    def opened() -> tuple[Any, Iterable[Any]]:
        try:
            stream: Any = ipc.open_stream(file)
            return stream.schema, stream
        except ArrowInvalid:  # the other of Arrow's two forms, which begins with a mark of its own
            file.seek(0)
            table: Any = ipc.open_file(file)
            return table.schema, map(table.get_batch, range(table.num_record_batches))

    return _typed_rows(opened, "Arrow", name, folder)


def _typed_rows(
    opened: Callable[[], tuple[Any, Iterable[Any]]], kind: str, name: str, folder: Path
) -> Iterator[Row]:
    """The rows of a schema and its batches."""
    from datasets import Features
    from pyarrow import ArrowException

    number = 0
    try:
        schema, batches = opened()
        for cells in cells_of(batches, Features.from_arrow_schema(schema)):
            number += 1
            yield Row(cells, f"{name}, row {number}", folder)
    except (
        ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError,
    ) as problem:  # fmt: skip
        if isinstance(problem, DataError):
            raise
        what, hint = f"cannot be read as {kind}, after {number} rows", "make or download it again"
        raise unreadable(name, what, f"it may be damaged: {hint}", problem, DataError) from problem


def cells_of(batches: Iterable[Any], features: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of Arrow batches or tables: JSON text is made into what it says, and nothing else decoded.

    Args:
        features: of the datasets library, by column.
    """
    holds_json = any(map(_holds_json, features.values()))
    for batch in batches:
        batch.validate(full=True)  # a damaged one would have Arrow read what is not its own
        for cells in batch.to_pylist():
            cells = without_nulls(cells)
            yield _decoded(features, cells) if holds_json else cells


def without_nulls(value: Any) -> Any:
    """Objects without their keys of null, however deep."""
    if isinstance(value, dict):
        entries = cast("dict[str, Any]", value)
        return {key: without_nulls(one) for key, one in entries.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in cast("list[Any]", value)]
    return value


def _is_json(feature: Any) -> bool:
    return type(feature).__name__ == "Json"


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_holds_json, cast("Mapping[str, Any]", feature).values()))
    if isinstance(feature, (list, tuple)):
        return any(map(_holds_json, cast("list[Any]", feature)))
    return _is_json(feature) or (hasattr(feature, "feature") and _holds_json(feature.feature))


def _decoded(feature: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, Mapping) and isinstance(value, dict):
        kinds = cast("Mapping[str, Any]", feature)
        entries = cast("dict[str, Any]", value)
        return {name: _decoded(kinds.get(name), one) for name, one in entries.items()}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None and isinstance(value, list):
        return [_decoded(inner, one) for one in cast("list[Any]", value)]
    return feature.decode_example(value) if _is_json(feature) else value
