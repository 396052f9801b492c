"""Data sets of the hub, through the datasets library, without its decoding.

CSV and JSON files are read as local ones are, for the library would infer types: a date, a number or a
missing value where somebody wrote text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emloc.errors import DataError
from emloc.integrations.transformers.data.arrow import cells_of
from emloc.integrations.transformers.data.files import read_open
from emloc.integrations.transformers.data.rows import Row

_TEXT_FILES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_BATCH = 256


def hub_rows(name: str, split: str, streaming: bool) -> Iterator[Row]:
    """The rows of a split of a hub id.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        files = _text_files(name, split)
        if files is None:
            yield from _loaded_rows(name, split, streaming)
            return
        for file in files:
            yield from _file_rows(file, streaming)
    except DataError:
        raise
    except Exception as problem:  # network, cache and a dozen formats: each has errors of its own
        cause = problem.__cause__ or problem
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise DataError(f"Data set {name} cannot be loaded: {first}") from problem


def _text_files(name: str, split: str) -> list[str] | None:
    """The addresses of a split's CSV or JSON files; None where the data is in another form."""
    from datasets import load_dataset_builder

    config: Any = load_dataset_builder(name).config
    files: Any = getattr(config, "data_files", None) or {}
    found: list[str] = [str(file) for file in files.get(split, [])]
    plain = all(Path(file).suffix.lower() in _TEXT_FILES and "::" not in file for file in found)
    usual = getattr(config, "sep", None) in (None, ",", "\t") and not getattr(config, "field", None)
    return found if found and plain and usual else None


def _file_rows(address: str, streaming: bool) -> Iterator[Row]:
    from datasets import DownloadManager
    from fsspec import open as open_address
    from huggingface_hub.constants import HF_HUB_CACHE

    suffix = Path(address).suffix.lower()
    if streaming:
        with open_address(address, "rb") as file:
            yield from read_open(_peekable(file), suffix, address, Path(HF_HUB_CACHE))
        return
    with Path(str(DownloadManager().download(address))).open("rb") as file:
        yield from read_open(file, suffix, address, Path(HF_HUB_CACHE))


def _peekable(file: Any) -> Any:
    from io import BufferedReader

    return file if hasattr(file, "peek") else BufferedReader(file)


def _loaded_rows(name: str, split: str, streaming: bool) -> Iterator[Row]:
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_CACHE

    table: Any = load_dataset(name, split=split, streaming=streaming)
    features: dict[str, Any] = dict(table.features or {})
    batches = table.with_format("arrow").iter(_BATCH)
    for number, cells in enumerate(cells_of(batches, features), start=1):
        yield Row(cells, f"{name}, row {number}", Path(HF_HUB_CACHE))
