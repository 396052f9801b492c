"""Embeddings and head of a transformers model: which they are, and those of an emulator in few bits."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from emloc.errors import MismatchError
from emloc.formats.vocabulary import VocabularyTable
from emloc.layers.coded_table import CodedEmbedding, CodedHead, TiedHead, coded_embedding


def vocabulary(model: Any) -> Sequence[Sequence[str]]:
    """The names of the input embeddings and the output head; tied, they are one entry.

    Args:
        model: a skeleton, in which one parameter stands for what is tied.
    """
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    held = [module for module in ends if module is not None]
    by_weight: dict[int, list[str]] = {}
    for module in held:
        weight = getattr(module, "weight", None)
        key = id(module if weight is None else weight)
        by_weight.setdefault(key, []).append(names[id(module)])
    return list(by_weight.values())


def replace_tables(model: Any, tables: Sequence[VocabularyTable]) -> None:
    """Replace embeddings and head by empty ones in few bits, of the same dtype and device.

    Args:
        model: changed in place; what was tied needs no tying any more.

    Raises:
        MismatchError: a name is of no such module.
    """
    for table in tables:
        first = table.layers[0]
        stored, decoded = dict(table.matrix.stored()), table.matrix.decoded
        shown = f"bits={table.bits}, group_size={table.group_size}"
        for layer in table.layers:
            module = _described(model, layer, table)
            if isinstance(module, nn.Embedding):
                made: nn.Module = coded_embedding(module, stored, decoded, shown)
            elif layer == first:
                weight = module.weight
                made = CodedHead(
                    table.columns, table.rows, module.bias is not None, stored, decoded, shown,
                    weight.dtype, weight.device,
                )  # fmt: skip
            else:
                embeddings = model.get_submodule(first)
                if not isinstance(embeddings, CodedEmbedding):
                    raise _unknown(first, model)
                made = TiedHead(module, embeddings)
            made.train(module.training)
            parent, _, name = layer.rpartition(".")
            setattr(model.get_submodule(parent), name, made)
        if len(table.layers) > 1:
            _untie(model, table)


def _described(model: Any, layer: str, table: VocabularyTable) -> Any:
    try:
        module: Any = model.get_submodule(layer)
    except AttributeError:
        raise _unknown(layer, model) from None
    plain = type(module).forward is nn.Linear.forward and isinstance(module, nn.Linear)
    if not (plain or isinstance(module, nn.Embedding)):
        raise _unknown(layer, model)
    if tuple(module.weight.shape) != (table.rows, table.columns):
        raise MismatchError(
            f"The emulator's config says that {layer} is {table.rows}x{table.columns}, but its model has "
            f"{'x'.join(map(str, module.weight.shape))}; compress the base model again."
        )
    return module


def _unknown(layer: str, model: Any) -> MismatchError:
    return MismatchError(
        f"The emulator's config names {layer}, which is not an embedding or head of {type(model).__name__}; "
        f"load it with the class that its config.json names."
    )


def _untie(model: Any, table: VocabularyTable) -> None:
    """Take the head's weight out of the parameters that transformers ties: it reads the embeddings' own."""
    gone = {f"{layer}.weight" for layer in table.layers}

    def others(tied: Any) -> dict[str, str]:
        return {k: v for k, v in dict(tied or {}).items() if gone.isdisjoint((k, v))}

    model.all_tied_weights_keys = others(model.all_tied_weights_keys)
    if isinstance(model._tied_weights_keys, dict):
        model._tied_weights_keys = others(model._tied_weights_keys)


def head_of(model: Any) -> str:
    """The output head's name; empty for a model without one."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "")
