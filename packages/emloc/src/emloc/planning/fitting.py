"""Choose what fits a budget: the largest keep_ratio, and what has to be given up for it.

The order of giving up: the keep_ratio asked for or the largest that fits, down to 0.25; then blocks run
twice (gradient checkpointing); then batches of one sample, accumulated; on a GPU an optimiser of 8 bits;
then fewer calibration samples; then an emulator of a ratio down to 0.1; then shorter samples. Each is given
up besides those before it, and with each the keep_ratio begins anew at the largest that fits. An option that
was asked for stays as it is.

Bytes are exact integers of the ratio and grow with it, so the largest is found by bisection in steps of a
hundredth.
"""

from collections.abc import Container, Iterator, Sequence
from typing import Any

from emloc.config import PlanConfig
from emloc.errors import ConfigError
from emloc.planning.ledger import total
from emloc.planning.planner import MemoryPlan, Setting, changed_options, with_options

STEPS = 100
LEAST_RATIO, SMALLEST_RATIO, LARGEST_RATIO = 0.1, 0.25, 0.95
DEFAULT_RATIO: float = PlanConfig.model_fields["keep_ratio"].default
FEWEST_SAMPLES, SHORTEST = 16, 256

NEEDED = ("compress", "train", "correct", "merge")
"""Stages that have to fit; whether the base itself runs on the machine is said, and is another question."""


def fit(
    setting: Setting,
    budget: int,
    stages: Sequence[str] = NEEDED,
    asked: Container[str] | None = None,
) -> MemoryPlan:
    """The plan for a device of `budget` bytes.

    Args:
        stages: that have to fit.
        asked: options that stay as they are; by default those that were set.
    """
    asked = frozenset(setting.options.model_fields_set) if asked is None else asked
    free = setting.given is None and "keep_ratio" not in asked
    given_up: list[str] = []
    smallest = SMALLEST_RATIO
    changes = [(c, said) for c, said in _concessions(setting) if not any(k in asked for k in c)]
    for changed, said in [({}, ""), *changes]:
        if not changed and said:
            if not free:
                continue
            smallest = LEAST_RATIO
        tried = with_options(setting, **changed)
        try:
            if changed and _taken(tried, stages) == _taken(setting, stages):
                continue  # it means nothing to this model, as a text's length to pictures
            found = _largest_ratio(tried, budget, stages, smallest if free else None)
        except ConfigError:
            if not said:
                raise
            break  # samples as short as that have no room for what the family puts in them
        setting = tried
        if said:
            given_up.append(said)
        if found is not None:
            if free and found.options.keep_ratio < DEFAULT_RATIO:
                given_up = [f"keep_ratio {found.options.keep_ratio:g}", *given_up]
            return MemoryPlan(found, budget, True, given_up)
    least = _at(setting, smallest) if free else setting
    stage, needed = max(
        ((name, device_bytes(least, name)) for name in stages), key=lambda pair: pair[1]
    )
    lines = least.stage(stage).device
    line = max(lines, key=lambda name: lines[name])
    return MemoryPlan(least, budget, False, given_up, needed, (stage, line))


def as_it_is(setting: Setting) -> MemoryPlan:
    """The plan of a setting without a budget."""
    return MemoryPlan(setting)


def device_bytes(setting: Setting, stage: str) -> int:
    """What a stage takes of the device."""
    return total(setting.stage(stage).device)


def _taken(setting: Setting, stages: Sequence[str]) -> Sequence[int]:
    return [device_bytes(setting, name) for name in stages]


def _fits(setting: Setting, budget: int, stages: Sequence[str]) -> bool:
    return all(device_bytes(setting, name) <= budget for name in stages)


def _at(setting: Setting, ratio: float) -> Setting:
    return with_options(setting, keep_ratio=ratio)


def _largest_ratio(
    setting: Setting, budget: int, stages: Sequence[str], smallest: float | None
) -> Setting | None:
    """None where not even the smallest ratio fits; the setting itself where the ratio is not free."""
    if smallest is None:
        return setting if _fits(setting, budget, stages) else None
    low, high = round(smallest * STEPS), round(LARGEST_RATIO * STEPS)
    best = _at(setting, smallest)
    if not _fits(best, budget, stages):
        return None
    while low <= high:
        middle = (low + high) // 2
        tried = _at(setting, middle / STEPS)
        if _fits(tried, budget, stages):
            best, low = tried, middle + 1
        else:
            high = middle - 1
    return best


def _concessions(setting: Setting) -> Iterator[tuple[dict[str, Any], str]]:
    """What to change next, and how it is said; nothing changed stands for ratios below `SMALLEST_RATIO`."""
    options = setting.options
    if not options.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, "gradient_checkpointing"
    batch = options.per_device_train_batch_size
    if batch > 1:
        steps = batch * options.gradient_accumulation_steps
        yield (
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps},
            f"per_device_train_batch_size 1, gradient_accumulation_steps {steps}",
        )
    if options.device.startswith("cuda") and options.optim.startswith("adamw_torch"):
        yield {"optim": "adamw_8bit"}, "optim adamw_8bit"
    if options.calibration_batch_size > 1:
        yield {"calibration_batch_size": 1}, "calibration_batch_size 1"
    samples = options.num_calibration_samples
    while samples > FEWEST_SAMPLES:
        samples = max(FEWEST_SAMPLES, samples // 2)
        yield {"num_calibration_samples": samples}, f"num_calibration_samples {samples}"
    yield {}, f"an emulator below keep_ratio {SMALLEST_RATIO:g}"
    length = options.max_length
    while length // 2 >= SHORTEST:
        length //= 2
        yield {"max_length": length}, f"max_length {length}"


def changed_for(before: Setting, after: Setting) -> dict[str, Any]:
    """Options that fitting changed, besides the keep_ratio."""
    old, new = changed_options(before.options), changed_options(after.options)
    return {name: new[name] for name in new if new[name] != old[name] and name != "keep_ratio"}
