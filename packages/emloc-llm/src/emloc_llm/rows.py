"""Rows of a data set with columns that we know, whatever form it comes in.

Chats (`messages`, with `tools` where there are any), `prompt` and `completion`, `text`, ShareGPT's
`conversations`, and Alpaca's `instruction`, `input`, `output`. Several data sets are given as a list,
separated by commas.
"""

from typing import Any

from emloc.errors import DataError
from emloc.integrations.transformers.data.columns import FORMS, form_of, known_columns
from emloc.integrations.transformers.data.rows import AnyRows
from emloc.integrations.transformers.tables import load_known

COLUMNS = known_columns(FORMS)


def load_rows(options: Any, dataset: str | None = None, split: str | None = None) -> AnyRows:
    """One data set with our column names, all at once or, if streamed, as it comes.

    Args:
        dataset, split: instead of those that the options name.

    Raises:
        DataError: it cannot be read, is empty, or has no columns that we know.
    """
    name = dataset or options.dataset
    if not name:
        raise DataError("dataset is required: a JSONL, CSV or parquet file, a folder, or a hub id.")
    rows = load_known(options, name, options.dataset_split if split is None else split)
    first = next(iter(rows))
    if form_of(first) is None:
        raise DataError(
            f"Data set {name} has the columns {', '.join(sorted(map(str, first)))} ({first.where}); "
            f"expected messages, prompt and completion, text, conversations, or instruction and output. "
            f"Name yours with column_map, for example question=prompt,answer=completion{_hint(list(first))}."
        )
    return rows


def _hint(columns: list[str]) -> str:
    """Spreadsheets of half the world separate by semicolons."""
    alone = len(columns) == 1 and (";" in columns[0] or "\t" in columns[0])
    return "; a CSV's cells are separated by commas, those of a .tsv by tabs" if alone else ""
