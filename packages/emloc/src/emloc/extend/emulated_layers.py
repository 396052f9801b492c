"""The parts that loaders of emulators have in common: the config's entry, the skeleton's layers, the tensors.

A library's quantizer says how it knows a dense layer (`DenseLayer`); formats do the rest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from emloc.artefacts.schema import Name, Schema, conforming
from emloc.errors import CheckpointError, MismatchError
from emloc.extend.formats import Forms
from emloc.formats.layer_format import DenseLayer
from emloc.layers.emulated_layer import EmulatedLayer

METHOD = "emloc"

Groups = Sequence[Mapping[str, Any]]
"""Entries `{"layers": [module names], …}`: the layers of a group, its format and its sizes."""


class _GroupEntry(Schema):
    """The entry of a group: its layers, its format; sizes are the format's matter."""

    layers: Annotated[list[Name], Field(min_length=1)]
    format: Name = ""


class _Parts(Schema):
    """Entries of an emulator's `quantization_config`."""

    groups: list[_GroupEntry]
    tables: list[dict[str, Any]]


class GroupsConfig:
    """The body of a library's quantization config: which layers have which form.

    Args:
        groups: `{"layers": [module names], "format": name, …sizes}`; without a format, low rank.
        tables: embeddings and heads in few bits, as `VocabularyTable` writes them.
    """

    quant_method: Any = METHOD

    def __init__(
        self,
        groups: list[dict[str, Any]] | None = None,
        tables: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        made_of = {"groups": groups or [], "tables": tables or []}
        conforming(_Parts, made_of, "The emulator's config")
        self.groups, self.tables = made_of["groups"], made_of["tables"]
        self.modules_to_not_convert = kwargs.pop("modules_to_not_convert", None)

    def to_dict(self) -> dict[str, Any]:
        """The entry in `config.json`."""
        return quantization_config(self.groups, self.tables)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.groups)} groups)"


def quantization_config(groups: Groups, tables: Groups = ()) -> dict[str, Any]:
    """The entry `quantization_config` of an emulator's config."""
    more = {"tables": [dict(table) for table in tables]} if tables else {}
    return {"quant_method": METHOD, "groups": [dict(group) for group in groups], **more}


def replace_layers(
    model: nn.Module,
    groups: Groups,
    dense_layer: Callable[[str, nn.Module], DenseLayer | None],
    kinds: str,
) -> None:
    """Replace dense layers by empty ones of their group's form, of the same dtype and device.

    Args:
        model: changed in place; a layer that it holds under several names is replaced under all.
        dense_layer: describes a module by its name; None if it is nothing that can be replaced.
        kinds: of layers that can be, for messages.

    Raises:
        MismatchError: a name is of no such layer, or there twice; the group makes no sense to its format.
        PluginError: a format is not installed.
    """
    holders: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        # `named_children` would leave out the second of two names.
        for name, child in parent._modules.items():  # pyright: ignore[reportPrivateUsage]
            if child is not None:
                holders.setdefault(child, []).append((parent, name))
    forms = Forms()
    for group in groups:
        form = forms.of_config(group)
        dense = [_described(model, name, dense_layer, kinds) for name in group["layers"]]
        _refuse_twice(model, group["layers"])
        for old, layer in zip(dense, form.format.modules(dense, form)):
            module = model.get_submodule(old.name)
            layer.train(module.training)
            # Its tensors come from a checkpoint: transformers must not draw values for them.
            layer._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
            for parent, attribute in holders[module]:
                setattr(parent, attribute, layer)


def _refuse_twice(model: nn.Module, names: Sequence[str]) -> None:
    seen: set[nn.Module] = set()
    for name in names:
        module = model.get_submodule(name)
        if module in seen:
            raise MismatchError(
                f"The emulator's config names {name} twice; compress the base model again."
            )
        seen.add(module)


def _named(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _described(
    model: nn.Module,
    name: str,
    dense_layer: Callable[[str, nn.Module], DenseLayer | None],
    kinds: str,
) -> DenseLayer:
    module = _named(model, name)
    if isinstance(module, EmulatedLayer):
        raise MismatchError(
            f"The emulator's config names {name} twice; compress the base model again."
        )
    layer = None if module is None else dense_layer(name, module)
    if layer is None:
        raise MismatchError(
            f"The emulator's config names {name}, which is not a {kinds} of {type(model).__name__}; load it "
            f"with the class that its config.json names."
        )
    return layer


def refuse_missing(model: nn.Module, keys: Iterable[str]) -> None:
    """Refuse a model that lacks tensors of its emulated layers, whose memory would hold anything.

    Args:
        keys: names of the tensors that were not loaded.

    Raises:
        CheckpointError: one is of such a layer.
    """
    for key in keys:
        layer = key.rpartition(".")[0]
        if isinstance(_named(model, layer), EmulatedLayer):
            raise CheckpointError(
                f"The emulator's config says that {layer} of {type(model).__name__} is compressed, but its "
                f"weights have no {key}; compress the base model again."
            )
