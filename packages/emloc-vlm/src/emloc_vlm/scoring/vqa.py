"""VQA's accuracy against ten people's answers (Antol et al. 2015, arXiv 1505.00468).

Predictions are normalised as by the VQA challenge's evaluation. It expects answers that are normalised
already; here they go through the same steps, so that "The left." and "left" agree.
"""

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD_NOT_IN_NUMBER = re.compile(r"\.(?!\d)")

_CONTRACTIONS = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't",
    "don't", "hadn't", "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd",
    "how'll", "how's", "isn't", "it'd", "it'd've", "it'll", "ma'am", "mightn't", "mightn't've",
    "might've", "mustn't", "must've", "needn't", "not've", "o'clock", "oughtn't", "'ow's'at",
    "shan't", "she'd've", "should've", "shouldn't", "shouldn't've", "somebody'd've",
    "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's",
    "something'd", "something'd've", "something'll", "that's", "there'd", "there'd've",
    "there're", "there's", "they'd", "they'd've", "they'll", "they're", "they've", "'twas",
    "wasn't", "we'd've", "we've", "weren't", "what'll", "what're", "what's", "what've", "when's",
    "where'd", "where's", "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll",
    "why're", "why's", "won't", "would've", "wouldn't", "wouldn't've", "y'all", "y'all'll",
    "y'all'd've", "you'd", "you'd've", "you'll", "you're", "you've",
)  # fmt: skip


def _lacking_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_REPAIRED = {wrong: word for word in _CONTRACTIONS for wrong in _lacking_one_apostrophe(word)}
_REPAIRED["somebody'd"] = "somebodyd"  # The challenge's table has this one the other way round.


def vqa_normalise(text: str) -> str:
    """An answer as VQA compares it.

    Punctuation becomes a space, or nothing where it stands beside a space or the text has a number
    like 1,000; periods stay only before digits; letters become small; articles go, number words become
    digits, and contractions get their missing apostrophe.
    """
    text = " ".join(text.split())
    has_number = bool(_COMMA_IN_NUMBER.search(text))
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or has_number else " ")
    cleaned = _PERIOD_NOT_IN_NUMBER.sub("", cleaned)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(references: Sequence[str], prediction: str) -> float:
    """The agreement of the people with the prediction: min(1, agreeing / 3), averaged.

    Each person is left out in turn and the others are asked, so of ten people four must agree for a
    full score. A single reference is compared as a whole.
    """
    said = vqa_normalise(prediction)
    people = len(references)
    agreeing = sum(vqa_normalise(reference) == said for reference in references)
    if people <= 1:
        return float(agreeing)
    one_agreeing_left_out = min(1.0, (agreeing - 1) / 3)
    another_left_out = min(1.0, agreeing / 3)
    total = agreeing * one_agreeing_left_out + (people - agreeing) * another_left_out
    return total / people
