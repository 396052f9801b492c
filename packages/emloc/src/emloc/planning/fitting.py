"""Choose what fits a budget: the largest keep_ratio, and what has to be given up for it.

The order of giving up: the keep_ratio asked for or the largest that fits, down to 0.25 (with `format=auto` to
3.2 bits per weight); then blocks run twice (gradient checkpointing); then batches of one
sample, accumulated; on a GPU an optimiser of 8 bits; then fewer calibration samples; then an emulator of the
smallest ratio; then smaller samples (`SampleSize`). Each is given up in addition to those before it, and with
each the search for the largest keep_ratio starts over. An option that was asked for stays as it is, and so
does one that relieves no stage that does not fit.

Bytes are exact integers of the ratio and grow with it, so the largest is found by bisection in steps of a
hundredth.
"""

from collections.abc import Container, Iterator, Mapping
from math import ceil
from typing import Any, NamedTuple

from emloc.errors import ConfigError
from emloc.formats.layer_format import tensor_bytes
from emloc.options.compress import AUTO, SIZING, default_size
from emloc.options.marks import SampleSize, marked
from emloc.planning.ledger import total
from emloc.planning.memory_plan import MemoryPlan, changed_options
from emloc.planning.setting import Planned, Setting, Stages, with_options

STEPS = 100
LARGEST_RATIO = 0.95
SMALL_RATIO, LEAST_RATIO = 0.25, 0.1
"""The ratio below which an emulator goes only when other things were given up, and the smallest."""

SMALL_BITS, LEAST_BITS = 3.2, 1.1
"""The same of `format=auto`, in bits per weight; the smallest forms take a little less."""

FEWEST_SAMPLES = 16


def fit(
    setting: Setting,
    budget: int,
    stages: Stages,
    asked: Container[str] | None = None,
) -> MemoryPlan:
    """The plan for a device of `budget` bytes.

    Args:
        stages: that have to fit. Whether the base itself runs on the machine is another question.
        asked: options that stay as they are; by default those that were set.
    """
    asked = frozenset(setting.options.model_fields_set) if asked is None else asked
    free = setting.given is None and not any(name in asked for name in SIZING)

    def smallest(tried: Setting, ratio: float) -> Setting:
        return _at(tried, ratio) if free else tried

    given_up: list[str] = []
    least = smallest(setting, _small(setting))
    fitting = _largest_ratio(setting, least, budget, stages, free)
    for step in _concessions(setting) if fitting is None else ():
        if any(name in asked for name in step.changed):
            continue
        changed = with_options(setting, **step.changed)
        lesser = smallest(changed, step.smallest_ratio or _small(setting))
        try:
            if not _relieves(lesser, least, budget, stages):
                continue
        except ConfigError:
            break  # samples as short as that have no room for what the family puts in them
        setting, least = changed, lesser
        given_up.append(step.said)
        fitting = _largest_ratio(setting, least, budget, stages, free)
        if fitting is not None:
            break
    if fitting is not None:
        if free and _ratio_of(fitting) < _default_ratio(fitting):
            given_up = [f"keep_ratio {_ratio_of(fitting):g}", *given_up]
        return MemoryPlan(fitting, stages, budget, True, given_up)
    stage, needed = max(
        ((name, device_bytes(least, each)) for name, each in stages.items()),
        key=lambda pair: pair[1],
    )
    lines = least.stage(stages[stage]).device
    line = max(lines, key=lambda name: lines[name])
    return MemoryPlan(least, stages, budget, False, given_up, needed, (stage, line))


def device_bytes(setting: Setting, stage: Planned) -> int:
    """Bytes that a stage takes of the device."""
    return total(setting.stage(stage).device)


def _relieves(lesser: Setting, before: Setting, budget: int, stages: Stages) -> bool:
    """Return whether a stage that did not fit takes less; some options mean nothing to some models."""
    over = [each for each in stages.values() if device_bytes(before, each) > budget]
    return any(device_bytes(lesser, each) < device_bytes(before, each) for each in over)


def _fits(setting: Setting, budget: int, stages: Stages) -> bool:
    return all(device_bytes(setting, each) <= budget for each in stages.values())


def _at(setting: Setting, ratio: float) -> Setting:
    """The setting with a share of bytes in place of whatever sized the emulator."""
    return with_options(setting, keep_ratio=ratio, bits_per_weight=None, bits=None)


