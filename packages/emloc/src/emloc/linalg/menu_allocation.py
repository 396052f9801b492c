"""One of several forms for each layer: the least predicted error that a number of bytes can buy.

Every layer has options, each of so many bytes and with so large an error; errors of layers add up. On the
lower convex hull of a layer's options, each step to the next larger one lowers the error by less per byte
than the step before. All steps of all layers are taken in the order of what they gain per byte, until the
next does not fit: that is optimal for the bytes that are spent (Shoham and Gersho, 1988). What is left goes
to the best steps that still fit.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """A form that a layer may take.

    Attributes:
        bytes: that it takes.
        error: that it adds.
    """

    bytes: int
    error: float


def lower_hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull, in the order of their bytes.

    It begins with the smallest option and ends with that of the least error.
    """
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: options[i]):
        here = options[index]
        if hull and here.error >= options[hull[-1]].error:
            continue
        while len(hull) > 1 and _gain(options[hull[-2]], options[hull[-1]]) <= _gain(
            options[hull[-1]], here
        ):
            hull.pop()
        if hull and here.bytes == options[hull[-1]].bytes:
            hull.pop()
        hull.append(index)
    return hull


def allocate_bytes(layers: Mapping[str, Sequence[Option]], budget: int) -> dict[str, int]:
    """The index of the option that each layer takes.

    Where not even the smallest options fit, each layer takes its smallest.
    """
    hulls = {name: lower_hull(options) for name, options in layers.items()}
    chosen = dict.fromkeys(layers, 0)
    left = budget - sum(layers[name][hull[0]].bytes for name, hull in hulls.items())
    steps = [
        (-_gain(layers[name][before], layers[name][after]), name, place)
        for name, hull in hulls.items()
        for place, (before, after) in enumerate(pairwise(hull), 1)
    ]
    stopped: set[str] = set()
    for _, name, place in sorted(steps):  # a layer's own steps come in order: their gains fall
        before, after = (layers[name][hulls[name][at]] for at in (place - 1, place))
        cost = after.bytes - before.bytes
        if name in stopped or cost > left:
            stopped.add(name)
            continue
        chosen[name], left = place, left - cost
    return {name: hulls[name][place] for name, place in chosen.items()}


def _gain(before: Option, after: Option) -> float:
    """Error that a byte takes away."""
    if after.bytes == before.bytes:
        return float("inf")
    return (before.error - after.error) / (after.bytes - before.bytes)
