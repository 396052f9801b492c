"""The metrics by name, and the means of what they give.

An answered row has `prediction` and `reference` (a text, or a list of accepted texts), and where the
data set has them `options` (key to text) and `kind` ("closed" or "open").
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emloc_vlm.scoring.choice import chosen_option, multiple_choice
from emloc_vlm.scoring.overlap import best, exact, occurs, token_f1, token_recall
from emloc_vlm.scoring.text import squad_normalise
from emloc_vlm.scoring.vqa import vqa_accuracy, vqa_normalise


@dataclass(frozen=True)
class Metric:
    """The way in which a benchmark scores.

    Attributes:
        score: scores of one answered row by name, each from 0 to 1; `exact_match` is always among them.
    """

    score: Callable[[Mapping[str, Any]], dict[str, float]]

    def aggregate(self, rows_of_scores: Iterable[Mapping[str, float]]) -> dict[str, float | None]:
        """The mean of each score over the rows that have it, and how many have it as `<score>_count`.

        `exact_match` is there even without rows, as None.
        """
        values: dict[str, list[float]] = {"exact_match": []}
        for scores in rows_of_scores:
            for name, score in scores.items():
                values.setdefault(name, []).append(score)
        means: dict[str, float | None] = {}
        for name, numbers in values.items():
            means[name] = sum(numbers) / len(numbers) if numbers else None
            means[f"{name}_count"] = len(numbers)
        return means


def _exact_match(row: Mapping[str, Any]) -> dict[str, float]:
    return {"exact_match": best(exact, _references(row), row["prediction"])}


def _vqa_accuracy(row: Mapping[str, Any]) -> dict[str, float]:
    """`exact_match` is whether anybody gave this answer."""
    references, prediction = _references(row), row["prediction"]
    return {
        "vqa_accuracy": vqa_accuracy(references, prediction),
        "exact_match": best(_vqa_exact, references, prediction),
    }


def _multiple_choice(row: Mapping[str, Any]) -> dict[str, float]:
    """`exact_match` is the accuracy; `answered` whether an option was chosen at all."""
    references, prediction = _references(row), row["prediction"]
    options = row.get("options") or _unnamed_options(references)
    return {
        "exact_match": multiple_choice(references, prediction, options),
        "answered": float(chosen_option(prediction, options) is not None),
    }


def _websrc(row: Mapping[str, Any]) -> dict[str, float]:
    references, prediction = _references(row), row["prediction"]
    # Answers that are nothing but punctuation and articles ask for nothing.
    asked = [text for text in references if squad_normalise(text)] or [""]
    return {
        "exact_match": best(_squad_exact, asked, prediction),
        "f1": best(token_f1, asked, prediction),
    }


def _worldcuisines(row: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy only: the BERTScore of open answers that the paper also reports needs a model."""
    references, prediction = _references(row), row["prediction"]
    if row.get("options"):
        accuracy = multiple_choice(references, prediction, row["options"])
        return {"exact_match": accuracy, "multiple_choice_accuracy": accuracy}
    return {
        "exact_match": best(exact, references, prediction),
        "open_accuracy": best(occurs, references, prediction),
    }


def _vqa_rad(row: Mapping[str, Any]) -> dict[str, float]:
    """VQA-RAD (Lau et al. 2018): closed questions by exact match, open ones by recall as well.

    Without `kind`, a question is closed if its answer is yes or no.
    """
    references, prediction = _references(row), row["prediction"]
    match = best(_vqa_exact, references, prediction)
    yes_or_no = all(vqa_normalise(text) in ("yes", "no") for text in references)
    if (row.get("kind") or ("closed" if yes_or_no else "open")) == "closed":
        return {"exact_match": match, "closed_accuracy": match}
    return {
        "exact_match": match,
        "open_exact_match": match,
        "open_recall": best(token_recall, references, prediction),
    }


def _references(row: Mapping[str, Any]) -> list[str]:
    reference = row["reference"]
    return [reference] if isinstance(reference, str) else [str(text) for text in reference]


def _vqa_exact(reference: str, prediction: str) -> float:
    if not vqa_normalise(
        reference
    ):  # an article or a mark alone, which is all that there is to compare
        return exact(reference, prediction)
    return exact(reference, prediction, vqa_normalise)


def _squad_exact(reference: str, prediction: str) -> float:
    return exact(reference, prediction, squad_normalise)


def _unnamed_options(references: Sequence[str]) -> dict[str, str]:
    """Keys alone, where a row does not say what they stand for: numbers or letters, as the reference."""
    numbers = all(reference.strip().isdigit() for reference in references)
    return dict.fromkeys("123456789" if numbers else "ABCDEFGH", "")


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric(_exact_match),
    "vqa_accuracy": Metric(_vqa_accuracy),
    "multiple_choice": Metric(_multiple_choice),
    "websrc": Metric(_websrc),
    "worldcuisines": Metric(_worldcuisines),
    "vqa_rad": Metric(_vqa_rad),
}
"""The names that `metric` may take, in options and in the rows of a benchmark."""
