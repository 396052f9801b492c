"""Draw the pictures of a plan, score them against those of the subject, and show them on one sheet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.digest import dataset_digest
from emloc.artefacts.file_digest import file_sha256
from emloc.artefacts.small_files import write_bytes
from emloc.errors import OutputError
from emloc_diffusion.album import Album, Wanted
from emloc_diffusion.data.images import read_upright
from emloc_diffusion.drawing import contact_sheet_png, draw_one, load_pipeline, with_lora
from emloc_diffusion.export import DIFFUSERS_NAME
from emloc_diffusion.picture_plan import PicturePlan
from emloc_diffusion.scoring import load_clip, load_dino, score

FOLDER = "pictures"
SHEET_NAME = "contact_sheet.png"


def draw_and_score(
    plan: PicturePlan,
    config: Any,
    checkpoint: Checkpoint,
    real: Sequence[Path],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Draw and score what the plan asks for, under `plan.folder`; pictures that are there already are not
    drawn again.

    Args:
        real: all pictures of the subject.
        dtype: of the pipeline's weights.

    Returns:
        `dino`, `clip_i`, `clip_t`, `generated_pictures`, `real_pictures` and `contact_sheet`, as far as
        they were asked for.
    """
    albums = _albums(plan, config, checkpoint)
    missing = {row: album for row, album in albums.items() if not album.complete}
    if missing:
        _draw(missing, plan, config, checkpoint.path, dtype)
    scores: dict[str, Any] = {}
    if plan.scored:
        scores |= _score(albums[plan.evaluated], plan.scored, config, real)
    if plan.shown:
        _write_sheet(albums, plan)
        scores["contact_sheet"] = SHEET_NAME
    return scores


def check_encoders(config: Any) -> None:
    """Load the encoders once and let go of them: what they lack should not be found out after hours of
    drawing, and they should not take memory while it lasts.

    Raises:
        CheckpointError, DependencyError: as `load_dino` and `load_clip`.
    """
    if config.dino_model is not None:
        load_dino(config.dino_model)
    if config.clip_model is not None:
        load_clip(config.clip_model)


def _albums(plan: PicturePlan, config: Any, checkpoint: Checkpoint) -> dict[str, Album]:
    """Albums by row; their settings are all that shapes a picture."""
    model = {
        "model_digest": checkpoint.digest(),
        "companions_digest": checkpoint.companions_digest(),
        **{
            name: getattr(config, name)
            for name in ("resolution", "guidance_scale", "num_inference_steps", "dtype", "device")
        },
    }
    return {
        row: Album(
            plan.folder / FOLDER / row, plan.wanted(row), {**model, "lora_digest": _digest(adapter)}
        )
        for row, adapter in plan.rows.items()
    }


def _digest(adapter: Path | None) -> str | None:
    """A digest of what a pipeline loads."""
    if adapter is None:
        return None
    file = adapter / DIFFUSERS_NAME
    return file_sha256(file) if file.is_file() else dataset_digest(str(adapter))


def _draw(
    albums: Mapping[str, Album],
    plan: PicturePlan,
    config: Any,
    pipeline_folder: Path,
    dtype: torch.dtype,
) -> None:
    pipeline = load_pipeline(pipeline_folder, config.device, dtype=dtype)
    for row in albums:  # what a pipeline cannot use is refused before the first picture is drawn
        with with_lora(pipeline, plan.rows[row]):
            pass
    for row, album in albums.items():
        with with_lora(pipeline, plan.rows[row]) as tuned:
            album.draw(
                lambda one, tuned=tuned: draw_one(
                    tuned, one.prompt, one.seed, config.resolution, config.num_inference_steps,
                    config.guidance_scale,
                )
            )  # fmt: skip


def _score(
    album: Album,
    scored: Mapping[Wanted, str],
    config: Any,
    real: Sequence[Path],
) -> dict[str, Any]:
    dino, clip = config.dino_model, config.clip_model
    scores = score(
        [(plain, read_upright(album.path(one))) for one, plain in scored.items()],
        [read_upright(path) for path in real],
        None if dino is None else load_dino(dino, config.device),
        None if clip is None else load_clip(clip, config.device),
    )
    fidelity_scores = {"dino": scores.dino, "clip_i": scores.clip_i, "clip_t": scores.clip_t}
    return {
        **{name: value for name, value in fidelity_scores.items() if value is not None},
        "generated_pictures": scores.generated_count,
        "real_pictures": scores.real_count,
    }


def _write_sheet(albums: Mapping[str, Album], plan: PicturePlan) -> None:
    rows = {
        row: [read_upright(album.path(one)) for one in plan.shown] for row, album in albums.items()
    }
    content = contact_sheet_png(rows, [one.prompt for one in plan.shown])
    path = plan.folder / SHEET_NAME
    if not path.exists():
        write_bytes(path, content)
    elif path.read_bytes() != content:
        raise OutputError(
            f"{path} exists and shows something else; choose another output_dir or remove it."
        )
