"""easy-VQA (Victor Zhou, 2019): small pictures of one shape and questions about them, from PyPI.

The base model knows one part of the questions: which shape it is, and whether a shape is or is not in
the picture. What it has never been asked about is colour; naming it is the other part.
"""

import json
import random
import re
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from emloc.artefacts.cache import cache_folder
from emloc.artefacts.durable import sync_tree
from emloc.demos.wheel import download_wheel

WHEEL = "easy-vqa==1.0"
WHEEL_SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
WORDS = SHAPES + COLORS


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: for example `what color is the shape?`.
        answer: one word.
        image: the picture's file.
    """

    text: str
    answer: str
    image: Path

    @property
    def about_shape(self) -> bool:
        """Return whether it belongs to the part that the base model knows."""
        return self.fact[0] in SHAPES

    @property
    def names_a_color(self) -> bool:
        """Return whether it belongs to the part that the base model has never been asked."""
        return self.answer in COLORS

    @property
    def fact(self) -> tuple[str, bool]:
        """A word of `WORDS`, and whether the picture shows it."""
        if self.answer in WORDS:
            return self.answer, True
        asked = re.findall(r"\w+", self.text)
        (word,) = (word for word in asked if word in WORDS)
        denied = not {"no", "not"}.isdisjoint(asked)
        return word, (self.answer == "yes") != denied


def easy_vqa() -> Path:
    """The folder with `train` and `test`, unpacked on first use.

    Raises:
        CheckpointError: the wheel cannot be had, or is not the one expected.
    """
    target = cache_folder() / f"easy-vqa-{WHEEL_SHA256[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
                work = Path(temporary)
                with zipfile.ZipFile(download_wheel(WHEEL, WHEEL_SHA256, work)) as archive:
                    for name in archive.namelist():
                        if re.match(r"easy_vqa/data/(train|test)/", name):
                            archive.extract(name, work)
                sync_tree(work / "easy_vqa/data")
                (work / "easy_vqa/data").rename(target)
    return target


def questions(folder: Path, split: str) -> list[Question]:
    """All questions of `train` or `test`."""
    content = json.loads((folder / split / "questions.json").read_text("utf-8"))
    return [
        Question(text, answer, folder / split / "images" / f"{image}.png")
        for text, answer, image in content
    ]


def write_table(path: Path, chosen: Sequence[Question], folder: Path) -> Path:
    """`image, question, answer` as JSONL, as anybody's data might be.

    Args:
        folder: where the images' names begin.
    """
    rows = [
        {"image": str(q.image.relative_to(folder)), "question": q.text, "answer": q.answer}
        for q in chosen
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def draw(chosen: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Draw so many of them by seed."""
    return random.Random(seed).sample(list(chosen), min(count, len(chosen)))
