"""Folders of data: which files a split means, with nothing fetched and nothing outside read.

The datasets library knows how people lay out their folders (`train.jsonl`,
`data/train-00000-of-00009.parquet`, the `configs` of a README). It is asked for the names alone; the files
are read as single ones are. A folder is somebody else's: what its README or `.huggingface.yaml` names must
be a file in it, never an address, and a link in it may not lead out.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from emloc.artefacts.named_files import named_file, named_path
from emloc.errors import ConfigError, DataError
from emloc.integrations.transformers.data.files import (
    SUFFIXES,
    data_suffix,
    open_data,
    parsed_json,
    read_file,
    read_open,
)
from emloc.integrations.transformers.data.rows import Row
from emloc.options.yaml_file import MOST_BYTES, load_bounded

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|::")
"""`https://…`, `hf://…`, and the chains of fsspec such as `zip://a::https://…`."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_CARDS = ("README.md", ".huggingface.yaml")
_READ_BY_LIBRARY = "dataset_infos.json"
_OF_NO_MATTER = {
    "name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter",
    "mangle_dupe_cols", "engine", "true_values", "false_values", "na_values", "keep_default_na",
    "na_filter", "verbose", "thousands", "decimal", "error_bad_lines", "warn_bad_lines", "memory_map",
    "float_precision", "chunksize", "encoding_errors", "on_bad_lines", "date_format", "use_threads",
    "block_size", "newlines_in_values", "on_mixed_types", "parse_agent_traces",
}  # fmt: skip
"""Options of a card that say which files there are, how types are guessed, or how fast files are read."""


def folder_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of one split of a local folder.

    Raises:
        DataError: there is no such split, its files are of a kind that is not read, or what the folder's
            README names is an address or lies outside of it.
    """
    saved = _saved_files(folder, split)
    if saved is not None:
        for path in saved:
            yield from read_file(path)
        return
    named = _check_card(folder)
    builder = _builder(folder)
    files_by_split: dict[str, list[str]] = {
        str(name): [str(file) for file in files]
        for name, files in (builder.config.data_files or {}).items()
    }
    paths = [_data_file(folder, file, named) for file in files_of(files_by_split, split, folder)]
    pictures = [path for path in paths if path.name in METADATA]
    if pictures:
        for path in pictures:
            yield from picture_rows(path)
        return
    delimiter = card_delimiter(builder.config, map(str, paths), folder)
    for path in paths:
        suffix = data_suffix(path.name)
        if suffix is not None:
            with open_data(path) as file:
                yield from read_open(file, suffix, str(path), path.parent, delimiter)
        elif path.suffix.lower() == ".txt":
            yield from _text_rows(path)
        else:
            raise DataError(
                f"{folder} holds {path.name} for the split {split}; only files ending in "
                f"{', '.join(SUFFIXES)}, and pictures beside a metadata.jsonl or metadata.csv, are read: "
                f"unpack an archive, and convert others."
            )


def files_of(files_by_split: dict[str, list[str]], split: str, name: object) -> list[str]:
    """The files of a split, or of all of them where it is `all`.

    Raises:
        DataError: there is no such split; says which there are.
    """
    if split == "all" and split not in files_by_split:
        return [file for files in files_by_split.values() for file in files]
    if split not in files_by_split:
        raise DataError(
            f"{name} has no split {split!r}, only {', '.join(sorted(files_by_split))}; pass one of those as "
            f"dataset_split."
        )
    return files_by_split[split]


def card_delimiter(config: Any, files: Iterable[str], name: object) -> str | None:
    """The separator of CSV files that the data's card names; None where their suffix says it.

    Args:
        config: of the datasets library.
        files: the names of all that are read.
        name: the data, for messages.

    Raises:
        DataError: it has more than one character, or the card has another option that changes what the
            rows of a text are, which would be read differently from how it is meant.
    """
    suffixes = {data_suffix(file) or Path(file).suffix.lower() for file in files}
    if suffixes <= {".parquet", ".arrow"}:
        return None
    for field in fields(config) if is_dataclass(config) else ():
        value = getattr(config, field.name)
        if field.name == "encoding" and str(value).lower() in ("none", "utf-8", "utf8"):
            continue
        if field.name not in _OF_NO_MATTER and value != field.default:
            raise DataError(
                f"The card of {name} has the option {field.name}, which is not supported; write the data as "
                f"JSONL, and pass that."
            )
    delimiter = str(getattr(config, "sep", None) or getattr(config, "delimiter", None) or ",")
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(
            f"{name}: a separator is one character, not {delimiter!r}; correct its card."
        )
    # The library itself takes a tab for every file where most are TSV.
    return None if delimiter == "," or (delimiter == "\t" and ".tsv" in suffixes) else delimiter


def _saved_files(folder: Path, split: str) -> list[Path] | None:
    """The files of what `datasets.save_to_disk` wrote; None where the folder is none of it.

    They are named by `state.json`, and splits by `dataset_dict.json`: the library would take splits with
    names of somebody's own for parts of one.
    """
    splits = _state(folder, "dataset_dict.json").get("splits")
    if isinstance(splits, list):
        names = [str(name) for name in cast("list[Any]", splits)]
        files_by_split = {name: [name] for name in names}
        parts = [
            _saved_table(named_path(folder, name, folder / "dataset_dict.json", DataError))
            for name in files_of(files_by_split, split, folder)
        ]
        return [path for part in parts for path in part]
    state = _state(folder, "state.json")
    if "_data_files" not in state:
        return None
    files_of({str(state.get("_split") or "train"): [], "train": []}, split, folder)
    return _saved_table(folder)


def _saved_table(folder: Path) -> list[Path]:
    state = _state(folder, "state.json")
    entries = cast("list[Any]", state.get("_data_files") or [])
    names = [
        cast("dict[str, Any]", entry).get("filename")
        for entry in entries
        if isinstance(entry, dict)
    ]
    if not names or state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder} is not a table as save_to_disk writes it today; load it with datasets, and save it "
            f"with to_parquet or to_json."
        )
    return [named_file(folder, name, folder / "state.json", DataError) for name in names]


def _state(folder: Path, name: str) -> dict[str, Any]:
    """The object in a file of the folder, empty where there is none."""
    path = named_path(folder, name, folder, DataError)
    content = parsed_json(path) if path.is_file() else None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _check_card(folder: Path) -> Path | None:
    """Refuse names in the folder's card that lead away; the file that has names, if one has."""
    import yaml

    named: Path | None = None
    named_path(folder, _READ_BY_LIBRARY, folder, DataError)
    for card in _CARDS:
        path = named_path(folder, card, folder, DataError)
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ValueError("too long")
            text = path.read_text("utf-8-sig")
            if path.suffix == ".md":
                front = re.match(r"\s*---[^\S\n]*\r?\n(.*?)\n---", text, re.DOTALL)
                text = front[1] if front else ""
            content = load_bounded(text)
        except ConfigError as problem:
            raise DataError(f"{path}: {problem}; correct or remove it.") from problem
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as problem:
            raise DataError(f"{path} cannot be read as YAML; correct or remove it.") from problem
        configs = (
            cast("dict[str, Any]", content).get("configs") if isinstance(content, dict) else None
        )
        for name in _names(configs):
            named = path
            if ADDRESS.search(name):
                raise DataError(
                    f"{path} names the data {name}, an address; download it, and name the files in the "
                    f"folder."
                )
            named_path(folder, name, path, DataError)
    return named


