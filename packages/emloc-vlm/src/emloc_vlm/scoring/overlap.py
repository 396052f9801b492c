"""A reference and a prediction compared as wholes, as parts, and word by word."""

from collections import Counter
from collections.abc import Callable, Sequence

from emloc_vlm.scoring.text import normalise, squad_normalise
from emloc_vlm.scoring.vqa import vqa_normalise


def best(score: Callable[[str, str], float], references: Sequence[str], prediction: str) -> float:
    """The score of the reference that fits best; any one of several accepted answers will do."""
    return max((score(reference, prediction) for reference in references), default=0.0)


def exact(reference: str, prediction: str, normalised: Callable[[str], str] = normalise) -> float:
    """1 if both are the same text after normalisation, else 0."""
    return float(normalised(reference) == normalised(prediction))


def occurs(reference: str, prediction: str) -> float:
    """1 if the reference occurs somewhere in the prediction, both normalised, else 0.

    The accuracy of open-ended answers that WorldCuisines' own scoring uses (Winata et al. 2024,
    arXiv 2410.12705): the dish may be named within a sentence. An empty reference occurs nowhere.
    """
    wanted = normalise(reference)
    return float(bool(wanted) and wanted in normalise(prediction))


def token_f1(reference: str, prediction: str) -> float:
    """F1 of the words that both have, counted as often as both have them.

    SQuAD's F1 (Rajpurkar et al. 2016), which WebSRC reports (Chen et al. 2021, arXiv 2101.09465). Where
    either has no words, it is 1 if the other has none either.
    """
    wanted, said = squad_normalise(reference).split(), squad_normalise(prediction).split()
    if not wanted or not said:
        return float(wanted == said)
    shared = (Counter(wanted) & Counter(said)).total()
    return 2 * shared / (len(wanted) + len(said))


def token_recall(reference: str, prediction: str) -> float:
    """The share of the reference's words that the prediction has too.

    LLaVA-Med's score for open questions (Li et al. 2023, arXiv 2306.00890): the ratio of ground-truth
    tokens that appear in the generated answer, both normalised as for VQA. Saying a word twice gains
    nothing. A reference without words is met by a prediction without words alone.
    """
    wanted, said = vqa_normalise(reference).split(), set(vqa_normalise(prediction).split())
    if not wanted:
        return float(not said)
    return sum(word in said for word in wanted) / len(wanted)
