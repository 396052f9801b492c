"""A checkpoint known by its config alone: no weights, nothing downloaded but JSON.

Tensors are those of the family's skeleton, under the skeleton's names, in the dtype that the config names.
That is what the files will hold, up to names and to what a checkpoint stores fused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.described import Described
from emloc.artefacts.json_files import read_json
from emloc.artefacts.layout import layout_of
from emloc.artefacts.locate import locate
from emloc.artefacts.modest_config import require_modest_depth
from emloc.artefacts.tensor_info import DTYPES, TensorInfo
from emloc.errors import CheckpointError, PluginError
from emloc.extend.capabilities import native_of
from emloc.extend.family import ModelFamily
from emloc.extend.opening import family_of

FLOATS = {
    str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point
}
"""Dtypes of weights by torch's names."""

LARGE_PARAMETERS = 1_000_000_000
"""The number of parameters from which on a config without a dtype (those of diffusers) is taken to be of
bfloat16 weights.
"""


def describe(
    model_name_or_path: str, dtype: str = "auto", family: str | None = None
) -> tuple[Described, ModelFamily, Any]:
    """A model by its config, in its family's layout, with its tensors; the family; the skeleton.

    Args:
        model_name_or_path: local folder of a model, a pipeline or a pipeline's component, or hub id.
        dtype: of the weights; auto: what the config says, else by size.
        family: whose model it is, where several recognise it.

    Raises:
        CheckpointError: there is no config that can be read.
        PluginError: as `family_of`.
    """
    path = locate(model_name_or_path, weights=False)
    described, known = _recognised(model_name_or_path, path, family)
    native = native_of(known, described)
    assert isinstance(native, Described)
    return native, known, with_tensors(native, known, dtype)


def with_tensors(checkpoint: Described, family: ModelFamily, dtype: str = "auto") -> Any:
    """Fill in the tensors; returns the skeleton that they were taken from."""
    model = family.skeleton(checkpoint, torch.float32)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    kind = weight_dtype(checkpoint, sum(torch.Size(shape).numel() for shape in shapes.values()))
    kind = kind if dtype == "auto" else getattr(torch, dtype)
    checkpoint.tensors = {
        name: TensorInfo("", kind, shape) for name, shape in sorted(shapes.items())
    }
    return model


def weight_dtype(checkpoint: Checkpoint, parameters: int) -> torch.dtype:
    """The dtype that a config names, in itself or in a part of it."""
    for part in (checkpoint.config, *_parts(checkpoint.config)):
        named = part.get("dtype") or part.get("torch_dtype")
        if named and named != "auto":
            known = FLOATS.get(str(named).removeprefix("torch."))
            if known is None:
                raise CheckpointError(
                    f"The config.json of {checkpoint.name} names the dtype {str(named)[:60]!r}, which is "
                    f"not one of {', '.join(FLOATS)}; correct it, or pass dtype."
                )
            return known
    return torch.bfloat16 if parameters >= LARGE_PARAMETERS else torch.float32


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [
        cast("dict[str, Any]", value)
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, dict)
    ]


def _modest(config: Path) -> dict[str, Any]:
    content = read_json(config)
    require_modest_depth(content, config)
    return content


def _recognised(name: str, path: Path, family: str | None) -> tuple[Described, ModelFamily]:
    """The model in the folder, or the one in a folder inside that a family recognises."""
    config = path / layout_of(path).config
    if config.is_file():
        described = Described(name, path, _modest(config), {})
        return described, family_of(described, family)
    inside: list[tuple[Described, ModelFamily]] = []
    for nested in sorted(path.glob("*/config.json")):
        described = Described(name, nested.parent, _modest(nested), {})
        try:
            inside.append((described, family_of(described, family)))
        except PluginError:
            continue
    if len(inside) != 1:
        what = ", ".join(described.path.name for described, _ in inside) or "none"
        raise CheckpointError(
            f"{path} has no config.json, and of the folders in it {what} hold a model that an installed "
            f"family recognises; pass the model's folder."
        )
    return inside[0]
