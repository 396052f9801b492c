"""PMC-VQA (Zhang et al. 2023): a CSV of figures with four choices each.

In both releases the choices begin with their letter. The first has the answer's text in `Answer` and
its letter in `Answer_label`, the images in `images/`; the second has the letter in `Answer`, the images
in `figures/`.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from emloc_vlm.benchmarks.files import Record
from emloc_vlm.scoring import normalise

_CHOICES = {letter: f"Choice {letter}" for letter in "ABCD"}


NAME = "PMC-VQA"


def recognises(columns: Set[str]) -> bool:
    """Return whether these are PMC-VQA's columns."""
    return columns >= {"Figure_path", "Question", "Answer", *_CHOICES.values()}


def fits(cells: Mapping[str, Any]) -> bool:
    """Return whether the first row is one; no other tables have these columns."""
    return True


def rows(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """The rows; `answer` is the right choice's letter. Choices without text are left out.

    Raises:
        DataError: a cell is missing, or the answer is none of the choices.
    """
    for record in records:
        options = {
            letter: text
            for letter, column in _CHOICES.items()
            if record.has(column) and (text := _without_letter(record.text(column), letter))
        }
        image = record.image(record.text("Figure_path"), "images", "figures", "images_2", "")
        letter = _right_letter(record, options)
        row = record.row(image, record.text("Question"), letter, "multiple_choice")
        yield {**row, "options": options, "kind": "multiple_choice"}


def _right_letter(record: Record, options: dict[str, str]) -> str:
    answer = record.text("Answer_label" if "Answer_label" in record.cells else "Answer")
    same = [key for key, text in options.items() if normalise(text) == normalise(answer)]
    if answer.upper() in options:
        # Figures have panels A to D: the text of one choice may be the letter of another.
        letters_only = "Answer_label" in record.cells or "Caption" in record.cells
        if same and same != [answer.upper()] and not letters_only:
            raise record.wrong(f"the answer {answer!r} is one choice's letter and another's text")
        return answer.upper()
    if len(same) != 1:
        raise record.wrong(f"the answer {answer!r} is none of the choices")
    return same[0]


def _without_letter(choice: str, letter: str) -> str:
    return choice.strip().removeprefix(f"{letter}:").strip()
