"""Answers are compared whole: a part of a number, a heading or another kind of JSON is no match."""

from fractions import Fraction

import pytest

from emloc_llm.matching import matches
from emloc_llm.numbers import read_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("12.0", 12), ("007", 7), ("+4", 4), (".5", Fraction(1, 2)),
        ("-3", -3), ("−3", -3), ("–3", -3), ("-$12", -12), ("$-12", -12),
        ("1,200", 1200), ("1,200.50", Fraction(2401, 2)), ("1,234,567", 1234567),
        ("1,5", Fraction(3, 2)), ("0,500", Fraction(1, 2)), ("1.200,50", Fraction(2401, 2)),
        ("1.200.000", 1200000), ("1\u202f000", 1000), ("1\u00a0000", 1000),
        ("1/2", Fraction(1, 2)), ("1 / 2", Fraction(1, 2)), ("-1/2", Fraction(-1, 2)),
        ("1 1/2", Fraction(3, 2)), ("1e3", 1000), ("1.5E-3", Fraction(3, 2000)),
        ("$12", 12), ("12 $", 12), ("12%", 12), ("12 °C", 12), ("12 apples", 12), ("5kg", 5),
        ("12 km/h", 12), ("3 m²", 3), ("٣", 3), ("１２", 12),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert read_number(text).value == value


@pytest.mark.parametrize(
    "text",
    ["", "apples", "12:30", "1,2,3", "1,20,000", "3.14.15", "1-2", "10^3", "2²", "5½", "½", "12 or 13",
     "2 million", "5k", "1/0", "1/2/3", "0x10", "1_000", "--3", "-$-3", "1e999999999", "9" * 5000,
     "12 for more. The", "NaN", "inf", "2023-01-05"],
)  # fmt: skip
def test_what_is_no_number(text):
    assert read_number(text) is None


HEADINGS = "#### 1. Overview\nParis is the capital."


@pytest.mark.parametrize(
    ("reference", "prediction", "same"),
    [
        # Headings and marks in the middle are no answers.
        (HEADINGS, "#### 1. Something\nLyon is the capital.", False),
        (HEADINGS, HEADINGS, True),
        ("See #### 12 for more. The answer is blue.", "12", False),
        ("#### A heading", "#### A title", False),
        ("a\n#### a", "#### A heading\nfoo", False),
        ("a\n#### a", "#### A. Overview", False),
        ("so\n#### 12", "##### 12. Appendix\nnothing", False),
        # Numbers are whole.
        ("#### 1/2", "#### 1/3", False),
        ("#### 1/2", "#### 1/2", True),
        ("#### 1/2", "#### 0.5", True),
        ("#### 1/2", "#### 1", False),
        ("#### 1", "#### 1/2", False),
        ("#### 5", "#### 1,5", False),
        ("#### 15", "#### 1,5", False),
        ("#### 5", "#### .5", False),
        ("#### 3", "#### -3", False),
        ("#### -3", "#### −3", True),
        ("#### 3", "so x=-3", False),
        ("#### 2", "5-3=2", True),
        ("#### 4", "GPT-4 does not say", False),
        ("#### 30", "at 12:30", False),
        ("#### 1000", "#### 1e3", True),
        ("#### 12.0", "#### 12", True),
        ("#### 2", "#### 2 million", False),
        ("#### 2", "It costs 2 million", False),
        ("#### 72", "9" * 6000, False),
        # Also where they are written with spaces.
        ("#### 2", "so x = 1 / 2", False),
        ("#### 1/2", "so x = 1 / 2", True),
        ("#### 1/2", "It is 7 1/2", False),
        ("#### 7 1/2", "It is 7 1/2", True),
        ("#### 200", "It costs 1 200 euros", False),
        ("#### 1200", "It costs 1 200 euros", True),
        ("#### 1200", "It costs 1\u202f200 euros", True),
        ("#### 1200", "It costs 1\u00a0200.", True),
        ("#### 3", "x = - 3", False),
        ("#### -3", "x = - 3", True),
        ("#### 3", "- 3 apples", True),
        ("#### 3", "5 - 3", True),
        ("#### 300", "In 2020 300", True),
        # Signs and units count where both have one.
        ("#### 12", "#### $12.", True),
        ("#### $12", "#### 12", True),
        ("#### 12%", "#### 12", True),
        ("#### 12", "#### 12 apples", True),
        ("#### 12 km", "#### 12 kg", False),
        ("#### 12%", "#### $12", False),
        # As models write them.
        ("#### 72", "It is **72**.", True),
        ("#### 72", "so \\boxed{72}", True),
        ("#### 72", "so $72$ and", True),
        ("#### 72", "\\$72", True),
        ("#### 72", "#### 7 #### 72", True),
        ("half of 6\n#### c", "#### (c) 24", True),
        # JSON with kinds.
        ('{"paid": true}', '{"paid": 1}', False),
        ('{"paid": false}', '{"paid": 0}', False),
        ('{"paid": 1}', '{"paid": 1.0}', True),
        ("[0.10]", "[0.1]", True),
        ("[1e400]", "[1e500]", False),
        ('["1"]', "[1]", False),
        ("[null]", "[0]", False),
        ('[{"a": [true]}]', '[{"a": [1]}]', False),
        ('{"a": 2}', '{"a": 1, "a": 2}', False),
        ('{"a": 1, "a": 2}', '{"a": 2}', False),
        ("[NaN]", "[NaN]", True),  # as text
        ("[NaN]", "[ NaN]", False),
        ("[[1]]", "[" * 100_000, False),
        ('{"a": "é"}', '{"a": "\\u00e9"}', True),
    ],
)
def test_auto(reference, prediction, same):
    assert matches(reference, prediction) is same


@pytest.mark.parametrize(
    ("reference", "prediction", "answer", "same"),
    [
        ("true", "1", "json", False),
        ("1", "1.0", "json", True),
        ("NaN", "NaN", "json", False),
        ("none", "none", "number", False),
        ("12", "It is 12 apples (of 40).", "number", False),
        ("1/2", "about 1/2", "number", True),
    ],
)
def test_by_name(reference, prediction, answer, same):
    assert matches(reference, prediction, answer) is same
