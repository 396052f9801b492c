"""The files of a model's folder that hold its weights: those that the loading library would read.

A folder may hold several sets of weights: a model that was saved again with another shard size leaves its
old shards and their index behind. transformers then reads the single file, diffusers the shards of the
index. Whoever trains or evaluates through these libraries and whoever streams tensors must read the same
ones, so their order is followed here, and what they would read that we do not is refused.
"""

import re
from pathlib import Path
from typing import Any

from emloc.artefacts.json_files import read_json
from emloc.artefacts.layout import Layout
from emloc.artefacts.named_files import named_file, named_path
from emloc.artefacts.schema import Schema, conforming
from emloc.errors import CheckpointError

WeightFiles = dict[str, set[str] | None]
"""File names relative to the model's folder, in the order in which the libraries read them; each with the
tensors that an index promises (None: there is no index). A tensor that two files hold is the later one's."""

NAMED_BY_CONFIG = "transformers_weights"
"""transformers' key of a configuration that names the weights' file."""

_RANK_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


class _Index(Schema):
    """The index of a model's shards."""

    weight_map: dict[str, str] | None = None


def weight_files(path: Path, layout: Layout, config: dict[str, Any]) -> WeightFiles:
    """The files that the layout's library reads.

    Args:
        path: the model's folder, of a pipeline the pipeline's.
        config: the model's parsed configuration.

    Raises:
        CheckpointError: there are none that we read, a shard is missing, or a name leads out of the folder.
    """
    if layout.library == "transformers":
        _refuse_other_weights(path, layout)
        named = config.get(NAMED_BY_CONFIG)
        if named is not None:
            file = named_file(path / layout.folder, named, path / layout.config)
            if file.name.endswith(".index.json"):
                return _indexed(path, layout, file)
            return {layout.folder + str(named): None}
    single, index = path / layout.single, path / layout.index
    for file in (single, index) if layout.library == "transformers" else (index, single):
        named_path(path, file.relative_to(path).as_posix(), path)
        if file.is_file():
            return _indexed(path, layout, index) if file == index else {layout.single: None}
    raise _missing(path / layout.folder, layout)


def _refuse_other_weights(path: Path, layout: Layout) -> None:
    """transformers looks for these before it looks for the model's own weights."""
    folder = path / layout.folder
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json) besides a model's configuration, so "
            f"transformers would load the adapter's base model instead of the weights in it; move one of "
            f"them to a folder of its own."
        )
    ranks = sorted(file.name for file in folder.glob("shard-*") if _RANK_SHARD.fullmatch(file.name))
    if ranks:
        raise CheckpointError(
            f"{folder} holds {ranks[0]}, a part of a distributed checkpoint, which transformers would "
            f"read before any other weights; save the model with save_pretrained into a new folder."
        )


def _indexed(path: Path, layout: Layout, index: Path) -> WeightFiles:
    weight_map = conforming(_Index, read_json(index), index).weight_map
    if not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download the checkpoint again.")
    named: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        named.setdefault(file, set()).add(tensor)
    for file in named:
        named_path(index.parent, file, index)
        if Path(file).name != file:
            raise CheckpointError(f"{index} names a shard outside its folder: {file}.")
    promised = {layout.folder + file: tensors for file, tensors in named.items()}
    for file in promised:
        if not (path / file).is_file():
            raise CheckpointError(
                f"Shard {path / file} is missing though {index.name} lists it; download the checkpoint "
                f"again."
            )
    return {file: promised[file] for file in sorted(promised)}


def _missing(folder: Path, layout: Layout) -> CheckpointError:
    pickled = sorted(entry.name for entry in folder.glob("*.bin"))
    variants = sorted(entry.name for entry in folder.glob(f"{layout.stem}.*.safetensors"))
    hint = f"expected {Path(layout.single).name} or {Path(layout.index).name}"
    if variants:
        hint = (
            f"only the variant {variants[0]}, which {layout.library} reads only if asked for by name; "
            f"rename it to {Path(layout.single).name} to use it"
        )
    elif pickled:
        hint = (
            f"only {pickled[0]} (pickle, which can run code); save it with safe_serialization first"
        )
    return CheckpointError(f"{folder} holds no safetensors weights: {hint}.")
