"""What an easy-VQA question says of its picture."""

from pathlib import Path

import pytest

from emloc.demos.easy_vqa import Question


@pytest.mark.parametrize(
    ("text", "answer", "fact"),
    [
        ("what shape is in the image?", "circle", ("circle", True)),
        ("what is the blue shape?", "rectangle", ("rectangle", True)),
        ("what color is the triangle?", "teal", ("teal", True)),
        ("is there a circle?", "yes", ("circle", True)),
        ("is there a circle?", "no", ("circle", False)),
        ("is there not a red shape in the image?", "yes", ("red", False)),
        ("is no triangle present?", "no", ("triangle", True)),
    ],
)
def test_facts(text, answer, fact):
    question = Question(text, answer, Path("1.png"))
    assert question.fact == fact
    assert question.about_shape == (fact[0] in ("circle", "rectangle", "triangle"))
    assert question.names_a_color == (answer == "teal")
