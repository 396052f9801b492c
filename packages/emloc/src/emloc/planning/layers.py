"""The layers of a planned model: which have factors, which have a LoRA, and how large they are."""

from collections.abc import Container, Mapping, Sequence

from torch import nn

from emloc.compression.rank import match_pattern
from emloc.config import LoraOptions
from emloc.linalg.convolution import matrix_shape
from emloc.planning.operations import Layer

Grouped = Sequence[tuple[Sequence[str], int]]


def planned_layers(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    groups: Grouped,
    adapted: Container[str],
    options: LoraOptions,
) -> dict[str, Layer]:
    """Every layer of `shapes` (d_out × d_in by name) with its factors and its LoRA."""
    factors = {name: (names[0], rank, len(names)) for names, rank in groups for name in names}
    layers: dict[str, Layer] = {}
    for name, (d_out, d_in) in shapes.items():
        owner, rank, size = factors.get(name, (name, None, 1))
        lora = 0
        if name in adapted:
            lora = match_pattern(options.lora_rank_pattern, name) or options.lora_r
        module = model.get_submodule(name)
        channels = module.in_channels if isinstance(module, nn.Conv2d) else 0
        layers[name] = Layer(d_in, d_out, rank, owner, size, lora, channels)
    return layers


def layer_shapes(model: nn.Module, transposed: Container[str] = ()) -> dict[str, tuple[int, int]]:
    """d_out × d_in of every module with a weight of two axes or more.

    Args:
        transposed: layers whose weight is stored d_in × d_out.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.ndim < 2 or isinstance(module, nn.Embedding):
            continue
        rows, columns = matrix_shape(weight.shape)
        shapes[name] = (columns, rows) if name in transposed else (rows, columns)
    return shapes
