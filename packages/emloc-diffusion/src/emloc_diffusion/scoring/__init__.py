"""Scores of pictures of a subject, as DreamBooth has them: fidelity to the subject and to the prompt.

`prompts` says what to ask for, `encoders` loads DINO and CLIP, `fidelity` compares their embeddings.
"""

from emloc_diffusion.scoring.encoders import ClipEncoder, DinoEncoder, load_clip, load_dino
from emloc_diffusion.scoring.fidelity import (
    FidelityScores,
    ImageEncoder,
    ImageTextEncoder,
    prompt_fidelity,
    score,
    subject_fidelity,
)
from emloc_diffusion.scoring.prompts import (
    LIVE_PROMPTS,
    OBJECT_PROMPTS,
    evaluation_prompts,
    own_prompts,
    plain_prompts,
)

__all__ = [
    "LIVE_PROMPTS",
    "OBJECT_PROMPTS",
    "ClipEncoder",
    "DinoEncoder",
    "FidelityScores",
    "ImageEncoder",
    "ImageTextEncoder",
    "evaluation_prompts",
    "load_clip",
    "load_dino",
    "own_prompts",
    "plain_prompts",
    "prompt_fidelity",
    "score",
    "subject_fidelity",
]
