"""The tables of the vocabulary, which an emulator may hold in few bits: chosen, read and rounded.

On small models, and where the vocabulary is large, they are most of what is left once the layers are small.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from emloc.artefacts.shard_writer import ShardWriter
from emloc.errors import ConfigError
from emloc.extend.capabilities import vocabulary_of
from emloc.extend.family import ModelFamily
from emloc.formats.coded_matrix import CODES
from emloc.formats.vocabulary import VocabularyTable
from emloc.linalg.bit_packing import packed_columns
from emloc.linalg.finite import refuse_not_finite
from emloc.linalg.row_rounding import part_rows, rounded_parts
from emloc.streaming.stream import UnitStream

StoredAs = Callable[[str], str]
"""The beginning of a module's tensors' names in the checkpoint."""


def choose_tables(
    family: ModelFamily,
    model: nn.Module,
    name: str,
    bits: int | None,
    stored_as: StoredAs = lambda layer: f"{layer}.",
) -> tuple[VocabularyTable, ...]:
    """The tables of a model, in so many bits; none where `bits` is None.

    Args:
        model: the skeleton.
        name: of the model, for messages.

    Raises:
        ConfigError: the model has none, or one that is more than a table.
    """
    if bits is None:
        return ()
    groups = vocabulary_of(family, model)
    if not groups:
        raise ConfigError(
            f"embedding_bits: {name} is a model without a vocabulary; leave embedding_bits out."
        )
    tables: list[VocabularyTable] = []
    for layers in groups:
        for layer in layers:
            _refuse_other(model.get_submodule(layer), layer)
        weight = model.get_submodule(layers[0]).get_parameter("weight")
        others = [
            owner
            for owner, module in model.named_modules()
            if module._parameters.get("weight") is weight and owner not in layers  # pyright: ignore[reportPrivateUsage]
        ]
        if others:
            raise ConfigError(
                f"embedding_bits: {layers[0]} of {name} shares its weight with {others[0]}, which would "
                f"change as well; leave embedding_bits out."
            )
        rows, columns = weight.shape
        tables.append(VocabularyTable(tuple(layers), rows, columns, bits, stored_as(layers[0])))
    return tuple(tables)


def _refuse_other(module: nn.Module, layer: str) -> None:
    """Refuse a module that computes something else than rows of a table, or products with it."""
    looks_up = isinstance(module, nn.Embedding) and module.max_norm is None
    multiplies = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if not (looks_up or multiplies):
        raise ConfigError(
            f"embedding_bits: {layer} is a {type(module).__name__}, which is not just a table; leave "
            f"embedding_bits out."
        )


def tables_in(stream: UnitStream, bits: int | None) -> tuple[VocabularyTable, ...]:
    """`choose_tables` for a streamed model, whose values are looked at.

    Raises:
        ConfigError: as `choose_tables`, or a table is no plain tensor of the checkpoint, or tied ones are
            stored apart.
        NumericalError: a table holds NaN or infinity.
    """
    base = stream.checkpoint
    if bits is None:
        return ()
    # A stream keeps embeddings on file, and so apart from what is tied to them.
    model = stream.family.skeleton(base, torch.float32)
    heads = [
        layer
        for layers in vocabulary_of(stream.family, model)
        for layer in layers
        if not isinstance(model.get_submodule(layer), nn.Embedding)
    ]

    def stored_as(layer: str) -> str:
        plain = stream.stored(f"{layer}.weight").plain_name
        if plain is None or not plain.endswith("weight"):
            raise ConfigError(
                f"embedding_bits: {layer} of {base.name} is not a separate tensor in the checkpoint; leave "
                f"embedding_bits out."
            )
        # A tied table may be stored under the head's name, which would not lead to the embeddings.
        of_head = layer not in heads and any(plain.endswith(f"{head}.weight") for head in heads)
        return f"{layer}." if of_head else plain.removesuffix("weight")

    tables = choose_tables(stream.family, model, base.name, bits, stored_as)
    for table in tables:
        values = [base.read(name) for name in replaced_by(stream, table)]
        refuse_not_finite(table.layers[0], values[:1])
        if any(not torch.equal(values[0], other) for other in values[1:]):
            raise ConfigError(
                f"embedding_bits: {' and '.join(table.layers)} of {base.name} are tied by its config, but "
                f"stored with different values; leave embedding_bits out."
            )
    return tables


def replaced_by(stream: UnitStream, table: VocabularyTable) -> Sequence[str]:
    """The tensors of the base that a table stands for: one, or one for each of its layers."""
    return list(dict.fromkeys(stream.weight_name(layer) for layer in table.layers))


def write_table(shard: ShardWriter, table: VocabularyTable, dense: Tensor) -> None:
    """Round a table and write its tensors; codes as they come, and what is small behind them."""
    small: list[dict[str, Tensor]] = []

    def codes() -> Iterator[Tensor]:
        for grid, part in rounded_parts(dense, table.bits, table.group_size):
            made = table.matrix.encoded(grid, part)
            yield made.pop(CODES)
            small.append(made)

    names = [name for name, _ in table.matrix.stored()]
    shard.write_parts(f"{table.stored_as}{CODES}", codes())
    for name in names:
        if name != CODES:
            shard.write(f"{table.stored_as}{name}", torch.cat([made[name] for made in small]))


def rounding_bytes(table: VocabularyTable) -> int:
    """The most that `write_table` holds: a part in float32 with what finds its grid, and all scales."""
    rows = min(table.rows, part_rows(table.columns, table.group_size))
    part = rows * (4 * 4 * table.columns + 2 * packed_columns(table.columns, table.bits))
    return part + table.nbytes - table.rows * packed_columns(table.columns, table.bits)
