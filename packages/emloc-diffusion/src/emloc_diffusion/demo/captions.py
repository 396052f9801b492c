"""Captions for easy-VQA's pictures, out of what their questions give away: `a red circle`."""

from collections.abc import Iterable
from pathlib import Path

from emloc.demos.easy_vqa import COLORS, SHAPES, Question

RARE = "sks"
"""A word that no caption has: free to name something new."""

# Colours first: a tokenizer that merged rectangle's `re` before green's `gr` would split green.
VOCABULARY = (*COLORS, *SHAPES, "shape", RARE)


def caption(shape: str | None = None, color: str | None = None) -> str:
    """`a red circle`, `a circle`, `a red shape`, or nothing."""
    if shape is None and color is None:
        return ""
    return " ".join(word for word in ("a", color, shape or "shape") if word)


def described(asked: Iterable[Question]) -> dict[Path, tuple[str, str]]:
    """Shape and colour of every picture whose questions name both; the others are left out."""
    shown: dict[Path, set[str]] = {}
    for question in asked:
        word, true = question.fact
        if true:
            shown.setdefault(question.image, set()).add(word)
    shape_and_color: dict[Path, tuple[str, str]] = {}
    for image, words in sorted(shown.items()):
        shape = next((word for word in SHAPES if word in words), None)
        color = next((word for word in COLORS if word in words), None)
        if shape and color:
            shape_and_color[image] = (shape, color)
    return shape_and_color
