"""Rows of a text and a class, as they are read from data sets."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from emloc.plugin import DataError, dataset_names, load_table


class Labelled(NamedTuple):
    """A text, or a pair of texts, and the number of its class."""

    text: str
    pair: str | None
    label: int


def labelled_rows(options: Any, label2id: Mapping[str, int]) -> Iterator[Labelled]:
    """The rows of all data sets that the options name, in their order.

    Args:
        label2id: the classes of the model's config; a row names one of them or gives its number.

    Raises:
        DataError: a row has no text or no label, or one of no class.
    """
    numbers = {**{str(number): number for number in label2id.values()}, **label2id}
    for name in dataset_names(options):
        table = load_table(name, options.dataset_split, False)
        for number, row in enumerate(table, 1):
            yield _labelled(row, numbers, f"{name}, row {number}")


def _labelled(row: Mapping[str, Any], numbers: Mapping[str, int], place: str) -> Labelled:
    for column in ("text", "label"):
        if row.get(column) is None:
            raise DataError(f"{place} has no {column!r}; its columns are {', '.join(row)}.")
    label = str(row["label"])
    if label not in numbers:
        raise DataError(
            f"{place} has the label {label!r}, which the model does not know; its config lists "
            f"{', '.join(name for name in numbers if not name.isdecimal())}."
        )
    pair = row.get("text_pair")
    return Labelled(str(row["text"]), None if pair is None else str(pair), numbers[label])
