"""Settings: the options and digests that shaped a result, and what is said where two of them differ.

An option that shapes nothing is marked where it is declared (`Annotated[int, WithoutEffect()]`): an
artefact is complete, and an interrupted run goes on, whatever its value.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

FORMERLY_RECORDED = frozenset({"device", "gradient_checkpointing", "instance_data_dir"})
"""Options without effect, or that repeat another, which older artefacts have among their settings."""

FORMERLY_OF_ALL_FAMILIES = {
    "dataset_weights": [],
    "streaming": False,
    "dataset_split": "train",
    "column_map": {},
    "max_length": 1024,
    "num_calibration_tokens": None,
    "completion_only_loss": True,
    "assistant_only_loss": False,
    "eval_dataset_split": "test",
    "eval_data_digest": None,
    "eval_steps": None,
    "packing": False,
    "tasks": [],
    "num_answers": None,
    "answer": "auto",
}
"""Options of text with their defaults, which older artefacts of every family have among their settings."""

FORMERLY_WITHOUT_EFFECT = {"keep_ratio": 0.4}
"""Options with the value at which older artefacts have them among their settings though others decided."""

FORMERLY_IGNORED = frozenset({"max_new_tokens"})
"""An option of text which other families took at any value, and did nothing with."""

FORMERLY_LEFT_OUT = frozenset({"companions_digest"})
"""Digests that some stages did not record."""

CONTENTS = {
    "base_digest": "other weights of the base model",
    "model_digest": "other weights of the model",
    "companions_digest": "other files beside the model's weights (tokenizer, templates, config)",
    "emulator_digest": "another emulator",
    "adapter_digest": "another adapter",
    "checkpoint_digest": "another checkpoint to resume from",
    "data_digest": "other data",
    "eval_data_digest": "other data to evaluate on",
    "named_digests": "other contents of the files that options name",
}
"""The meaning of a digest that differs, by its key."""

SHOWN = 3
SHOWN_CHARACTERS = 60


def same(recorded: Mapping[str, Any], now: Mapping[str, Any], beside: Collection[str] = ()) -> bool:
    """Return whether two settings are the same; `beside`: keys that do not count."""
    return not _different(recorded, now, beside)


def difference(
    recorded: Mapping[str, Any], now: Mapping[str, Any], beside: Collection[str] = ()
) -> str:
    """`keep_ratio 0.4, now 0.3; other data`: to follow `was made with`."""
    keys = _different(recorded, now, beside)
    options = [
        f"{key} {_shown(recorded, key)}, now {_shown(now, key)}"
        for key in keys
        if key not in CONTENTS
    ]
    contents = [CONTENTS[key] for key in keys if key in CONTENTS]
    if len(options) > SHOWN:
        options[SHOWN - 1 :] = [f"other values of {len(options) - SHOWN + 1} more options"]
    return "; ".join([*options, *contents])


def _different(
    recorded: Mapping[str, Any], now: Mapping[str, Any], beside: Collection[str]
) -> list[str]:
    ignored = FORMERLY_RECORDED.union(beside)
    missing, former = object(), {**FORMERLY_OF_ALL_FAMILIES, **FORMERLY_WITHOUT_EFFECT}
    before, after = _as_json(recorded), _as_json(now)
    # Recorded only where several installed families recognise the model: plugins come and go.
    if not ("family" in before and "family" in after):
        ignored |= {"family"}
    return [
        key
        for key in dict.fromkeys([*after, *before])
        if key not in ignored
        and before.get(key, missing) != after.get(key, missing)
        and not (key not in after and key in former and before[key] == former[key])
        and not (key not in after and key in FORMERLY_IGNORED)
        and not (key not in before and key in FORMERLY_LEFT_OUT)
    ]


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are once written and read; patterns as pairs, of which the first that fits counts."""
    read: dict[str, Any] = json.loads(json.dumps(settings))
    return {
        key: list(value.items()) if key.endswith("_pattern") and isinstance(value, dict) else value
        for key, value in read.items()
    }


def _shown(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "not given"
    value = settings[key]
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
