"""The pictures that evaluate draws: rows are models, columns are prompts and seeds.

Scores need every prompt `num_images_per_prompt` times, by the model that is evaluated. A contact sheet
shows `validation_prompt` as often, or every scored prompt once, by that model, the base and further
adapters. Picture i of a prompt has the seed `drawing_seed + i` whoever draws it: so rows can be compared,
and what both ask for is drawn once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc.adapters.rounding import Rounding
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.intact import require_read
from emloc.artefacts.manifest import Manifest
from emloc.errors import CheckpointError, ConfigError
from emloc_diffusion.album import Wanted
from emloc_diffusion.scoring import evaluation_prompts, own_prompts, plain_prompts

BASE = "base"


@dataclass(frozen=True)
class PicturePlan:
    """The pictures of one evaluation.

    Attributes:
        rows: each model's adapter, by its name in files and on the contact sheet.
        evaluated: the row that is scored.
        scored: what CLIP measures each of its pictures against: the prompt without the unique token.
        shown: the columns of the contact sheet; none without one.
        folder: `output_dir`.
    """

    rows: Mapping[str, Path | None]
    evaluated: str
    scored: Mapping[Wanted, str]
    shown: Sequence[Wanted]
    folder: Path

    def wanted(self, row: str) -> Sequence[Wanted]:
        """The pictures that a row's model draws, each once."""
        scored = self.scored if row == self.evaluated else ()
        return list(dict.fromkeys([*scored, *self.shown]))


def plan_pictures(config: Any, model: Checkpoint) -> PicturePlan | None:
    """Plan the pictures that the options ask for; None where that is none.

    Raises:
        ConfigError: they ask for what cannot be, or for half of it.
        CheckpointError: there is no such adapter.
        DataError: the file of prompts is not usable.
    """
    scores = bool(config.dino_model or config.clip_model)
    sheet = bool(config.contact_sheet_adapters) or config.validation_prompt is not None
    prompts = _prompts(config)
    if not scores and not sheet:
        if prompts:
            raise ConfigError(
                "evaluate: subject_token is set, but nothing is drawn; set dino_model or clip_model to "
                "score pictures, or validation_prompt or contact_sheet_adapters to see some."
            )
        return None
    if config.output_dir is None:
        raise ConfigError("evaluate: output_dir is required (where the pictures go).")
    if scores and not prompts:
        raise ConfigError(
            "evaluate: dino_model and clip_model score pictures of the subject; set subject_token (sks) "
            "and class_name (dog), or prompts_file."
        )
    rows, evaluated = _rows(config, sheet)
    if sheet:
        _refuse_corrected_on_emulator(model, rows)
    seeds = [config.drawing_seed + i for i in range(config.num_images_per_prompt)]
    shown: list[Wanted] = []
    if sheet and config.validation_prompt is not None:
        shown = [Wanted(config.validation_prompt, seed) for seed in seeds]
    elif sheet:
        if not prompts:
            raise ConfigError(
                "evaluate: contact_sheet_adapters is set, but not what to draw; set validation_prompt, or "
                "subject_token and class_name."
            )
        shown = [Wanted(prompt, seeds[0]) for prompt in prompts]
    scored = {Wanted(p, seed): plain for p, plain in prompts.items() for seed in seeds}
    return PicturePlan(rows, evaluated, scored if scores else {}, shown, config.output_dir)


def _prompts(config: Any) -> dict[str, str]:
    """The prompts that are drawn, with what they say without the unique token; none if no subject is
    named.
    """
    token, noun, live = config.subject_token, config.class_name, config.subject_kind == "live"
    if config.prompts_file is not None:
        if token is None:
            raise ConfigError(
                "evaluate: prompts_file is set without subject_token, the word to look for."
            )
        return own_prompts(config.prompts_file, token)
    if token is None and noun is None:
        return {}
    if token is None or noun is None:
        missing = "subject_token (sks)" if token is None else "class_name (dog)"
        raise ConfigError(f"evaluate: {missing} is missing; the prompts name the subject by both.")
    return dict(zip(evaluation_prompts(token, noun, live), plain_prompts(noun, live)))


def _rows(config: Any, sheet: bool) -> tuple[dict[str, Path | None], str]:
    """The rows, and which of them is evaluated."""
    adapters = [Path(name) for name in config.contact_sheet_adapters]
    evaluated = None if config.adapter is None else Path(config.adapter)
    if evaluated is not None and evaluated.resolve() not in [a.resolve() for a in adapters]:
        adapters.append(evaluated)
    rows: dict[str, Path | None] = {BASE: None}
    for adapter in adapters:
        if not adapter.is_dir():
            raise CheckpointError(f"No folder {adapter}; pass the folder of an adapter.")
        if Rounding.runs_on(Manifest.find(adapter)) is not None:
            raise ConfigError(
                f"evaluate: pictures are drawn with the pipeline's own weights, and {adapter} runs on "
                f"dequantised ones; merge it, and pass the merged model without an adapter."
            )
        name, number = adapter.resolve().name, 1
        while name in rows:
            number += 1
            name = f"{adapter.resolve().name}-{number}"
        rows[name] = adapter.resolve()
    own = next((n for n, a in rows.items() if evaluated and a == evaluated.resolve()), BASE)
    return rows if sheet else {own: rows[own]}, own


def _refuse_corrected_on_emulator(model: Checkpoint, rows: Mapping[str, Path | None]) -> None:
    """Refuse what evaluate refuses for its own adapter."""
    manifest = Manifest.find(model.path)
    on_emulator = manifest is not None and manifest.kind == "emulator"
    for adapter in filter(None, rows.values()):
        origin = require_read(adapter, fresh=True)
        if on_emulator and origin is not None and origin.kind == "corrected_adapter":
            raise ConfigError(
                f"evaluate: {adapter} is corrected for the original model; pass that instead of the "
                f"emulator {model.name}."
            )
