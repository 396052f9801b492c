"""The stages of a family, each with its options and the result of a run that nothing disturbed."""

import json
from pathlib import Path

import emloc
from emloc.extend.capabilities import ContinuesAdapters

TRAIN = {"max_steps": 4, "logging_steps": 1, "save_steps": 1, "learning_rate": 1e-2, "lora_r": 3}
POLISH = {**TRAIN, "max_steps": 2, "num_held_back_samples": 2, "per_device_train_batch_size": 2}
VARYING = {"measured", "versions", "sizes", "seal"}
"""Keys of a manifest that differ from run to run, or follow from such."""


def calls(subject):
    """Each stage's function of an output folder."""
    made, data = subject.stages, subject.data
    polish = {key: value for key, value in POLISH.items() if key != "lora_r"}
    base = subject.example["model_name_or_path"]
    options = {
        "compress": {**subject.example, **subject.compressed_to},
        "compress to bits": {**subject.example, "format": "trellis", "bits": 3},
        "train": {"emulator": str(made["emulator"]), **data, **TRAIN},
        "correct": {
            "adapter": str(made["adapter"]), "emulator": str(made["emulator"]), "limit": "none", **data,
        },
        "polish": {
            "model_name_or_path": base, "adapter": str(made["corrected"]), **data, **polish,
        },
        "merge": {"adapter": str(made["corrected"])},
        "evaluate": {
            "model_name_or_path": base, "adapter": str(made["corrected"]), **data,
            **subject.options("evaluate"),
        },
    }  # fmt: skip

    def call(stage):
        function = getattr(emloc, stage.partition(" ")[0])
        return lambda folder: function(output_dir=folder, **options[stage])

    if not isinstance(subject.family, ContinuesAdapters):
        del options["polish"]
    return {stage: call(stage) for stage in options}


def content(folder):
    """What a result must have in common with another of the same call."""
    contents = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            continue
        if path.suffix in (".safetensors", ".jinja", ".txt"):
            contents[name] = path.read_bytes()
        elif path.name == "emloc.json":
            manifest = json.loads(path.read_text())
            files = manifest.get("files", {})
            kept = {key: one for key, one in files.items() if key.endswith(".safetensors")}
            contents[name] = {k: v for k, v in manifest.items() if k not in VARYING} | {
                "files": kept
            }
        elif path.name == "evaluation.json":
            figures = json.loads(path.read_text())
            contents[name] = {
                key: figures[key] for key in ("loss", "samples", "settings") if key in figures
            }
        elif path.name == "trainer_log.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            contents[name] = [line.get("loss", line.get("train_loss")) for line in lines]
        elif path.suffix == ".json":
            value = json.loads(path.read_text())
            contents[name] = {
                k: v for k, v in value.items() if k != "training_args.bin"
            }  # has a time
        else:
            contents[name] = None  # a plot, a card
    return contents


def difference(found, expected):
    """Names of files, and keys in them, that two contents do not have in common; nothing if they are one."""
    names = sorted(
        name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    )
    shown = []
    for name in names[:3]:
        one, other = found.get(name), expected.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
            pairs = [(key, str(one.get(key))[:80], str(other.get(key))[:80]) for key in keys[:2]]
            shown.append(f"{name} ({pairs})")
        else:
            shown.append(f"{name} ({str(one)[:80]}, not {str(other)[:80]})")
    return ", ".join(shown)
