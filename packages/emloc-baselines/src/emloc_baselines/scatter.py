"""A pruned model's LoRA on the original: rows of B and columns of A among zeros.

Where the pruned layer kept rows R and columns C of the original, `ΔW[R, C] = s·B·A` and zero elsewhere, so
`B` gets rows of zeros and `A` columns of zeros, and rank and scaling stay.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_tensors import LoraLayer
from emloc.artefacts.manifest import Manifest
from emloc.errors import MismatchError
from emloc.extend.opening import open_model
from emloc_baselines.kept import Kept, Slice, all_slices
from emloc_baselines.recovery import Recovered, recover_adapter
from emloc_baselines.structures import find_structures


def scatter_adapter(adapter: Path, light: Path, out: Path) -> Path:
    """Write the original model's adapter; returns its folder.

    Raises:
        MismatchError: it holds what cannot be scattered (DoRA's magnitudes, layers trained whole).
    """
    slices, shapes = _slices(light)
    trained = Adapter.open(str(adapter))
    for name in trained.saved:
        if name.rpartition(".")[0] in slices:
            raise MismatchError(
                f"Adapter {adapter} trained {name} whole, of which the light model has only a part; leave "
                f"it out of lora_modules_to_save."
            )

    def recover(layer: LoraLayer, recovered: Recovered) -> Recovered:
        if layer.name not in slices:
            return recovered
        if recovered.magnitude is not None:
            raise MismatchError(
                f"Adapter {adapter} is a DoRA, whose magnitudes belong to the pruned rows' lengths; train "
                f"a plain LoRA."
            )
        rows, columns = slices[layer.name]
        d_out, d_in = shapes[layer.name]
        up = recovered.up if rows is None else scattered(recovered.up, rows, d_out)
        down = recovered.down if columns is None else scattered(recovered.down.T, columns, d_in).T
        return Recovered(layer.name, down, up, None)

    return recover_adapter(adapter, light, out, recover)


def scattered(matrix: Tensor, rows: Tensor, count: int) -> Tensor:
    """The rows of a matrix at `rows` of one with `count` rows, zeros between."""
    whole = matrix.new_zeros(count, matrix.shape[1])
    whole[rows] = matrix
    return whole


def _slices(light: Path) -> tuple[Mapping[str, Slice], Mapping[str, tuple[int, int]]]:
    """The kept slices of each layer, and the shapes in the original."""
    manifest = Manifest.read(light)
    base, family = open_model(manifest.base_model.name_or_path, recorded=manifest.family)
    model = family.skeleton(base, torch.float32)
    structures = find_structures(model, list(manifest.layers))
    slices = all_slices(Kept.from_json(s, manifest.layers[s.block]["kept"]) for s in structures)
    shapes: dict[str, tuple[int, int]] = {}
    for name in slices:
        rows, columns = model.get_parameter(f"{name}.weight").shape
        shapes[name] = (rows, columns)
    return slices, shapes
