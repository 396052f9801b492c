"""Run one cell: the process that `emloc bench` starts, and the record that it leaves.

    python -m emloc_baselines.bench.cell SPEC.json

Every step whose artefact is there already is left alone; the record is written last.
"""

import sys
from pathlib import Path
from typing import Any

from emloc.artefacts.json_files import read_json
from emloc.artefacts.manifest import Manifest, versions
from emloc.artefacts.small_files import write_json
from emloc.errors import EmlocError
from emloc.extend.methods import Task
from emloc.extend.plugins import method_named
from emloc.machine.progress import quiet_libraries
from emloc.stages.evaluate import evaluate
from emloc.stages.polish import polish
from emloc_baselines.bench.cells import SHOWN_DIGITS, Cell

PACKAGES = (
    "emloc",
    "emloc-baselines",
    "torch",
    "transformers",
    "peft",
    "diffusers",
    "bitsandbytes",
)


def run_cell(cell: Cell, root: Path) -> dict[str, Any]:
    """Make what is missing, score it, and write the record."""
    record: dict[str, Any] = {
        "digest": cell.digest,
        "dataset": cell.dataset,
        "label": cell.label,
        "method": cell.method,
        "keep_ratio": cell.keep_ratio,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "measure": cell.measure,
    }
    model, adapter = cell.task.model_name_or_path, None
    if cell.method is not None:
        adapter, figures = _adapter(cell, root)
        record.update(figures)
        model = Manifest.read(adapter).base_model.name_or_path
    scores = evaluate(
        **cell.evaluate,
        model_name_or_path=model,
        adapter=None if adapter is None else str(adapter),
        output_dir=root / "evaluations" / cell.digest[:SHOWN_DIGITS],
    )
    record["loss"] = scores["loss"]
    record["scores"] = {
        name: value for name, value in scores.items() if isinstance(value, float) and name != "loss"
    }
    record["score"] = scores.get(cell.measure)
    record.setdefault("peak_bytes", {})["evaluate"] = scores["peak_bytes"]
    record["inputs"] = cell.inputs
    record["versions"] = versions(*PACKAGES)
    path = cell.record(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record


def _adapter(cell: Cell, root: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter of the original model, and what making it took."""
    method = method_named(str(cell.method)).load()
    trained, recovered = cell.folder(root, "adapter"), cell.folder(root, "recovered")
    if not trained.is_dir():
        trained = method.train(cell.task, _light(cell, root), trained)
    if not recovered.is_dir():
        recovered = method.recover(cell.task, _light(cell, root), trained, recovered)
    manifests = {"train": Manifest.read(trained)}
    built = _built(cell, root)
    if built is not None:
        manifests["build"] = built
    if recovered != trained:
        manifests["recover"] = Manifest.read(recovered)
    if cell.polish is None:
        return recovered, _figures(manifests)
    polished = cell.folder(root, "polished")
    if not polished.is_dir():
        original = Manifest.read(recovered).base_model.name_or_path
        polish(**cell.polish, adapter=recovered, model_name_or_path=original, output_dir=polished)
    manifests["polish"] = Manifest.read(polished)
    return polished, {**_figures(manifests), "polish": manifests["polish"].summary}


def _light(cell: Cell, root: Path) -> Path | None:
    """The light model's folder, built where it is not there (any more)."""
    folder, note = cell.folder(root, "light"), _note(cell, root)
    if folder.is_dir():
        return folder
    if note.is_file() and not read_json(note):
        return None
    built = method_named(str(cell.method)).load().build(cell.task, folder)
    note.parent.mkdir(parents=True, exist_ok=True)
    content = {} if built is None else Manifest.read(built).model_dump(mode="json")
    write_json(note, content)
    return built


def _note(cell: Cell, root: Path) -> Path:
    """The manifest that is left of a light model when its folder is gone, empty where none was built."""
    return cell.folder(root, "light").with_suffix(".json")


def _built(cell: Cell, root: Path) -> Manifest | None:
    content = read_json(_note(cell, root))
    return Manifest.model_validate(content) if content else None


def _figures(manifests: dict[str, Manifest]) -> dict[str, Any]:
    """Bytes held, memory and time of every step, from their manifests."""
    train, build = manifests["train"], manifests.get("build")
    seconds = {step: manifest.measured["seconds"] for step, manifest in manifests.items()}
    extra = build.measured.get("continued_seconds") if build else None
    if extra is not None:
        seconds["continue"] = extra
        seconds["build"] = round(seconds["build"] - extra, 3)
    overhead = sum(value for step, value in seconds.items() if step != "train")
    held = train.summary["train_weight_bytes"] - train.summary["trainable_bytes"]
    recover = manifests.get("recover")
    return {
        "held_bytes": held,
        "trainable_bytes": train.summary["trainable_bytes"],
        "peak_bytes": {step: m.measured["peak_bytes"] for step, m in manifests.items()},
        "seconds": seconds,
        "overhead_seconds": round(overhead, 3),
        "seconds_per_step": train.measured["seconds_per_step"],
        "steps": train.summary["steps"],
        "light": build.summary if build else {},
        "continued": _continued(build),
        "recovery": recover.summary if recover else {},
    }


def _continued(build: Manifest | None) -> dict[str, Any]:
    """Figures of training the light model's own weights further, where it was done."""
    measured = build.measured if build else {}
    return {
        name.removeprefix("continued_"): value
        for name, value in measured.items()
        if name.startswith("continued_")
    }


def main() -> None:
    """The process of one cell."""
    quiet_libraries()
    spec: dict[str, Any] = read_json(Path(sys.argv[1]))
    content: dict[str, Any] = spec["cell"]
    content["task"] = Task(**content["task"])
    cell = Cell(**content)
    try:
        run_cell(cell, Path(spec["root"]))
    except EmlocError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)


if __name__ == "__main__":
    main()
