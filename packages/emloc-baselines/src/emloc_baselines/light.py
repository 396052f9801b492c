"""A light model's folder, written straight from the base's shards into shards of the same names.

A method says what becomes of each tensor: it stays, it is left out, or others take its place. Nothing
larger than one tensor is held, a shard is there whole or not at all, and a build that was interrupted
goes on with the next one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.digest import batches_digest
from emloc.artefacts.kinds import EMULATOR
from emloc.artefacts.manifest import ModelReference
from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.small_files import copy_file, write_json
from emloc.config import CompressConfig, StageConfig, build
from emloc.errors import CheckpointError, ConfigError
from emloc.extend.family import Batch
from emloc.extend.methods import Task
from emloc.extend.opening import named_family, open_model
from emloc.extend.plugin_options import of_family, own_options, with_plugin_options
from emloc.extend.plugins import families_for, method_named
from emloc.machine.progress import progress_bar
from emloc.stages.frame import Artefact, Written, digests
from emloc.training.continued import NOTES_NAME, Origin
from emloc_baselines.identity import content_of


@dataclass(frozen=True)
class Piece:
    """A tensor of the light model.

    Attributes:
        make: its values, computed when its turn has come.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Source(Origin):
    """The inputs of a light model: `config` has the budget, and what EMLoC would have kept dense.

    Attributes:
        batches: calibration micro-batches; none for a method that does not look at data.
    """

    batches: Sequence[Batch]


@dataclass(frozen=True)
class LightModel:
    """The light model as changes to the base.

    Attributes:
        config: its `config.json`.
        pieces: by a base tensor's name what is in its place; a tensor that is not in it stays.
        summary: figures for the manifest.
        layers: what its adapters need on their way back, for the manifest.
        finish: works on the written folder before it is complete; returns more of `measured`.
    """

    config: Mapping[str, Any]
    pieces: Mapping[str, Sequence[Piece]]
    summary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    layers: Mapping[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    finish: Callable[[Path], Mapping[str, Any]] | None = None


def build_light(
    method: str,
    task: Task,
    out: Path,
    options: StageConfig,
    make: Callable[[Source], LightModel],
    calibrated: bool,
    own_format: bool = True,
) -> Path:
    """Write a light model; returns its folder.

    Args:
        method: its name, as registered.
        options: the method's own.
        make: decides what becomes of the base.
        calibrated: whether it looks at calibration data.
        own_format: whether the light model is of the method's own kind, or an emulator of EMLoC's.

    Raises:
        ConfigError, CheckpointError, DataError: see their messages.
    """
    base, family = open_model(task.model_name_or_path, family=task.compress.get("family"))
    if "quantization_config" in base.config:
        raise CheckpointError(
            f"{base.name} is already quantised or an emulator; start from the full-precision original."
        )
    works_for = families_for(method_named(method))
    if family.name not in works_for:
        needs = ", ".join(method_named(method).needs)
        raise ConfigError(
            f"{method} works for {', '.join(works_for)}, and {base.name} belongs to {family.name}, which "
            f"does not offer what the method needs ({needs}); choose another method."
        )
    given = {**task.compress, "keep_ratio": task.keep_ratio, "seed": task.seed}
    kind: type[CompressConfig] = with_plugin_options(CompressConfig)
    config = build(kind, {**given, "model_name_or_path": base.name, "output_dir": out}, method)
    config = of_family(config, family)
    batches = family.calibration_batches(base, config) if calibrated else []
    paths = {"output_dir", "model_name_or_path", "dataset"}
    settings: dict[str, Any] = {
        **own_options(config, paths),
        "method": method,
        "options": content_of(options.model_dump(mode="json")),
        **named_family(base, family),
        "base_digest": base.digest(),
        "companions_digest": base.companions_digest(),
        "data_digest": batches_digest(batches),
    }
    artefact = Artefact(
        "build",
        EMULATOR,
        out,
        settings,
        family.name,
        ModelReference(name_or_path=base.reference_name(), digest=settings["base_digest"]),
        method=method if own_format else None,
        packages=("emloc-baselines", "torch", "transformers", "safetensors"),
        device=config.device,
        memory=config.memory,
    )

    def write(work: Path) -> Written:
        light = make(Source(base, family, config, batches))
        written = _write(base, light, work)
        measured = light.finish(work) if light.finish else {}  # may write the shards anew
        return Written(
            digests(work, sorted({info.file for info in written.tensors.values()})),
            layers=light.layers,
            summary={
                "base_bytes": _bytes(base),
                "emulator_bytes": _bytes(written),
                "emulator_digest": Checkpoint.open(work).digest(),
                **light.summary,
            },
            measured=measured,
            leftovers=[NOTES_NAME],
        )

    return artefact.write(write)


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(info.nbytes for info in checkpoint.tensors.values())


def _write(base: Checkpoint, light: LightModel, work: Path) -> Checkpoint:
    """Shards, index, config and the files beside them; returns the light model, opened."""
    by_file: dict[str, list[Piece]] = {}
    for name, info in base.tensors.items():
        pieces = light.pieces.get(name)
        if pieces is None:
            pieces = [Piece(name, info.dtype, info.shape, _reading(base, name))]
        by_file.setdefault(info.file, []).extend(pieces)
    by_file = {file: pieces for file, pieces in by_file.items() if pieces}
    with progress_bar("build", sum(map(len, by_file.values()))) as advance:
        for file, pieces in by_file.items():
            if (work / file).is_file():  # an interrupted build had finished it
                advance(len(pieces))
                continue
            declared = {piece.name: (piece.dtype, piece.shape) for piece in pieces}
            with ShardWriter(work / file, declared, base.name) as shard:
                for piece in pieces:
                    shard.write(piece.name, piece.make())
                    advance(note=piece.name)
    layout = base.layout
    write_json(work / layout.config, light.config)
    if list(by_file) != [layout.single]:
        write_json(
            work / layout.index,
            {
                "metadata": {},
                "weight_map": {
                    piece.name: layout.inside(file)
                    for file, pieces in by_file.items()
                    for piece in pieces
                },
            },
        )
    for name in base.companions():
        copy_file(base.path / name, work / name)
    return Checkpoint.from_files(str(work), work, {}, dict.fromkeys(by_file, None))


def _reading(base: Checkpoint, name: str) -> Callable[[], Tensor]:
    return lambda: base.read(name)
