"""Fidelity to a subject and to a prompt, as DreamBooth measures them (Ruiz et al. 2023, section 4).

With `cos` the cosine of two embeddings, generated pictures `g_i`, real pictures `r_j` of the subject and
the texts `t_i` of the prompts:

    subject fidelity = mean over all i and j of cos(g_i, r_j)     DINO and CLIP-I, by encoder
    prompt fidelity  = mean over all i of cos(g_i, t_i)           CLIP-T

A mean of cosines between all of two sets is the inner product of the sets' mean unit vectors, so no
matrix of all pairs is made. Everything is float64, whatever the embeddings are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from emloc.errors import DataError, MismatchError


class ImageEncoder(Protocol):
    """Embeds pictures."""

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings, float32 of shape (pictures, width), on the CPU."""
        ...


class ImageTextEncoder(ImageEncoder, Protocol):
    """Embeds pictures and texts in one space."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings, float32 of shape (texts, width), on the CPU."""
        ...


@dataclass(frozen=True)
class FidelityScores:
    """DreamBooth's scores of one subject; each is from -1 to 1, and higher is better; None is one whose
    encoder was not asked.

    Attributes:
        dino: subject fidelity by DINO, which tells two subjects of one class apart.
        clip_i: subject fidelity by CLIP, which sees mostly the class.
        clip_t: prompt fidelity by CLIP.
        generated_count: generated pictures.
        real_count: real pictures; every generated one was compared with all of them.
    """

    dino: float | None
    clip_i: float | None
    clip_t: float | None
    generated_count: int
    real_count: int


def subject_fidelity(generated: Tensor, real: Tensor) -> float:
    """The mean cosine similarity over all pairs of a generated and a real picture.

    Args:
        generated: embeddings of the generated pictures, (n, width) of any float type.
        real: embeddings of all real pictures of the subject, (m, width).

    Raises:
        DataError: no vectors, or one of NaN, infinity or nothing but zeros; says which.
        MismatchError: not two matrices of one width.
    """
    first, second = _unit("generated", generated), _unit("real", real)
    if first.shape[1] != second.shape[1]:
        raise MismatchError(
            f"generated embeddings are {first.shape[1]} wide and real ones {second.shape[1]}; use one "
            f"encoder for both."
        )
    return _within_one(torch.dot(first.mean(dim=0), second.mean(dim=0)))


def prompt_fidelity(images: Tensor, texts: Tensor) -> float:
    """The mean cosine similarity of each picture and the text of its own prompt.

    Args:
        images: embeddings of the pictures, (n, width) of any float type.
        texts: embeddings of their prompts, row by row, (n, width).

    Raises:
        DataError: no vectors, or one of NaN, infinity or nothing but zeros; says which.
        MismatchError: not two matrices of one shape.
    """
    first, second = _unit("image", images), _unit("text", texts)
    if first.shape != second.shape:
        raise MismatchError(
            f"image embeddings are of shape {tuple(first.shape)} and text ones {tuple(second.shape)}; "
            f"give one text of the same encoder per image."
        )
    return _within_one((first * second).sum(dim=1).mean())


def score(
    generated: Sequence[tuple[str, Image.Image]],
    real: Sequence[Image.Image],
    dino: ImageEncoder | None,
    clip: ImageTextEncoder | None,
) -> FidelityScores:
    """DreamBooth's scores of the generated pictures of one subject.

    Args:
        generated: each picture with the prompt that it is measured against. That is the prompt without
            the unique token (`plain_prompts`), which CLIP would read as a word that it does not know.
        real: all real pictures of the subject.
        dino: for DINO; None leaves it out.
        clip: for CLIP-I and CLIP-T; None leaves them out.

    Raises:
        DataError: nothing generated, no real pictures, or an encoder gives no usable embedding.
    """
    if not generated:
        raise DataError("There are no generated pictures to score; generate some from each prompt.")
    if not real:
        raise DataError(
            "There are no real pictures of the subject to compare the generated ones with."
        )
    pictures = [picture for _, picture in generated]
    of_dino = clip_i = clip_t = None
    if dino is not None:
        of_dino = subject_fidelity(dino.images(pictures), dino.images(real))
    if clip is not None:
        prompts = [prompt for prompt, _ in generated]
        unique = list(dict.fromkeys(prompts))  # usually several pictures of each
        of_prompt = {prompt: row for row, prompt in enumerate(unique)}
        in_clip = clip.images(pictures)
        clip_i = subject_fidelity(in_clip, clip.images(real))
        clip_t = prompt_fidelity(in_clip, clip.texts(unique)[[of_prompt[text] for text in prompts]])
    return FidelityScores(of_dino, clip_i, clip_t, len(pictures), len(real))


def _unit(what: str, vectors: Tensor) -> Tensor:
    """The rows, float64 and of length one."""
    if vectors.ndim != 2:
        raise MismatchError(
            f"{what} embeddings are of shape {tuple(vectors.shape)}; expected (how many, width)."
        )
    if vectors.numel() == 0:
        raise DataError(
            f"There are no {what} embeddings (shape {tuple(vectors.shape)}); a mean needs at least one."
        )
    values = vectors.detach().to("cpu", torch.float64)
    finite = values.isfinite().all(dim=1)
    if not finite.all():
        raise DataError(
            f"{what} embedding {int(finite.logical_not().nonzero()[0])} has NaN or infinity; check whether "
            f"that picture or the encoder's weights are damaged."
        )
    # Largest entries come to one first: squares of extreme entries would overflow or vanish.
    largest = values.abs().amax(dim=1, keepdim=True)
    if (largest == 0).any():
        raise DataError(
            f"{what} embedding {int((largest == 0).nonzero()[0, 0])} is all zeros, so it has no direction; "
            f"check whether the encoder's weights were loaded."
        )
    scaled = values / largest
    return scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)


def _within_one(cosine: Tensor) -> float:
    """Rounding may leave [-1, 1] by an ulp."""
    return min(1.0, max(-1.0, float(cosine)))
