"""Data sets of the hub, through the datasets library, without its decoding.

CSV and JSON files are read as local ones are, for the library would infer types: a date, a number or a
missing value where somebody wrote text. So are the metadata of pictures. What those readers cannot read is
refused, never inferred.
"""

import re
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Any

from emloc.errors import DataError
from emloc.integrations.transformers.data.arrow import cells_of
from emloc.integrations.transformers.data.files import data_suffix, read_open, unpacked
from emloc.integrations.transformers.data.folders import (
    METADATA,
    card_delimiter,
    files_of,
    picture_rows,
)
from emloc.integrations.transformers.data.rows import Row

_BATCH = 256
_TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_IN_REPOSITORY = re.compile(r"hf://datasets/(?P<id>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
_UNPACK = "download it (hf download {name} --repo-type dataset), unpack it, and pass its folder."


def hub_rows(name: str, split: str, streaming: bool) -> Iterator[Row]:
    """The rows of a split of a hub id.

    Raises:
        DataError: there is none, it cannot be read, or only by guessing types.
    """
    from datasets import load_dataset_builder
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        builder: Any = load_dataset_builder(name)
        given: Any = getattr(builder.config, "data_files", None) or {}
        files_by_split = {str(key): [str(file) for file in files] for key, files in given.items()}
        every = [file for files in files_by_split.values() for file in files]
        # What the library takes the data for, which archives and other names do not show.
        kind = type(builder).__module__.rpartition(".")[2]
        if kind.endswith("folder"):
            yield from _folder_rows(name, split, streaming, files_of(files_by_split, split, name))
        elif kind in ("csv", "json") or any(_suffix(file) in _TEXT for file in every):
            yield from _text_rows(
                name, files_of(files_by_split, split, name), builder.config, streaming
            )
        else:
            yield from _loaded_rows(name, split, streaming)
    except DataError:
        raise
    except Exception as problem:  # network, cache and a dozen formats: each has errors of its own
        cause = problem.__cause__ or problem
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise DataError(f"Data set {name} cannot be loaded: {first}") from problem


def _suffix(address: str) -> str | None:
    """The kind of data at an address, which may end in a query."""
    return data_suffix(address.partition("?")[0] if "://" in address else address)


def _text_rows(name: str, files: list[str], config: Any, streaming: bool) -> Iterator[Row]:
    """The rows of CSV and JSON files."""
    for file in files:
        if _suffix(file) not in _TEXT:
            raise DataError(
                f"Data set {name} has rows in {Path(file).name}, which is not read from the hub; "
                + _UNPACK.format(name=name)
            )
    delimiter = card_delimiter(config, files, name)
    for file in files:
        yield from _file_rows(file, streaming, delimiter)


def _file_rows(address: str, streaming: bool, delimiter: str | None) -> Iterator[Row]:
    from datasets import DownloadManager
    from fsspec import open as open_address
    from huggingface_hub.constants import HF_HUB_CACHE

    suffix = str(_suffix(address))
    # A member of an archive has an address of fsspec's own, which is no download.
    direct = streaming or "::" in address
    place = address if direct else str(DownloadManager().download(address))
    with open_address(place, "rb") as packed, unpacked(packed, address.partition("?")[0]) as file:
        yield from read_open(file, suffix, address, Path(HF_HUB_CACHE), delimiter)


def _folder_rows(name: str, split: str, streaming: bool, files: list[str]) -> Iterator[Row]:
    """Pictures, of which a metadata file beside them says more; its files are downloaded in any case."""
    from huggingface_hub import snapshot_download

    for file in files:
        if "::" in file or Path(file).suffix.lower() in _ARCHIVES:
            raise DataError(
                f"Data set {name} keeps its pictures in the archive {Path(file.split('::')[-1]).name}; "
                + _UNPACK.format(name=name)
            )
    tables = [file for file in files if Path(file).name in METADATA]
    if not tables:  # the names of folders are labels, and nothing is there to infer
        yield from _loaded_rows(name, split, streaming)
        return
    places = [_IN_REPOSITORY.fullmatch(file) for file in files]
    for table in tables:
        place = _IN_REPOSITORY.fullmatch(table)
        if place is None or any(p is None or p["id"] != place["id"] for p in places):
            raise DataError(
                f"Data set {name} has {table} outside its repository; download it, and pass its folder."
            )
        folder = snapshot_download(
            place["id"],
            repo_type="dataset",
            revision=place["revision"],
            allow_patterns=[escape(p["path"]) for p in places if p is not None],
        )
        yield from picture_rows(Path(folder) / place["path"])


def _loaded_rows(name: str, split: str, streaming: bool) -> Iterator[Row]:
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_CACHE

    table: Any = load_dataset(name, split=split, streaming=streaming)
    features: dict[str, Any] = dict(table.features or {})
    batches = table.with_format("arrow").iter(_BATCH)
    for number, cells in enumerate(cells_of(batches, features), start=1):
        yield Row(cells, f"{name}, row {number}", Path(HF_HUB_CACHE))
