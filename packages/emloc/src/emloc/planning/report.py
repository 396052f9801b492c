"""A plan as a table: a row per stage and way, with the lines that its total is the sum of."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group as Renderables
from rich.table import Table
from rich.text import Text

from emloc.machine.memory import format_bytes

GIB = 1 << 30

FIRST = (
    "weights",
    "block in float32",
    "head in float32",
    "LoRA",
    "modules to save",
    "gradients",
    "optimiser",
    "activations",
    "logits and loss",
    "suspended calls",
    "moments",
    "fitting",
    "fitted layers",
    "working tensors",
)
LAST = ("allocator slack", "CUDA context")
"""The order of lines; others stand in between as they occur."""


def report(plan: Mapping[str, Any]) -> Renderables:
    """The whole plan, for a console."""
    parts: list[Any] = [Text(_heading(plan)), _table(plan)]
    if len(plan["choices"]) > 1:
        parts.append(_choices(plan["choices"]))
    parts.append(_ways(plan))
    parts += [Text(line) for line in verdict(plan)]
    if plan["recommended"]:
        best = plan["recommended"]
        parts.append(Text(f"Recommended: {best['way']}; {best['reason']}."))
    return Renderables(*parts)


def rows_of(plan: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Stages, and the ways beside them."""
    return {**plan["stages"], **plan["beside"]}


def _heading(plan: Mapping[str, Any]) -> str:
    bits = plan["embedding_bits"]
    tables = f", embeddings in {bits} bits" if bits else ""
    return (
        f"{plan['model']}: {plan['parameters'] / 1e9:.2f} B parameters in {plan['dtype']}, emulator "
        f"{plan['emulator_parameters'] / 1e9:.2f} B ({plan['sized_by']}, {plan['format']}, "
        f"{plan['bits_per_weight']:.2f} bits per weight{tables}, {format_bytes(plan['emulator_bytes'])} in "
        f"all); on {plan['device']}; activations by "
        f"{plan['activations']}"
    )


def _table(plan: Mapping[str, Any]) -> Table:
    rows = rows_of(plan)
    table = Table("stage", padding=(0, 1))
    for name in ("device", "host", "disk"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("on the device, in GiB")
    for stage, row in rows.items():
        if stage == next(iter(plan["beside"])):
            table.add_section()
        made = summed(row["device_bytes"]["lines"])
        totals = [_shown(row[f"{place}_bytes"]["total"]) for place in ("device", "host", "disk")]
        table.add_row(stage, *totals, made)
    return table


def _choices(choices: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(padding=(0, 1))
    names = (
        "format",
        "bits per weight",
        "device",
        "products",
        "error of outputs",
        "given up for it",
    )
    for name in names:
        table.add_column(name, justify="left" if name in (names[0], names[-1]) else "right")
    for choice in choices:
        error = choice["typical_error"]
        table.add_row(
            choice["format"], f"{choice['bits_per_weight']:.2f}",
            format_bytes(choice["device_bytes"]) if choice["fits"] else "does not fit",
            f"{choice['products']:.2f}", "" if error is None else f"{error:.3f}",
            "; ".join(choice["given_up"]),
        )  # fmt: skip
    table.caption = (
        "products: multiplications in a forward pass relative to the base's; error of outputs: as measured "
        "on SmolLM2-135M at that many bits"
    )
    return table


def _ways(plan: Mapping[str, Any]) -> Table:
    table = Table("way", padding=(0, 1))
    for name in ("device", "host", "disk", "s per step", "s per epoch", "gain recovered", "fits"):
        table.add_column(name, justify="right")
    for way in plan["ways"]:
        sizes = [_shown(way[f"{place}_bytes"]) for place in ("device", "host", "disk")]
        times = [way["seconds_per_step"], way["seconds_per_epoch"]]
        gain, fits = way["gain_recovered"], way["fits"]
        table.add_row(
            way["name"], *sizes, *("" if time is None else f"{time:.3g}" for time in times),
            "" if gain is None else f"{gain:.0%}", {None: "", True: "yes", False: "no"}[fits],
        )  # fmt: skip
    table.caption = (
        "gain recovered: share of LoRA's gain on the original, measured on SmolLM2-135M and GSM8K"
    )
    return table


def summed(lines: Mapping[str, int]) -> str:
    """`weights 5.24 + LoRA 0.03 + …`, in GiB."""
    return " + ".join(f"{name} {lines[name] / GIB:.2f}" for name in ordered(lines))


def ordered(names: Iterable[str]) -> list[str]:
    """The lines in the order that `FIRST` and `LAST` say."""
    given = list(dict.fromkeys(names))
    between = [name for name in given if name not in FIRST + LAST]
    return [name for name in (*FIRST, *between, *LAST) if name in given]


def _shown(count: int) -> str:
    return format_bytes(count) if count else ""


def verdict(plan: Mapping[str, Any]) -> Sequence[str]:
    """Sentences on what fits, and what was given up for it; nothing without a budget."""
    if plan["memory"] is None:
        return []
    budget = format_bytes(plan["memory"])
    if not plan["fits"]:
        stage, line = plan["dominating"]
        return [
            f"Nothing fits in {budget}: the smallest need is {format_bytes(plan['smallest'])}, mostly "
            f"{line} of {stage}. Tried, in this order: {'; '.join(plan['given_up']) or 'nothing'}."
        ]
    given_up = "; ".join(plan["given_up"])
    said = f"Given up to fit, in this order: {given_up}." if given_up else "Nothing was given up."
    how = f"format {plan['format']}, {plan['sized_by']}" if plan["choices"] else plan["sized_by"]
    lines = [f"Fits in {budget} with {how}. {said}"]
    runs = plan["stages"]["inference"]["device_bytes"]["total"]
    if runs > plan["memory"]:
        lines.append(f"The base itself takes {format_bytes(runs)} to run, which is more.")
    if plan["beside"]["LoRA on the base"]["device_bytes"]["total"] <= plan["memory"]:
        lines.append("A LoRA on the base itself fits as well; it needs no emulator.")
    return lines
