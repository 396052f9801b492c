"""Draw pictures with a pipeline, the same prompts and seeds with and without a LoRA; sheets of them."""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image

from emloc.artefacts.small_files import write_bytes
from emloc.machine.progress import progress_bar
from emloc_diffusion.encode.components import LIBRARIES, load_errors, read_model_index, whole_part
from emloc_diffusion.loaded_lora import put_on


def load_pipeline(folder: Path, device: str = "cpu", **components: Any) -> Any:
    """The stock pipeline of a folder; `components` take the place of its own, and are what else
    `from_pretrained` takes, such as `dtype`.

    Raises:
        CheckpointError: diffusers cannot load it.
    """
    from diffusers import DiffusionPipeline

    alike = {name: components[name] for name in ("dtype", "variant") if name in components}
    with load_errors(folder, "pipeline"):
        models = {
            name: whole_part(folder, name, getattr(import_module(value[0]), value[1]), **alike)
            for name, value in read_model_index(folder).items()
            if name not in components and any((folder / name).glob("*.safetensors"))
            if value[0] in LIBRARIES
        }
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, **models, **components
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    per_prompt: int,
    resolution: int,
    steps: int | None,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> list[Image.Image]:
    """`per_prompt` pictures of each prompt in turn; picture i of a prompt has seed `seed + i`."""
    drawn: list[Image.Image] = []
    with progress_bar("draw", len(prompts) * per_prompt) as advance:
        for prompt in prompts:
            for index in range(per_prompt):
                drawn.append(
                    draw_one(pipeline, prompt, seed + index, resolution, steps, guidance_scale)
                )
                advance()
    return drawn


def draw_one(
    pipeline: Any,
    prompt: str,
    seed: int,
    resolution: int,
    steps: int | None = None,
    guidance_scale: float | None = None,
) -> Image.Image:
    """One picture, which depends on nothing that was drawn before; steps and guidance by default the
    pipeline's own."""
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    with torch.random.fork_rng(), torch.inference_mode():
        drawn = pipeline(
            prompt,
            height=resolution,
            width=resolution,
            generator=torch.Generator().manual_seed(seed),
            **{name: value for name, value in options.items() if value is not None},
        )
    return drawn.images[0]


@contextmanager
def with_lora(pipeline: Any, adapter: Path | None) -> Iterator[Any]:
    """The pipeline with a LoRA, put on as anybody would by `load_lora_weights`, and taken off again.

    Args:
        adapter: a folder with diffusers' file, or with PEFT's alone; None puts nothing on.

    Raises:
        CheckpointError: it is no LoRA.
        MismatchError: the pipeline cannot load it, or does not use all of it.
    """
    if adapter is None:
        yield pipeline
        return
    try:
        put_on(pipeline, adapter)
        yield pipeline
    finally:
        pipeline.unload_lora_weights()


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str], path: Path
) -> None:
    """One row per model, one column per picture, as PNG.

    Args:
        rows: pictures by the row's name; a row may have fewer.
        captions: above the columns; one that all have is written once.
    """
    write_bytes(path, contact_sheet_png(rows, captions))


def contact_sheet_png(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> bytes:
    """The file's content: of the same pictures it is the same."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = max(len(pictures) for pictures in rows.values())
    figure, axes = plt.subplots(
        len(rows), count, figsize=(1.6 * count + 1, 1.75 * len(rows) + 0.4), squeeze=False
    )
    for line, (name, pictures) in zip(axes, rows.items()):
        line[0].set_ylabel(textwrap.fill(name, 20), fontsize=9, parse_math=False)
        for axis, picture in zip(line, pictures):
            axis.imshow(picture)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
    if len(set(captions)) == 1:
        figure.suptitle(textwrap.fill(captions[0], 26 * count), fontsize=9, parse_math=False)
    else:
        for axis, caption in zip(axes[0], captions):
            axis.set_title(textwrap.fill(caption, 24), fontsize=8, parse_math=False)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, dpi=100, format="png")
    plt.close(figure)
    return content.getvalue()
