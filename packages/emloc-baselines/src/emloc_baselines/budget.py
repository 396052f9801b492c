"""The bytes that a light model may hold: as many as EMLoC's emulator of the same `keep_ratio`.

`bytes = Σ base parameters − Σ compressed layers' weights + Σ their stored form`, in the dtype that the
checkpoint stores, sizes as `emloc compress` would choose them; with `format=auto`, which chooses by data,
those of a guess that spends the same bytes. Known from shapes alone.
"""

from emloc.compression.choice import streamed_itemsize
from emloc.compression.groups import make_plan
from emloc.errors import ConfigError
from emloc.formats.layer_format import tensor_bytes
from emloc.streaming.stream import UnitStream
from emloc_baselines.light import Source


def held_bytes(stream: UnitStream) -> int:
    """Bytes of the base's parameters in memory; tied ones count once."""
    names = {
        name
        for parameter, _ in stream.model.named_parameters()
        for name in stream.stored(parameter).names
    }
    return sum(stream.checkpoint.tensors[name].nbytes for name in names)


def emulator_bytes(source: Source, stream: UnitStream) -> int:
    """Bytes of the parameters of EMLoC's emulator at the source's `keep_ratio`.

    Raises:
        ConfigError: that would have its embeddings in few bits, which no light model here has.
    """
    config = source.config
    bits = getattr(config, "embedding_bits", None)
    if bits is not None:
        raise ConfigError(
            f"embedding_bits={bits} would make EMLoC's emulator smaller than what this method may hold, as "
            f"it keeps embeddings as they are; give it in the sections of EMLoC's own rows alone."
        )
    itemsize_of = streamed_itemsize(stream, "auto")
    groups = source.family.layer_groups(stream.model)
    plan = make_plan(groups, stream.layer_shape, config, itemsize_of)
    total = held_bytes(stream)
    for group in plan.guessed.groups:
        itemsize = itemsize_of(group.owner)
        total += tensor_bytes(group.shape, group.form, itemsize) - group.shape.numel * itemsize
    return total
