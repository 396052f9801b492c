"""WebSRC (Chen et al. 2021): questions on screenshots of web pages, a `dataset.csv` for each site.

The site's folder has the screenshots in `processed_data/`, named for the page; characters 2 to 8 of a
question's id are the page's. Tables with an `image` column say themselves where the screenshot is.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from emloc_vlm.benchmarks.files import Record
from emloc_vlm.images import Source

_ID = re.compile(r"[a-z]{2}(\d{7})\d+")


NAME = "WebSRC"


def recognises(columns: Set[str]) -> bool:
    """Return whether these are WebSRC's columns."""
    return columns >= {"question", "id", "element_id", "answer"}


def fits(cells: Mapping[str, Any]) -> bool:
    """Return whether the first row is one; no other tables have these columns."""
    return True


def rows(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """The rows, with one answer each.

    Raises:
        DataError: a cell is missing, or an id does not name a page.
    """
    for record in records:
        yield record.row(
            _screenshot(record), record.text("question"), record.text("answer"), "websrc"
        )


def _screenshot(record: Record) -> Source | str:
    if "image" in record.cells:
        return record.image(record.cells["image"], "", "images")
    name = record.text("id")
    match = _ID.fullmatch(name)
    if not match:
        raise record.wrong(f"the id {name!r} is not of the form sp160000100001")
    return record.image(f"{match[1]}.png", "processed_data", "")
