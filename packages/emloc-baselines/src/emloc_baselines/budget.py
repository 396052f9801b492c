"""How many bytes a light model may hold: as many as EMLoC's emulator of the same `keep_ratio`.

`bytes = Σ base parameters − Σ compressed layers' weights + Σ their factors`, each in the dtype that the
checkpoint stores, ranks as `emloc compress` would choose them. Known from shapes alone.
"""

from emloc.compression.groups import make_plan
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
    """Bytes of the parameters of EMLoC's emulator at the source's `keep_ratio`."""
    groups = source.family.layer_groups(stream.model)
    plan = make_plan(groups, stream.layer_shape, source.config)
    total = held_bytes(stream)
    for group in plan.groups:
        size = stream.checkpoint.tensors[stream.weight_name(group.owner)].dtype.itemsize
        outputs = sum(group.d_out)
        total += size * (group.rank * (outputs + group.d_in) - outputs * group.d_in)
    return total
