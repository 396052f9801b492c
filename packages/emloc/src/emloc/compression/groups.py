"""The groups of layers that are compressed together, each with its form, and the layers that stay dense."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from emloc.artefacts.schema import Name, Schema, Size, conforming
from emloc.config import CompressConfig
from emloc.errors import CheckpointError, ConfigError
from emloc.extend.formats import Forms, format_named
from emloc.formats.abilities import Cuttable
from emloc.formats.layer_format import (
    Form,
    GroupShape,
    LayerFormat,
    budget_bytes,
    keep_ratio_of,
    tensor_bytes,
)
from emloc.formats.menu import menu_of
from emloc.formats.quantized import QUANTIZED
from emloc.formats.trellis import TRELLIS
from emloc.formats.vocabulary import VocabularyTable
from emloc.linalg.convolution import matrix_shape
from emloc.linalg.menu_allocation import Option, allocate_bytes
from emloc.options.compress import AUTO, LOW_RANK_FORMAT, SIZING
from emloc.options.patterns import match_pattern, require_matching

OF_CODES = f"{TRELLIS.name} or {QUANTIZED.name}"

OF_FORMATS = {
    "rank_pattern": LOW_RANK_FORMAT,
    "bits": OF_CODES,
    "group_size": OF_CODES,
    "residual_rank": OF_CODES,
    "factor_bits": LOW_RANK_FORMAT,
}
"""Options that mean something to some formats, and the ones to pass for each."""

Shape = Sequence[int]
"""The shape of a dense weight: d_out, inputs or channels, and the axes of a kernel."""


@dataclass(frozen=True)
class Group:
    """Layers that take one form together.

    Attributes:
        form: that they take.
        wide: a larger form that they are fitted in first, if the size is found after the pass.
        menu: for each layer the forms among which is chosen; until then `form` is a guess.
        reads_with: another layer of the same input, by whose moments it is fitted; none: its own.
        guessed_dense: whether the guess is that its layers stay dense.
    """

    shape: GroupShape
    form: Form
    wide: Form | None = None
    menu: tuple[tuple[Form, ...], ...] = ()
    reads_with: str = ""
    guessed_dense: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """Names, in the order of the stack."""
        return self.shape.layers

    @property
    def owner(self) -> str:
        """The layer under whose name tensors of all are stored."""
        return self.shape.owner

    @property
    def source(self) -> str:
        """The layer at which the group's moments are summed."""
        return self.reads_with or self.owner

    @property
    def guesses(self) -> tuple[Form, ...]:
        """The forms of a menu that all its layers may take, by their bytes."""
        return tuple(form for form in self.menu[0] if all(form in menu for menu in self.menu))

    @property
    def fitted(self) -> Form:
        """The form that the pass fits."""
        return self.form if self.wide is None else self.wide

    def as_json(self) -> dict[str, Any]:
        """The group's entry in the emulator's config."""
        return {"layers": list(self.layers), **self.form.as_json()}


@dataclass(frozen=True)
class CompressionPlan:
    """The groups to compress, what stays dense, and tables of the vocabulary in few bits."""

    groups: tuple[Group, ...]
    kept_dense: dict[str, str]
    tables: tuple[VocabularyTable, ...] = ()

    def within(self, block: str) -> list[Group]:
        """The groups of one block."""
        return [group for group in self.groups if f"{group.owner}.".startswith(f"{block}.")]

    @property
    def guessed(self) -> "CompressionPlan":
        """The plan without groups that are guessed to stay dense: what an emulator will hold."""
        return replace(self, groups=tuple(g for g in self.groups if not g.guessed_dense))

    def with_forms(self, forms: Mapping[str, Form]) -> "CompressionPlan":
        """The same groups in other forms, by owner."""
        groups = [replace(group, form=forms.get(group.owner, group.form)) for group in self.groups]
        return replace(self, groups=tuple(groups))


