"""The offered option that a free-form answer chooses.

PMC-VQA (Zhang et al. 2023, arXiv 2305.10415) asks for a letter and WorldCuisines (Winata et al. 2024,
arXiv 2410.12705) for a number, but models answer "B", "(B)", "B: lungs", "The answer is B." or the
option's own text. Forms are tried from the clearest on; the first one found decides, and decides
nothing if it names several options.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence

from emloc.errors import DataError
from emloc_vlm.scoring.text import normalise

_BEFORE = r"[\s\"'“‘(\[*_]*"
_AFTER = r"[\s\"'”’)\]*_.:,;!]*"
_END = r"(?=\s*(?:$|[\n.,;:!)\]*\"”’']|[-–—](?:\s|$)))"
"""Nothing or punctuation follows a key; a hyphen only if it is a dash."""
_CUE = (
    r"\b(?:answer|choice|option|letter)\b\s*(?:(?:is|would be|should be|must be)\b\s*:?|:)"
    r"(?:\s*(?:the\s+)?(?:option|choice|letter|number)\b)?"
)
_NO_NUMBER_BEFORE = r"(?<!\d[.,:/])(?<!\A[-.])(?<![\s(=][-.])"
"""Neither the rest of a longer number nor a sign."""
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
"""Scripts that put no spaces around each word: Thai, Lao, Japanese, Chinese; Korean's endings."""


def multiple_choice(
    references: Sequence[str], prediction: str, options: Mapping[str, str]
) -> float:
    """1 if the prediction chooses the right option, else 0; PMC-VQA's accuracy of one answer.

    Args:
        references: keys of right options, or their texts.

    Raises:
        DataError: a reference is none of the options.
    """
    right = {_key_of(reference, options) for reference in references}
    return float(chosen_option(prediction, options) in right)


def chosen_option(prediction: str, options: Mapping[str, str]) -> str | None:
    """The key of the option that a prediction chooses, None if it chooses none or several.

    The "A" of "A large mass" is an article, not a choice: a letter counts where nothing or punctuation
    follows it, where the option's text follows, or after words like "option".
    """
    text = unicodedata.normalize("NFKC", prediction).strip()
    keys = "|".join(re.escape(key) for key in sorted(options, key=len, reverse=True))
    if not keys:
        return None
    forms = (_alone, _spelled_out, _declared, _heading, _mentioned, _concluded)
    for form in forms:
        if named := {key.upper() for key in form(text, keys, options)}:
            break
    else:
        named = _contained(text, options)
    chosen = [key for key in options if key.upper() in named]
    return chosen[0] if len(chosen) == 1 else None


def _key_of(reference: str, options: Mapping[str, str]) -> str:
    written = reference.strip()
    for key in (written, written.upper()):
        if key in options:
            return key
    same = [key for key, text in options.items() if normalise(text) == normalise(written)]
    if len(same) != 1:
        raise DataError(
            f"The answer {reference!r} is none of the options {', '.join(options)}; give one of them."
        )
    return same[0]


def _alone(text: str, keys: str, options: Mapping[str, str]) -> list[str]:
    """`B`, `(b)`, `**B.**`."""
    match = re.fullmatch(rf"{_BEFORE}({keys}){_AFTER}", text, re.IGNORECASE)
    return [match[1]] if match else []


def _spelled_out(text: str, keys: str, options: Mapping[str, str]) -> list[str]:
    """`lungs`, `B lungs`: nothing but the option's text, with or without its key."""
    said = normalise(text)
    return [
        key
        for key, option in options.items()
        if normalise(option) and said in (normalise(option), normalise(f"{key} {option}"))
    ]


def _declared(text: str, keys: str, options: Mapping[str, str]) -> list[str]:
    """`The answer is B`, `Answer: (B) lungs`."""
    declared: list[str] = []
    for match in re.finditer(rf"{_CUE}{_BEFORE}{_key(keys)}", text, re.IGNORECASE):
        ends = re.match(_END, text[match.end() :])
        # "The answer is a mass" and "The answer is A mass" have an article; "is B because" has not.
        if ends or not (match[1].islower() or match[1] in ("A", "I")):
            declared.append(match[1])
    return declared


def _heading(text: str, keys: str, options: Mapping[str, str]) -> list[str]:
    """`B: lungs`, `B) lungs`, `B - lungs`, at the beginning of a line."""
    pattern = rf"^{_BEFORE}{_key(keys)}{_END}"
    return re.findall(pattern, text, re.IGNORECASE | re.MULTILINE)


def _mentioned(text: str, keys: str, options: Mapping[str, str]) -> list[str]:
    """`I would take option B here`, `The lungs (B)`."""
    named = rf"\b(?:option|choice|letter|number)\s+{_BEFORE}{_key(keys)}"
    pattern = rf"{named}|\(\s*({keys})\s*\)"
    return [match[1] or match[2] for match in re.finditer(pattern, text, re.IGNORECASE)]


def _concluded(text: str, keys: str, options: Mapping[str, str]) -> list[str]:
    """`I think it is B.`: a capital or number after a verb."""
    pattern = rf"\b(?i:is|be|it['’]s|choose|select|pick)\s{_BEFORE}{_key(keys)}{_END}"
    return re.findall(pattern, text)


def _key(keys: str) -> str:
    """A key that is no part of a word or number, and not one of several: "B-cell", "3:30", "B or C"."""
    another = rf"[^\w\n]*(?:(?:and|or)\b[^\w\n]*)?(?:{keys})(?:[^\w\n]*(?:\Z|\n)|[.,;:)/]|\s+(?:and|or)\b)"
    return rf"({keys})(?![-'’]?\w|[.,:/]\d|\s?[%°])(?!{another})"


def _contained(text: str, options: Mapping[str, str]) -> set[str]:
    """Options whose text the answer contains, without those that are part of a longer one of them."""
    said = normalise(text)
    texts = {key: normalise(option) for key, option in options.items()}
    inside = {key: option for key, option in texts.items() if option and _has_words(said, option)}
    return {
        key.upper()
        for key, option in inside.items()
        if not any(option != longer and option in longer for longer in inside.values())
    }


def _has_words(text: str, words: str) -> bool:
    """Return whether a text has these words or this number, whole: 3 is not in "-3", "1.3" or "3/4"."""
    if _UNSPACED.search(words):
        return words in text
    before = _NO_NUMBER_BEFORE if words[0].isdigit() else ""
    after = r"(?![.,:/]\d)" if words[-1].isdigit() else ""
    return re.search(rf"(?<!\w){before}{re.escape(words)}(?!\w){after}", text) is not None
