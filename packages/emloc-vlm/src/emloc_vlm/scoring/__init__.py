"""Scores of answers about images: one file per idea, all pure functions on text.

`METRICS` names what an evaluation can ask for: each scores one answered row, and takes the means of many.
"""

from emloc_vlm.scoring.choice import chosen_option, multiple_choice
from emloc_vlm.scoring.metrics import METRICS, Metric
from emloc_vlm.scoring.overlap import best, exact, occurs, token_f1, token_recall
from emloc_vlm.scoring.text import normalise, squad_normalise
from emloc_vlm.scoring.vqa import vqa_accuracy, vqa_normalise

__all__ = [
    "METRICS",
    "Metric",
    "best",
    "chosen_option",
    "exact",
    "multiple_choice",
    "normalise",
    "occurs",
    "squad_normalise",
    "token_f1",
    "token_recall",
    "vqa_accuracy",
    "vqa_normalise",
]