def make_plan(
    layer_groups: Sequence[Sequence[str]],
    shape_of: Callable[[str], Shape | None],
    config: CompressConfig,
    itemsize_of: Callable[[str], int],
) -> CompressionPlan:
    """Apply ratios, patterns and exclusions to a family's layer groups.

    Args:
        shape_of: of a layer's weight; None if it is not one tensor of the checkpoint.
        itemsize_of: bytes of an element of a layer's weight in the emulator.

    Raises:
        ConfigError: options do not go together, or a pattern matches nothing.
        PluginError: the format is not installed.
    """
    sizing = [n for n in SIZING if n in config.model_fields_set and getattr(config, n) is not None]
    if len(sizing) > 1:
        raise ConfigError(
            f"{sizing[0]} and {sizing[1]} both size the emulator; pass one of them, and keep_ratio_pattern "
            f"for single layers."
        )
    if config.format == AUTO:
        _refuse_options_of_formats(config)
    else:
        _refuse_foreign_options(format_named(config.format), config)
    if config.propagate_errors and config.keep_ratio_allocation == "error":
        raise ConfigError(
            "propagate_errors needs sizes before a block is fitted, but keep_ratio_allocation=error finds "
            "them afterwards; pass one of them."
        )
    excluded = dict.fromkeys(config.exclude, True)
    names = [name for group in layer_groups for name in group]
    for option in ("exclude", "keep_ratio_pattern", "rank_pattern"):
        require_matching(option, getattr(config, option), names)
    groups: list[Group] = []
    dense: dict[str, str] = {}
    shapes: dict[str, Shape] = {}
    for candidates in layer_groups:
        # Layers that patterns treat differently cannot share a size, so they do not share tensors.
        by_pattern: dict[object, list[str]] = {}
        for name in candidates:
            if match_pattern(excluded, name):
                dense[name] = "excluded"
                continue
            shape = shape_of(name)
            if shape is None:
                dense[name] = "its weight is part of a fused tensor in the checkpoint"
                continue
            shapes[name] = shape
            key: object = (
                match_pattern(config.rank_pattern, name),
                match_pattern(config.keep_ratio_pattern, name),
            )
            by_pattern.setdefault(key if config.share_factors else name, []).append(name)
        for layers in by_pattern.values():
            shape = group_shape(layers, shapes.__getitem__)
            group = _group(shape, config, itemsize_of(shape.owner))
            if isinstance(group, str):
                dense |= dict.fromkeys(layers, group)
            else:
                groups.append(group)
    return CompressionPlan(tuple(_guessed(groups, config, itemsize_of)), dense)


def _group(shape: GroupShape, config: CompressConfig, itemsize: int) -> Group | str:
    """The group with its form or its menu, or the reason for which it stays dense."""
    if config.format != AUTO:
        form = format_named(config.format).decide(shape, config, itemsize)
        return form if isinstance(form, str) else Group(shape, form, _wide(shape, form, config))
    if keep_ratio_of(shape.owner, config, itemsize) == 1:
        return "keep_ratio 1"
    menu = tuple(tuple(menu_of(one, itemsize)) for one in shape.singles())
    group = Group(shape, menu[0][0], None, menu) if all(menu) else None
    if group is None or not group.guesses:
        return f"no form of {shape.owner} is smaller than its weight"
    if match_pattern(config.keep_ratio_pattern, shape.owner) is None:
        return group
    budget = budget_bytes(shape, config, itemsize)
    within = [f for f in group.guesses if tensor_bytes(shape, f, itemsize) <= budget]
    return Group(shape, within[-1]) if within else "the smallest form is more than its share"


def _guessed(
    groups: Sequence[Group], config: CompressConfig, itemsize_of: Callable[[str], int]
) -> list[Group]:
    """Groups with menus in forms that spend the budget; each bit more is taken to quarter an error.

    Raises:
        ConfigError: not even the smallest forms are within the budget.
    """
    open_groups = {group.owner: group for group in groups if group.menu}
    options: dict[str, list[Option]] = {}
    budget = 0
    for owner, group in open_groups.items():
        itemsize, numel = itemsize_of(owner), group.shape.numel
        sizes = [tensor_bytes(group.shape, form, itemsize) for form in group.guesses]
        options[owner] = [
            *(Option(size, numel * 4.0 ** (-8 * size / numel)) for size in sizes),
            Option(numel * itemsize, 0.0),
        ]
        budget += budget_bytes(group.shape, config, itemsize)
    least = sum(min(option.bytes for option in one) for one in options.values())
    if least > budget:
        numel = sum(group.shape.numel for group in open_groups.values())
        raise ConfigError(
            f"format={AUTO}: the smallest forms take {8 * least / numel:.2f} bits per weight, but the "
            f"budget is {8 * budget / numel:.2f}; raise bits_per_weight or keep_ratio, or pass "
            f"format={LOW_RANK_FORMAT}."
        )
    places = allocate_bytes(options, budget)
    return [_placed(group, places[group.owner]) if group.menu else group for group in groups]


