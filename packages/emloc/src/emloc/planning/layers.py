"""The layers of a planned model: which are emulated, which have a LoRA, and how large they are."""

from collections.abc import Container, Mapping, Sequence

from torch import nn

from emloc.compression.groups import Group
from emloc.config import LoraOptions
from emloc.formats.abilities import TwoProducts
from emloc.formats.vocabulary import VocabularyTable
from emloc.layers.coded_table import ROWS
from emloc.linalg.convolution import matrix_shape
from emloc.options.patterns import match_pattern
from emloc.planning.operations import Layer


def planned_layers(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    groups: Sequence[Group],
    adapted: Container[str],
    options: LoraOptions,
    itemsize: int = 0,
    tables: Sequence[VocabularyTable] = (),
) -> dict[str, Layer]:
    """Every layer of `shapes` (d_out × d_in by name) with its form and its LoRA.

    Args:
        itemsize: bytes of an element that emulated layers multiply in.
        tables: heads in few bits, which make some rows of theirs at a time.
    """
    work_of = {
        name: min(table.rows, ROWS) * table.columns * itemsize
        for table in tables
        for name in table.layers
    }
    group_of = {name: group for group in groups for name in group.layers}
    layers: dict[str, Layer] = {}
    for name, (d_out, d_in) in shapes.items():
        group = group_of.get(name)
        owner, size = (group.owner, len(group.layers)) if group else (name, 1)
        rank, made = _form_sizes(group, itemsize) if group else (None, work_of.get(name, 0))
        lora = 0
        if name in adapted:
            lora = match_pattern(options.lora_rank_pattern, name) or options.lora_r
        module = model.get_submodule(name)
        channels = module.in_channels if isinstance(module, nn.Conv2d) else 0
        layers[name] = Layer(d_in, d_out, rank, owner, size, lora, channels, working=made)
    return layers


def _form_sizes(group: Group, itemsize: int) -> tuple[int | None, int]:
    """The numbers per token between two products, if there are two; and bytes made for a moment."""
    form = group.form
    inner = form.format.inner(form) if isinstance(form.format, TwoProducts) else None
    forms = group.guesses if group.menu else (form,)
    return inner, max(f.format.running_bytes(group.shape, f, itemsize) for f in forms)


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
