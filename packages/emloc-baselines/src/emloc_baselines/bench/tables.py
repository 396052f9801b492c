"""A bench's records as Markdown: rows are methods, columns data sets, one table per measure and budget.

Where there are several seeds, a number is their mean and, in brackets, the spread: largest minus smallest.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emloc.machine.memory import format_bytes
from emloc_baselines.bench.config import BASE

Record = Mapping[str, Any]
Rows = list[list[str]]

REFERENCE = "lora"
"""The method that the gain is measured against: the row of that name, or else the first of the method that
is not polished."""


def tables(
    records: Sequence[Record], published: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """All tables of a bench.

    Args:
        published: row to data set to what others report, shown beside.
    """
    parts: list[str] = []
    for measure in dict.fromkeys(record["measure"] for record in records):
        known = [r for r in records if r["measure"] == measure and r["score"] is not None]
        if known:
            shown = measure.replace("_", " ")
            parts += _by_budget(known, shown, "{:.1%}", lambda r: r["score"], published)
    parts += _by_budget(records, "loss", "{:.4f}", lambda r: r["loss"], None)
    gains = gains_recovered(records)
    if gains:
        parts += _by_budget(gains, "gain recovered", "{:.0%}", lambda r: r["gain"], None)
    parts.append(_costs(records))
    return "\n\n".join(parts) + "\n"


def budgets(records: Sequence[Record]) -> list[float | None]:
    """The budgets that occur; None alone where none does."""
    ratios = sorted({r["keep_ratio"] for r in records if r["keep_ratio"] is not None})
    return list(ratios) or [None]


def labels(records: Sequence[Record]) -> list[str]:
    """Rows in their order."""
    return list(dict.fromkeys(record["label"] for record in records))


def matching(records: Sequence[Record], **wanted: Any) -> list[Record]:
    """Records with these values; a record without a budget matches every budget."""
    return [
        record
        for record in records
        if all(
            record[key] == value or (key == "keep_ratio" and record[key] is None)
            for key, value in wanted.items()
        )
    ]


def gains_recovered(records: Sequence[Record]) -> list[Record]:
    """Records with `gain`: what share of the loss that LoRA on the base takes off, a method takes off.

    `(base − method) / (base − LoRA)` on the loss, against the LoRA of the same seed and data set. Where that
    LoRA takes nothing off, there is nothing to recover, and records have no `gain`.
    """
    with_gain: list[Record] = []
    for record in records:
        base = matching(records, dataset=record["dataset"], label=BASE)
        lora = matching(records, dataset=record["dataset"], method=REFERENCE, seed=record["seed"])
        lora = [r for r in lora if "polish" not in r]
        lora.sort(key=lambda r: r["label"] != REFERENCE)
        if record["label"] == BASE or not base or not lora:
            continue
        possible = base[0]["loss"] - lora[0]["loss"]
        if possible > 0:
            with_gain.append({**record, "gain": (base[0]["loss"] - record["loss"]) / possible})
    return with_gain


def summarise(values: Sequence[float], form: str) -> str:
    """Mean, and spread where there are several; nothing for nothing."""
    if not values:
        return "–"
    mean = form.format(sum(values) / len(values))
    spread = form.format(max(values) - min(values))
    return mean if len(values) == 1 else f"{mean} ({spread})"


def _by_budget(
    records: Sequence[Record],
    title: str,
    form: str,
    value: Callable[[Record], float],
    published: Mapping[str, Mapping[str, Any]] | None,
) -> list[str]:
    datasets = list(dict.fromkeys(record["dataset"] for record in records))
    beside = [name for name in datasets if any(name in row for row in (published or {}).values())]
    head = ["", "held in training", *datasets, *(f"{name}, published" for name in beside)]
    parts: list[str] = []
    for budget in budgets(records):
        rows: Rows = []
        for label in labels(records):
            own = matching(records, label=label, keep_ratio=budget)
            if not own:
                continue
            cells = [
                summarise([value(r) for r in matching(own, dataset=name)], form)
                for name in datasets
            ]
            reported = [str((published or {}).get(label, {}).get(name, "–")) for name in beside]
            rows.append([_name(label, own), _held(own), *cells, *reported])
        suffix = "" if budget is None else f", keep_ratio {budget:g}"
        parts.append(f"### {title}{suffix}\n\n{_table(head, rows)}")
    return parts


def _name(label: str, records: Sequence[Record]) -> str:
    """The row's label, and whether its light model was trained further before."""
    for record in records:
        done = record.get("continued")
        if done:
            return f"{label} ({done['steps']} steps of {done['as']})"
    return label


def _held(records: Sequence[Record]) -> str:
    sizes = [record["held_bytes"] for record in records if "held_bytes" in record]
    return format_bytes(max(sizes)) if sizes else "–"


def _costs(records: Sequence[Record]) -> str:
    """The costs of every row: bytes, seconds, the learning rate that was chosen, the correction's
    limits.
    """
    head = ["", "keep_ratio", "held in training", "LoRA", "peak memory", "building", "trained further",
            "training", "recovery", "polishing", "overall", "s / step", "learning rate", "limit"]  # fmt: skip
    rows: Rows = []
    for budget in budgets(records):
        for label in labels(records):
            own = [r for r in matching(records, label=label, keep_ratio=budget) if r["method"]]
            free = own and own[0]["keep_ratio"] is None
            if not own or (free and any(row[0] == _name(label, own) for row in rows)):
                continue
            rows.append(
                [
                    _name(label, own),
                    "–" if free or budget is None else f"{budget:g}",
                    _held(own),
                    format_bytes(max(r["trainable_bytes"] for r in own)),
                    format_bytes(max(max(_making(r).values()) for r in own)),
                    *(
                        _seconds(own, step)
                        for step in ("build", "continue", "train", "recover", "polish")
                    ),
                    summarise([sum(r["seconds"].values()) for r in own], "{:.1f} s").split(" (")[0],
                    summarise(_known(own, "seconds_per_step"), "{:.2f}").split(" (")[0],
                    ", ".join(dict.fromkeys(f"{r['learning_rate']:g}" for r in own)),
                    _limits(own),
                ]
            )
    return f"### cost\n\n{_table(head, rows)}"


def _limits(records: Sequence[Record]) -> str:
    """The correction's limit of every record in its order; one for all where they are the same."""
    limits = [r["recovery"]["limit"] for r in records if "limit" in r.get("recovery", {})]
    return ", ".join(limits if len(set(limits)) > 1 else limits[:1]) or "–"


def _known(records: Sequence[Record], key: str) -> list[float]:
    return [record[key] for record in records if record[key] is not None]


def _making(record: Record) -> dict[str, int]:
    """Peaks of building, training and recovering; scoring runs the original model for all alike."""
    return {step: peak for step, peak in record["peak_bytes"].items() if step != "evaluate"}


def _seconds(records: Sequence[Record], step: str) -> str:
    values = [r["seconds"][step] for r in records if step in r["seconds"]]
    return summarise(values, "{:.1f} s").split(" (")[0]


def _table(head: Sequence[str], rows: Rows) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
