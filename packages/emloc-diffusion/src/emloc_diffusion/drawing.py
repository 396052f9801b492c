"""Draw pictures with a pipeline, the same prompts and seeds with and without a LoRA; sheets of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image

from emloc.progress import progress_bar
from emloc_diffusion.encode.components import load_errors


def load_pipeline(folder: Path, device: str = "cpu", **components: Any) -> Any:
    """The stock pipeline of a folder; `components` take the place of its own.

    Raises:
        CheckpointError: diffusers cannot load it.
    """
    from diffusers import DiffusionPipeline

    with load_errors(folder, "pipeline"):
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, **components
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    per_prompt: int,
    resolution: int,
    steps: int,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> list[Image.Image]:
    """`per_prompt` pictures of each prompt in turn; picture i of a prompt has seed `seed + i`.

    Every picture is drawn by itself, so that it does not depend on what else is drawn.
    """
    more = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    drawn: list[Image.Image] = []
    with (
        torch.random.fork_rng(),
        torch.inference_mode(),
        progress_bar("draw", len(prompts) * per_prompt) as advance,
    ):
        for prompt in prompts:
            for index in range(per_prompt):
                found = pipeline(
                    prompt,
                    num_inference_steps=steps,
                    height=resolution,
                    width=resolution,
                    generator=torch.Generator().manual_seed(seed + index),
                    **more,
                )
                drawn.append(found.images[0])
                advance()
    return drawn


@contextmanager
def with_lora(pipeline: Any, adapter: Path | None) -> Iterator[Any]:
    """The pipeline with a LoRA in diffusers' format, which is taken off again."""
    if adapter is None:
        yield pipeline
        return
    with load_errors(adapter, "LoRA"):
        pipeline.load_lora_weights(str(adapter))
    try:
        yield pipeline
    finally:
        pipeline.unload_lora_weights()


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str], path: Path
) -> None:
    """One row per model, one column per picture, as PNG.

    Args:
        rows: pictures by the row's name, as many in each.
        captions: above the columns.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = max(len(pictures) for pictures in rows.values())
    figure, axes = plt.subplots(
        len(rows), count, figsize=(1.6 * count + 1, 1.75 * len(rows)), squeeze=False
    )
    for line, (name, pictures) in zip(axes, rows.items()):
        line[0].set_ylabel(name, fontsize=9)
        for axis, picture in zip(line, pictures):
            axis.imshow(picture)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
    for axis, caption in zip(axes[0], captions):
        axis.set_title(caption, fontsize=8, wrap=True)
    figure.tight_layout()
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
    temporary.rename(path)
