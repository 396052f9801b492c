"""The demo's table, `summary.json` and picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from emloc.artefacts.small_files import write_json
from emloc.machine.memory import format_bytes

COLORS = {
    "base": "#9aa0a6",
    "lora": "#4285f4",
    "qlora": "#a142f4",
    "uncorrected": "#fbbc04",
    "emloc": "#34a853",
}

BARS = {
    "base": "base",
    "lora": "LoRA\non base",
    "qlora": "QLoRA",
    "uncorrected": "EMLoC\nuncorrected",
    "emloc": "EMLoC",
}

TITLES = {
    "base": "base model",
    "lora": "LoRA trained on the base",
    "qlora": "QLoRA (the base in NF4)",
    "uncorrected": "EMLoC without correction",
    "emloc": "EMLoC",
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        score: between 0 and 1, on unseen examples; `Row.measure` says of what.
        loss: per answer token on unseen examples.
        train_weight_bytes: parameters held while training, LoRA included; 0: not trained.
        peak_bytes: peak memory over the process's start; for `base` of running it, for `lora` of
            training, for EMLoC the highest of its stages.
        seconds_per_step: of training; None: not trained.
    """

    name: str
    score: float
    loss: float
    train_weight_bytes: int
    peak_bytes: int
    seconds_per_step: float | None
    measure: str = "exact_match"

    def as_json(self) -> dict[str, Any]:
        """The fields, the score under the name of what it measures."""
        fields = asdict(self)
        name, score, measure = (fields.pop(key) for key in ("name", "score", "measure"))
        return {"name": name, measure: score, **fields}


def print_table(rows: Sequence[Row], title: str) -> None:
    """The rows on standard output."""
    table = Table(title=title)
    table.add_column("")
    for column in (
        _shown(rows[0].measure),
        "loss",
        "weights in training",
        "peak memory",
        "s / step",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        trained = row.seconds_per_step is not None
        table.add_row(
            TITLES[row.name],
            f"{row.score:.0%}",
            f"{row.loss:.4f}",
            format_bytes(row.train_weight_bytes) if trained else "–",
            format_bytes(row.peak_bytes) + ("" if trained else " (running)"),
            f"{row.seconds_per_step:.2f}" if trained else "–",
        )
    Console().print(table)


def _shown(measure: str) -> str:
    return measure.replace("_", " ")


def write_summary(rows: Sequence[Row], path: Path, **more: object) -> None:
    """`rows` and what else belongs to the run, as JSON."""
    write_json(path, {"rows": [row.as_json() for row in rows], **more})


def plot(rows: Sequence[Row], path: Path) -> None:
    """Score, loss, memory and time side by side."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        (f"{_shown(rows[0].measure)} (%)", [100 * row.score for row in rows]),
        ("loss on unseen examples", [row.loss for row in rows]),
        ("weights held in training (MiB)", [row.train_weight_bytes / 2**20 for row in rows]),
        ("peak memory (MiB)", [row.peak_bytes / 2**20 for row in rows]),
        ("seconds per step", [row.seconds_per_step or 0 for row in rows]),
    )
    colors = [COLORS[row.name] for row in rows]
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 4))
    labels = [BARS[row.name] for row in rows]
    for axis, (title, values) in zip(axes, panels):
        bars = axis.bar(labels, values, color=colors)
        axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
