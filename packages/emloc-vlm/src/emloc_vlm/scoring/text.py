"""Normalisation of texts before they are compared, in any language or as SQuAD has it."""

import re
import string
import unicodedata

_FULL_STOPS = ".。 "
_MINUS = str.maketrans({"\u2212": "-"})
_POWER = re.compile(r"(?<=\d)[\u00b2\u00b3\u00b9\u2070-\u2079]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Without case, width of characters, repeated spaces, and full stops at the end; in any language.

    Every minus sign is a hyphen, and raised digits stay apart from the number that they stand at.
    """
    text = _POWER.sub(r"^\g<0>", text.translate(_MINUS))
    text = unicodedata.normalize("NFKC", text).casefold()
    # Folding case may leave characters apart that belong together.
    text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split()).rstrip(_FULL_STOPS)


def squad_normalise(text: str) -> str:
    """Lower case without ASCII punctuation, articles and repeated spaces, in this order.

    SQuAD's normalisation (Rajpurkar et al. 2016, arXiv 1606.05250), which WebSRC takes over.
    """
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())
