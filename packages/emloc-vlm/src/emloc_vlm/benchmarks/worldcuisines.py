"""WorldCuisines (Winata et al. 2024): names and origins of dishes, in thirty languages.

Every row of the task files asks twice, with five numbered options and without; so it becomes two rows.
Release 1.0 writes the options into `multi_choice_prompt` and gives the image's address; 1.1 has
`options` and the image's path. Images belong into `images/` beside the file, named as in the address.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from emloc_vlm.benchmarks.files import Record
from emloc_vlm.images import Source

_PROMPTS = {"multi_choice_prompt", "open_ended_prompt", "multi_choice_answer", "answer"}
_LISTS = {"question", "options", "mcq_answer_index", "answer"}
_OPTION = re.compile(r"^(\d+)\. ?(.*)$", re.MULTILINE)


NAME = "WorldCuisines"


def recognises(columns: Set[str]) -> bool:
    """Return whether these are the columns of WorldCuisines' task files."""
    return columns >= _PROMPTS or columns >= _LISTS


def fits(cells: Mapping[str, Any]) -> bool:
    """Return whether the first row is one; no other tables have these columns."""
    return True


def rows(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Two rows for each record: `kind` "multiple_choice", answered by a number, and `kind` "open".

    An open question accepts the answers of all languages of the file that ask the same (`qa_id`), its
    own first. The options of a multiple-choice question are not repeated in `question`.

    Raises:
        DataError: a cell is missing, or the answer is none of the options.
    """
    records = list(records)
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for record in records:
        answers[_question_id(record)].append(record.text("answer"))
    for record in records:
        question, options, number = _choice(record)
        if number not in options:
            raise record.wrong(f"the answer {number} is none of the options {', '.join(options)}")
        image = _image(record)
        row = record.row(image, question, number, "worldcuisines")
        yield {**row, "options": options, "kind": "multiple_choice"}
        accepted = list(dict.fromkeys([record.text("answer"), *answers[_question_id(record)]]))
        asked = (
            record.text("open_ended_prompt") if "open_ended_prompt" in record.cells else question
        )
        row = record.row(
            image, asked, accepted if len(accepted) > 1 else accepted[0], "worldcuisines"
        )
        yield {**row, "kind": "open"}


def _question_id(record: Record) -> str:
    cells = record.cells
    # Without an id no two rows are known to ask the same.
    number = cells["qa_id"] if record.has("qa_id") else f"line {record.number}"
    return f"{cells.get('task')} {number}"


def _choice(record: Record) -> tuple[str, dict[str, str], str]:
    """The question without its options, the options by number, and the right number."""
    if "multi_choice_prompt" in record.cells:
        prompt = record.text("multi_choice_prompt")
        options = {match[1]: match[2].strip() for match in _OPTION.finditer(prompt)}
        question = _OPTION.split(prompt, maxsplit=1)[0].strip()
        return question, options, record.whole_number("multi_choice_answer")
    listed = record.cells["options"]
    if not isinstance(listed, list):
        raise record.wrong("options is not a list")
    texts = [record.as_text(text, "an option") for text in cast("list[Any]", listed)]
    options = {str(number): text for number, text in enumerate(texts, start=1)}
    index = record.whole_number("mcq_answer_index")
    number = str(int(index) + 1) if index.isdecimal() else index
    return record.text("question"), options, number


def _image(record: Record) -> Source | str:
    for column in ("image_path", "image"):
        if record.has(column):
            return record.image(record.cells[column], "", "images")
    address = urlsplit(record.text("image_url")).path
    return record.image(unquote(address).rpartition("/")[2], "images", "")