def _placed(group: Group, place: int) -> Group:
    forms = group.guesses
    dense = place == len(forms)
    return replace(group, form=forms[-1 if dense else place], guessed_dense=dense)


def group_shape(layers: Sequence[str], shape_of: Callable[[str], Shape]) -> GroupShape:
    """The shape of layers whose weights have these shapes."""
    first = shape_of(layers[0])
    outputs = tuple(shape_of(name)[0] for name in layers)
    return GroupShape(tuple(layers), outputs, matrix_shape(first)[1], tuple(first[2:]))


def written_groups(
    entries: Mapping[str, Mapping[str, Any]], shape_of: Callable[[str], Shape]
) -> list[Group]:
    """The groups of an emulator that exists, by the layers of its manifest.

    Args:
        shape_of: of a layer's dense weight.

    Raises:
        PluginError: a format is not installed.
    """
    forms = Forms()
    return [
        Group(group_shape(entry["layers"], shape_of), forms.of_manifest(entry))
        for entry in entries.values()
    ]


class _Entry(Schema):
    """A group in an emulator's manifest, among other figures."""

    layers: Annotated[list[Name], Field(min_length=1)]
    d_out: list[Size]
    d_in: Size


def dense_shapes(
    entries: Mapping[str, Mapping[str, Any]], model: nn.Module
) -> Callable[[str], Shape]:
    """`shape_of` for `written_groups`: sizes from the manifest, kernels from the base's skeleton.

    Raises:
        CheckpointError: an entry lacks a size; `shape_of`: the model has no such layer.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for owner, entry in entries.items():
        known = conforming(_Entry, entry, f"The emulator's manifest: {owner}")
        if len(known.layers) != len(known.d_out):
            raise CheckpointError(
                f"The emulator's manifest has {len(known.layers)} layers of {len(known.d_out)} sizes in "
                f"{owner}; compress the base model again."
            )
        sizes |= {name: (d_out, known.d_in) for name, d_out in zip(known.layers, known.d_out)}

    def shape_of(name: str) -> Shape:
        d_out, d_in = sizes[name]
        try:
            kernel = tuple(model.get_parameter(f"{name}.weight").shape[2:])
        except AttributeError as problem:
            raise CheckpointError(
                f"The emulator's manifest names the layer {name}, which its model does not have; compress "
                f"the base model again, or install the version of the library that it was made with."
            ) from problem
        return (d_out, d_in // prod(kernel), *kernel)

    return shape_of


def _wide(shape: GroupShape, form: Form, config: CompressConfig) -> Form | None:
    """The largest form that allocation may choose, where it chooses."""
    patterns = (config.rank_pattern, config.keep_ratio_pattern)
    named = any(match_pattern(pattern, shape.owner) is not None for pattern in patterns)
    if config.keep_ratio_allocation != "error" or named:
        return None
    assert isinstance(form.format, Cuttable)
    return form.with_size(form.format.unit, form.format.span(shape, form)[1])


def _refuse_foreign_options(format: LayerFormat, config: CompressConfig) -> None:
    for name in OF_FORMATS:
        if getattr(config, name) and name not in format.options:
            raise ConfigError(f"{name} means nothing to format={format.name}; leave it out.")
    if config.keep_ratio_allocation == "error" and not isinstance(format, Cuttable):
        raise ConfigError(
            f"keep_ratio_allocation=error makes layers smaller after fitting, which format={format.name} "
            f"cannot; pass keep_ratio_allocation=uniform."
        )


def _refuse_options_of_formats(config: CompressConfig) -> None:
    for name, format in OF_FORMATS.items():
        if getattr(config, name):
            raise ConfigError(
                f"{name} means nothing to format={AUTO}, the default, which chooses for each layer; leave "
                f"it out, or pass format={format}."
            )
    if config.keep_ratio_allocation != "uniform":
        raise ConfigError(
            f"format={AUTO}, the default, already spends bytes where they lower the error most; leave "
            f"keep_ratio_allocation out, or pass format={LOW_RANK_FORMAT}."
        )
