"""Folders of data: which files a split means, with nothing fetched and nothing outside read.

The datasets library knows how people lay out their folders (`train.jsonl`,
`data/train-00000-of-00009.parquet`, the `configs` of a README). It is asked for the names alone; the files
are read as single ones are. A folder is somebody else's: what its README or `.huggingface.yaml` names must
be a file in it, never an address.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from emloc.artefacts.named_files import named_path, refuse_special
from emloc.errors import DataError
from emloc.integrations.transformers.data.files import SUFFIXES, csv_cells, read_file
from emloc.integrations.transformers.data.rows import Row

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|::")
"""`https://…`, `hf://…`, and the chains of fsspec such as `zip://a::https://…`."""
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def folder_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of one split of a local folder.

    Raises:
        DataError: there is no such split, its files are of a kind that is not read, or what the folder's
            README names is an address or lies outside of it.
    """
    named = _check_card(folder)
    builder = _builder(folder)
    found: dict[str, list[str]] = {
        str(name): [str(file) for file in files]
        for name, files in (builder.config.data_files or {}).items()
    }
    if split not in found:
        raise DataError(
            f"{folder} has no split {split!r} but {', '.join(sorted(found))}; pass one of those as "
            f"dataset_split."
        )
    paths = [_data_file(folder, file, named) for file in found[split]]
    pictures = [path for path in paths if path.name in _METADATA]
    if pictures:
        for path in pictures:
            yield from _picture_rows(path)
        return
    for path in paths:
        suffix = path.suffix.lower()
        if suffix == ".csv":
            yield from _csv_rows(path, builder.config)
        elif suffix == ".txt":
            yield from _text_rows(path)
        elif suffix in SUFFIXES:
            yield from read_file(path)
        else:
            raise DataError(
                f"{folder} holds {path.name} for the split {split}; read are files ending in "
                f"{', '.join(SUFFIXES)}, and pictures beside a metadata.jsonl or metadata.csv."
            )


def _check_card(folder: Path) -> Path | None:
    """Refuse names in the folder's card that lead away; the file that has names, if one has."""
    import yaml

    named: Path | None = None
    for path in (folder / "README.md", folder / ".huggingface.yaml"):
        refuse_special(path, DataError)
        if not path.is_file():
            continue
        try:
            text = path.read_text("utf-8-sig")
            if path.suffix == ".md":
                front = re.match(r"\s*---[^\S\n]*\r?\n(.*?)\n---", text, re.DOTALL)
                text = front[1] if front else ""
            content = yaml.safe_load(text)
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
        raise DataError(f"{folder} leads to {file}, an address; download it first.")
    path = Path(file)
    refuse_special(path, DataError)
    if named is not None:
        named_path(folder.resolve(), file, named, DataError)
    return path


def _csv_rows(path: Path, config: Any) -> Iterator[Row]:
    """By the separator that the folder's card names, if it names one."""
    delimiter = str(getattr(config, "sep", None) or getattr(config, "delimiter", None) or ",")
    if len(delimiter) != 1:
        raise DataError(f"{path}: a separator is one character, not {delimiter!r}.")
    with path.open("rb") as file:
        for where, cells in csv_cells(file, str(path), delimiter):
            yield Row(cells, where, path.parent)


def _text_rows(path: Path) -> Iterator[Row]:
    """A row per line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                yield Row({"text": line.decode("utf-8-sig").rstrip("\r\n")}, where, path.parent)
            except UnicodeDecodeError as problem:
                raise DataError(f"{where} is not UTF-8; save the file as UTF-8.") from problem


def _picture_rows(path: Path) -> Iterator[Row]:
    """Pictures with a metadata file: its `file_name` is the picture beside it."""
    for row in read_file(path):
        renamed = {
            "image" if key == "file_name" else "images" if key == "file_names"
            else key.removesuffix("_file_name"): value
            for key, value in row.items()
        }  # fmt: skip
        yield Row(renamed, row.where, row.folder)
