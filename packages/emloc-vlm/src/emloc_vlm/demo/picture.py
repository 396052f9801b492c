"""One picture of sample questions: the image, and what each row answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from emloc_vlm.images import ImageRef

SHOWN = 8


def draw_samples(
    images: Sequence[Path], answers: Mapping[str, Sequence[Mapping[str, Any]]], path: Path
) -> None:
    """Write the first few samples to `path`, right answers in green.

    Args:
        answers: by the row's name, in the order of `images`, as `evaluate` returns them.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = min(SHOWN, len(images))
    figure, axes = plt.subplots(1, count, figsize=(2.3 * count, 3.6), squeeze=False)
    for index, axis in enumerate(axes[0]):
        axis.imshow(ImageRef(images[index], str(images[index])).open())
        axis.axis("off")
        question = next(iter(answers.values()))[index]["question"]
        axis.set_title(question, fontsize=8, wrap=True)
        for line, (name, scored) in enumerate(answers.items()):
            right = scored[index]["scores"]["exact_match"] == 1
            axis.text(
                0.0, -0.12 - 0.11 * line, f"{name}: {scored[index]['prediction'] or '–'}",
                transform=axis.transAxes, fontsize=8, color="#188038" if right else "#c5221f",
            )  # fmt: skip
    figure.tight_layout(rect=(0, 0.22, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
