"""Data sets by name: local files, folders and hub ids, one or several, mixed by weights."""

import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from emloc.config import DataOptions
from emloc.errors import ConfigError, DataError
from emloc.integrations.transformers.data.columns import (
    FORMS,
    Forms,
    check_column_map,
    known_columns,
    renamed,
    say_unused,
)
from emloc.integrations.transformers.data.files import data_suffix, read_file
from emloc.integrations.transformers.data.folders import ADDRESS, folder_rows
from emloc.integrations.transformers.data.hub import hub_rows
from emloc.integrations.transformers.data.rows import AnyRows, Row, Rows, RowStream
from emloc.integrations.transformers.text_options import RowOptions
from emloc.machine.progress import console
from emloc.machine.special_files import refuse_special

SampleT = TypeVar("SampleT")


def load_table(name: str, split: str, streaming: bool) -> AnyRows:
    """The rows of one data set as they are written, none of them empty.

    Args:
        split: also a part of one, such as `train[:100]`, or several, `train+test`, unless streamed.

    Raises:
        DataError: there is no such data set, it is empty, or it cannot be parsed.
    """
    read = _reader(name, split, streaming)
    rows: AnyRows = RowStream(read) if streaming else Rows(read())
    if next(iter(rows), None) is None:
        raise DataError(f"Data set {name} is empty.")
    return rows


def load_known(
    options: RowOptions,
    name: str,
    split: str,
    forms: Forms = FORMS,
    others: Sequence[str] = (),
    read: Callable[[], Iterable[Row]] | None = None,
) -> AnyRows:
    """The rows of one data set under our names of columns; what is not used of them is said.

    Args:
        forms: what a row may be written in.
        others: columns that are used with any form.
        read: instead of `load_table`.

    Raises:
        DataError: as `load_table`, or the first row has no column of a name that is mapped.
        ConfigError: columns are mapped to no column of ours.
    """
    check_column_map(options.column_map, [*known_columns(forms), *others])
    table = load_table(name, split, options.streaming) if read is None else read()

    def known() -> Iterator[Row]:
        return say_unused(renamed(table, options.column_map, name), name, forms, others)

    return RowStream(known) if isinstance(table, RowStream) else Rows(known())


def _reader(name: str, split: str, streaming: bool) -> Callable[[], Iterable[Row]]:
    """A reader of the data set, from its beginning each time."""
    path = Path(name)
    refuse_special(path, DataError)
    if path.is_file():
        require_whole_file(name, split)
        return lambda: read_file(path)
    looks_local = name.startswith((".", "/", "~")) or data_suffix(name) is not None
    if not path.exists() and (looks_local or ADDRESS.search(name)):
        raise DataError(f"No data set {name}: there is no such file or folder.")

    def part(split: str) -> Iterable[Row]:
        return folder_rows(path, split) if path.exists() else hub_rows(name, split, streaming)

    if re.fullmatch(r"[\w.-]+", split):
        return lambda: part(split)
    if streaming:
        raise DataError(f"A stream has no part {split!r}; pass a whole split as dataset_split.")
    return lambda: _parts(part, split)


def evaluation_split(config: Any) -> str:
    """The split of `eval_dataset` that is evaluated while training goes on; none of a file by default."""
    given = "eval_dataset_split" in config.model_fields_set
    return (
        str(config.eval_dataset_split) if given or not os.path.isfile(config.eval_dataset) else ""
    )


def say_unweighted(config: Any) -> None:
    """Say that weights, which stages of a run may share, do not count where all is scored."""
    if config.dataset_weights:
        console.print(
            "evaluate: every sample of every data set is scored once, whatever dataset_weights says",
            markup=False,
        )


def require_whole_file(name: str, split: str) -> None:
    """Refuse a split of a single file.

    Raises:
        DataError: says so.
    """
    if split not in ("train", ""):
        raise DataError(
            f"{name} is one file and has no split {split!r}; pass the file that holds it."
        )


def _parts(read: Callable[[str], Iterable[Row]], split: str) -> Iterator[Row]:
    """`train[:10%]+test` as the datasets library means it."""
    from datasets import ReadInstruction

    names = {part.partition("[")[0].strip() for part in split.split("+")}
    rows = {name: list(read(name)) for name in names}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({n: len(r) for n, r in rows.items()})
    except (ValueError, AssertionError) as problem:
        raise DataError(f"dataset_split={split}: {problem}") from problem
    for part in parts:
        yield from rows[part.splitname][part.from_ : part.to]


def dataset_names(options: DataOptions) -> list[str]:
    """The data sets that `dataset` names."""
    return [name for name in (options.dataset or "").split(",") if name]


def shares(options: RowOptions, sizes: Sequence[int]) -> list[float]:
    """The part of the samples that comes from each data set; by their sizes, if no weights are given.

    Raises:
        ConfigError: there are more or fewer weights than data sets.
    """
    weights = options.dataset_weights or sizes
    if len(weights) != len(sizes):
        raise ConfigError(
            f"dataset_weights has {len(weights)} weights for {len(sizes)} data sets; give one for each."
        )
    return [weight / sum(weights) for weight in weights]


def mix(parts: Sequence[list[SampleT]], wanted: Sequence[float], seed: int) -> list[SampleT]:
    """Samples of several data sets by their shares, shuffled; small sets are repeated as needed.

    Every sample is used at least once: the set that is largest for its share sets the total.
    """
    total = max(len(part) / share for part, share in zip(parts, wanted) if share > 0)
    draw = random.Random(seed)
    mixed: list[SampleT] = []
    for part, share in zip(parts, wanted):
        count = round(total * share)
        mixed += part * (count // len(part)) + draw.sample(part, count % len(part))
    draw.shuffle(mixed)
    return mixed
