"""Rows of a text and a class, as they are read from data sets."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from emloc.plugin import ConfigError, DataError, answer_of, dataset_names, load_table, text_of


class Labelled(NamedTuple):
    """A text, or a pair of texts, and the number of its class."""

    text: str
    pair: str | None
    label: int


def labelled_rows(options: Any, config: Any) -> Iterator[Labelled]:
    """The rows of all data sets that the options name, in their order.

    Args:
        config: the model's, whose `label2id` has the classes; a row names one of them or gives its number. A
            class may be named by digits: text is a name before it is a number, and a number is one.

    Raises:
        DataError: a row has no text or no label, or one of no class, or something else in their place.
        ConfigError: the model tells several classes of a text, or gives a number.
    """
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ConfigError(
            f"The model's config has problem_type={problem!r}, and a text is of one class here; pass a "
            f"model of single labels."
        )
    for name in dataset_names(options):
        table = load_table(name, options.dataset_split, False)
        for number, row in enumerate(table, 1):
            yield _labelled(row, config.label2id, f"{name}, row {number}")


def _labelled(row: Mapping[str, Any], label2id: Mapping[str, int], place: str) -> Labelled:
    for column in ("text", "label"):
        if row.get(column) is None:
            raise DataError(f"{place} has no {column!r}; its columns are {', '.join(row)}.")
    numbers = {str(number): number for number in label2id.values()}
    label = answer_of(row["label"], "label", place)
    known = numbers if isinstance(row["label"], int) else {**numbers, **label2id}
    if label not in known:
        raise DataError(
            f"{place} has the label {label!r}, which the model does not know; its config lists "
            f"{', '.join(label2id)}."
        )
    pair = row.get("text_pair")
    return Labelled(
        text_of(row["text"], "text", place),
        None if pair is None else text_of(pair, "text_pair", place),
        known[label],
    )