def _names(value: Any, inside: bool = False) -> Iterator[str]:
    """Every text below `data_files` and `data_dir`, wherever they are."""
    if isinstance(value, dict):
        for key, one in cast("dict[Any, Any]", value).items():
            yield from _names(one, inside or key in ("data_files", "data_dir"))
    elif isinstance(value, list):
        for one in cast("list[Any]", value):
            yield from _names(one, inside)
    elif inside and isinstance(value, str):
        yield value


def _builder(folder: Path) -> Any:
    from datasets import load_dataset_builder

    try:
        return load_dataset_builder(str(folder))
    except Exception as problem:  # whatever a folder of somebody's makes the library raise
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise DataError(f"Data set {folder} cannot be loaded: {first}") from problem


def _data_file(folder: Path, file: str, named: Path | None) -> Path:
    if ADDRESS.search(file):
        raise DataError(f"{folder} points to {file}, an address; download it first.")
    path = Path(file).absolute()
    for home in (folder.absolute(), folder.resolve()):
        if path.is_relative_to(home):
            return named_path(home, str(path.relative_to(home)), named or folder, DataError)
    return named_path(folder, str(path), named or folder, DataError)


def _text_rows(path: Path) -> Iterator[Row]:
    """A row per line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                yield Row({"text": line.decode("utf-8-sig").rstrip("\r\n")}, where, path.parent)
            except UnicodeDecodeError as problem:
                raise DataError(f"{where} is not UTF-8; save the file as UTF-8.") from problem


def picture_rows(path: Path) -> Iterator[Row]:
    """Pictures with a metadata file: its `file_name` is the picture beside it."""
    for row in read_file(path):
        renamed = {
            "image" if key == "file_name" else "images" if key == "file_names"
            else key.removesuffix("_file_name"): value
            for key, value in row.items()
        }  # fmt: skip
        yield Row(renamed, row.where, row.folder)
