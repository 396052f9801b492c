"""Choose a format for a budget: the same search (`emloc.planning.fitting`) for each, side by side.

Of those that fit, the one for which least data is given up wins (calibration samples, lengths), and among
equals the one whose typical error is least; what costs time alone does not count. A format that was asked for
stays, and so does the default one where an option was that formats understand differently.
"""

from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from math import exp, inf, log
from typing import Any

from emloc.errors import ConfigError
from emloc.formats.abilities import TwoProducts
from emloc.options.compress import AUTO, LOW_RANK_FORMAT, SIZING, with_size
from emloc.planning.fitting import device_bytes, fit
from emloc.planning.memory_plan import MemoryPlan
from emloc.planning.setting import Setting, Stages, with_options

OWN = (
    "format",
    "group_size",
    "residual_rank",
    "factor_bits",
    "rank_pattern",
    "keep_ratio_pattern",
    "keep_ratio_allocation",
    "share_factors",
)
"""Options that mean something to some formats, or choose one."""

COSTS_NO_DATA = (
    "keep_ratio",
    "gradient_checkpointing",
    "per_device_train_batch_size",
    "optim",
    "calibration_batch_size",
    "an emulator",
)
"""The beginnings of concessions that are made in time, or show in the error."""

KNOWN_ERRORS: Mapping[str, Mapping[float, float]] = {
    AUTO: {1.07: 0.28, 2.07: 0.123, 3.07: 0.063, 4.07: 0.034},
    LOW_RANK_FORMAT: {3.99: 0.308, 6.39: 0.234, 9.59: 0.166, 12.80: 0.114},
}
"""Relative errors of layers' outputs on SmolLM2-135M moved off its grid, by format and bits per weight
(`tools/records/formats.md`)."""


def choose(
    setting: Setting,
    budget: int,
    stages: Stages,
    asked: Container[str] | None = None,
) -> MemoryPlan:
    """The plan for a device of `budget` bytes, in the format that suits it best.

    Args:
        stages: that have to fit.
        asked: options that stay as they are; by default those that were set.

    Returns:
        The plan, with all formats that were tried in its `choices`.
    """
    asked = frozenset(setting.options.model_fields_set) if asked is None else asked
    free = setting.given is None and not any(name in asked for name in (*OWN, *SIZING))
    if not free:
        plan = fit(setting, budget, stages, asked)
        return replace(plan, choices=[_described(plan)])
    low_rank = with_options(setting, format=LOW_RANK_FORMAT)
    plans = [fit(low_rank, budget, stages, asked)]
    # Layers may be too small for any form of auto.
    with suppress(ConfigError):
        plans.insert(0, fit(with_options(setting, format=AUTO), budget, stages, asked))
    return replace(min(plans, key=_loss), choices=[_described(plan) for plan in plans])


def typical_error(format: str, bits_per_weight: float) -> float | None:
    """Relative error of layers' outputs, between the sizes that were measured; None for other formats.

    Beyond the measured sizes it stays at the nearest one's: it orders choices, and promises nothing.
    """
    known = KNOWN_ERRORS.get(format)
    if known is None:
        return None
    sizes = sorted(known)
    at = min(max(bits_per_weight, sizes[0]), sizes[-1])
    for low, high in pairwise(sizes):
        if at <= high:
            share = (at - low) / (high - low)
            return exp((1 - share) * log(known[low]) + share * log(known[high]))
    return known[sizes[-1]]


def products_share(setting: Setting) -> float:
    """Multiplications of a forward through the emulated layers, over those of the base's layers."""
    made = dense = 0
    for group in setting.emulator.groups:
        shape, form = group.shape, group.form
        dense += shape.numel
        if isinstance(form.format, TwoProducts):
            made += form.format.inner(form) * (shape.d_in + shape.rows)
        else:
            made += shape.numel
    return made / dense if dense else 1.0


def _error(plan: MemoryPlan) -> float | None:
    return typical_error(plan.setting.options.format, plan.setting.bits_per_weight)


def _loss(plan: MemoryPlan) -> tuple[int, int, float]:
    """Key by which plans are in order, the best first: where none fits, the one that takes least."""
    error = _error(plan)
    given_up = [said for said in plan.given_up if not said.startswith(COSTS_NO_DATA)]
    return plan.smallest or 0, len(given_up), inf if error is None else error


def _described(plan: MemoryPlan) -> dict[str, Any]:
    setting = plan.setting
    return {
        "format": setting.options.format,
        "fits": bool(plan.fits),
        "keep_ratio": with_size(setting.options).keep_ratio,
        "bits_per_weight": setting.bits_per_weight,
        "device_bytes": max(device_bytes(setting, stage) for stage in plan.stages.values()),
        "products": products_share(setting),
        "typical_error": _error(plan),
        "given_up": list(plan.given_up),
    }
