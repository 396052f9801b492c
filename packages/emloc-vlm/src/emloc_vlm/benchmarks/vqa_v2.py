"""VQA v2 (Goyal et al. 2017), and data sets in its form: one JSON of questions, one of annotations.

The files are named `v2_OpenEnded_mscoco_val2014_questions.json` and `v2_mscoco_val2014_annotations.json`;
either one is enough to find the other. The images are COCO's, in a folder named for the subset.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from emloc.errors import DataError
from emloc_vlm.benchmarks.files import Record, as_record, open_document
from emloc_vlm.images import Source

_QUESTION = {"question_id", "image_id", "question"}
_ANNOTATION = {"question_id", "answers"}


def recognises(document: Any) -> bool:
    """Return whether this is VQA's JSON of questions or of annotations."""
    return _entries(document, "questions", _QUESTION) or _entries(
        document, "annotations", _ANNOTATION
    )


def rows(path: Path, document: Any, image_folder: Path | None) -> Iterator[dict[str, Any]]:
    """The rows, with the answers of all people asked, and `kind` as the type of answer.

    Raises:
        DataError: the other file is missing or no such file, or a question has no answers.
    """
    if _entries(document, "questions", _QUESTION):
        questions_path, questions = path, document
        _, annotations = _other(path, "annotations", _ANNOTATION)
    else:
        questions_path, questions = _other(path, "questions", _QUESTION)
        annotations = document
    answered: dict[Any, Any] = {
        entry.get("question_id"): entry
        for entry in annotations["annotations"]
        if isinstance(entry, dict) and isinstance(entry.get("question_id"), (int, str))
    }
    subset = questions.get("data_subtype") or annotations.get("data_subtype")
    if not isinstance(subset, str):
        raise DataError(
            f"{questions_path} has no data_subtype, which names the images' folder; add it."
        )
    for number, cells in enumerate(questions["questions"], start=1):
        record = replace(as_record(questions_path, number, "row", cells), image_folder=image_folder)
        asked = cells.get("question_id")
        if not isinstance(asked, (int, str)):
            raise record.wrong("question_id is neither a number nor text")
        annotation = answered.get(asked, {})
        answers = _answers(record, annotation.get("answers"))
        image = _image(record, subset)
        row = record.row(image, record.text("question"), answers, "vqa_accuracy")
        if "answer_type" in annotation:
            row["kind"] = str(annotation["answer_type"])
        yield row


def files_beside(path: Path, document: Any) -> list[Path]:
    """The annotations of questions, or the other way round.

    Raises:
        DataError: that file is missing or no such file.
    """
    asked = _entries(document, "questions", _QUESTION)
    return [_other(path, *(("annotations", _ANNOTATION) if asked else ("questions", _QUESTION)))[0]]


def _answers(record: Record, entries: Any) -> list[str]:
    """Every answer that people gave; the most frequent one comes first, as it is trained on."""
    if not isinstance(entries, list) or not entries:
        raise record.wrong("the question has no answers in the annotations")
    answers: list[str] = []
    for entry in cast("list[Any]", entries):
        said = cast("dict[str, Any]", entry).get("answer") if isinstance(entry, dict) else None
        answers.append(record.as_text(said, "an answer in the annotations"))
    count = Counter(answers)
    return sorted(answers, key=lambda answer: -count[answer])


def _entries(document: Any, name: str, keys: set[str]) -> bool:
    """Return whether a document has a list of objects with these keys."""
    entries = document.get(name) if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        return False
    first = cast("list[Any]", entries)[0]
    return isinstance(first, dict) and keys <= set(cast("dict[str, Any]", first))


def _other(path: Path, name: str, keys: set[str]) -> tuple[Path, Any]:
    """The file of annotations to one of questions, or the other way round."""
    if name == "annotations":
        names = [path.name.replace("OpenEnded_", "").replace("questions", name)]
    else:
        same = path.name.replace("annotations", name)
        names = [same.replace("mscoco", "OpenEnded_mscoco"), same]
    for other in map(path.with_name, names):
        if other.is_file() and other != path:
            document = open_document(other)
            if not _entries(document, name, keys):
                raise DataError(f"{other} holds no VQA {name}; download it again.")
            return other, document
    raise DataError(f"{path} needs the {name} beside it; put {names[0]} into {path.parent}.")


def _image(record: Record, subset: str) -> Source | str:
    image_id = record.text("image_id")
    if not image_id.isdecimal():
        raise record.wrong(f"image_id is {image_id!r}, not a number")
    name = f"COCO_{subset}_{int(image_id):012d}.jpg"
    return record.image(name, subset, f"images/{subset}", "images", "")