def _largest_ratio(
    setting: Setting, least: Setting, budget: int, stages: Stages, free: bool
) -> Setting | None:
    """The setting with the largest ratio that fits; None where not even `least` does, and the setting as it
    is where no ratio is free.
    """
    if not _fits(least, budget, stages):
        return None
    if not free:
        return least
    best = least
    low, high = round(_ratio_of(least) * STEPS), round(LARGEST_RATIO * STEPS)
    while low <= high:
        middle = (low + high) // 2
        tried = _at(setting, middle / STEPS)
        if _fits(tried, budget, stages):
            best, low = tried, middle + 1
        else:
            high = middle - 1
    return best


class Concession(NamedTuple):
    """A thing to give up next.

    Attributes:
        said: how it is called.
        changed: options and their new values.
        smallest_ratio: of the emulators that are tried with it, where it is less than before.
    """

    said: str
    changed: Mapping[str, Any]
    smallest_ratio: float | None = None


def _ratio_of(setting: Setting) -> float:
    """The share that `_at` gave it."""
    ratio = setting.options.keep_ratio
    assert ratio is not None
    return ratio


def _default_ratio(setting: Setting) -> float:
    """The share of bytes that compress keeps where it is told nothing."""
    size = default_size(setting.options.format)
    bits = size.get("bits_per_weight")
    return size["keep_ratio"] if bits is None else bits / (8 * _itemsize(setting))


def _itemsize(setting: Setting) -> int:
    return setting.subject.itemsize(setting.options.dtype)


def _small(setting: Setting) -> float:
    return _ratio(setting, SMALL_RATIO, SMALL_BITS)


def _ratio(setting: Setting, ratio: float, bits: float) -> float:
    options = setting.options
    if options.format != AUTO:
        return ratio
    bits = max(bits, _least_bits(setting))
    ratio = ceil(STEPS * bits / (8 * _itemsize(setting))) / STEPS
    return min(ratio, LARGEST_RATIO)


def _least_bits(setting: Setting) -> float:
    """Bits per weight of the smallest forms among which auto chooses: many, where layers are tiny.

    Raises:
        ConfigError: they are no smaller than the weights.
    """
    itemsize = _itemsize(setting)
    groups = [each for each in _at(setting, LARGEST_RATIO).compressed.groups if each.menu]
    held = sum(
        min(tensor_bytes(each.shape, form, itemsize) for form in each.guesses) for each in groups
    )
    return 8 * held / (sum(each.shape.numel for each in groups) or 1)


def _concessions(setting: Setting) -> Iterator[Concession]:
    """Concessions in the order in which they are made."""
    options = setting.options
    if not options.gradient_checkpointing:
        yield Concession("gradient_checkpointing", {"gradient_checkpointing": True})
    batch = options.per_device_train_batch_size
    if batch > 1:
        steps = batch * options.gradient_accumulation_steps
        yield Concession(
            f"per_device_train_batch_size 1, gradient_accumulation_steps {steps}",
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps},
        )
    if options.device.startswith("cuda") and options.optim.startswith("adamw_torch"):
        yield Concession("optim adamw_8bit", {"optim": "adamw_8bit"})
    if options.calibration_batch_size > 1:
        yield Concession("calibration_batch_size 1", {"calibration_batch_size": 1})
    samples = options.num_calibration_samples
    while samples > FEWEST_SAMPLES:
        samples = max(FEWEST_SAMPLES, samples // 2)
        fewer = {"num_calibration_samples": samples}
        yield Concession(f"num_calibration_samples {samples}", fewer)
    smallest = _ratio(setting, LEAST_RATIO, LEAST_BITS)
    yield Concession(f"an emulator below keep_ratio {_small(setting):g}", {}, smallest)
    for name, mark in marked(type(options), SampleSize).items():
        size: int = getattr(options, name)
        while size // 2 >= mark.least:
            size //= 2
            yield Concession(f"{name} {size}", {name: size}, smallest)


def changed_for(before: Setting, after: Setting) -> dict[str, Any]:
    """Options that fitting changed, besides the keep_ratio."""
    old, new = changed_options(before.options), changed_options(after.options)
    return {name: new[name] for name in new if new[name] != old[name] and name != "keep_ratio"}
