"""A plan as stacked bars: one per stage and way, the budget as a line across."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from emloc.planning.report import GIB, ordered, rows_of


def draw(plan: Mapping[str, Any], path: Path) -> None:
    """Write the picture as PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = rows_of(plan)
    names = list(rows)
    lines = ordered(line for row in rows.values() for line in row["device_bytes"]["lines"])
    figure, axes = plt.subplots(figsize=(9, 5))
    bottoms = [0.0] * len(names)
    colors = plt.get_cmap("tab20").colors  # pyright: ignore
    for index, line in enumerate(lines):
        heights = [rows[name]["device_bytes"]["lines"].get(line, 0) / GIB for name in names]
        axes.bar(names, heights, bottom=bottoms, label=line, color=colors[index % len(colors)])
        bottoms = [below + height for below, height in zip(bottoms, heights)]
    if plan["memory"] is not None:
        budget = plan["memory"] / GIB
        axes.axhline(budget, color="black", linestyle="--", label=f"budget {budget:.4g} GiB")
    axes.set_ylabel("GiB")
    axes.set_title(f"{Path(plan['model']).name}, {plan['sized_by']}")
    axes.tick_params(axis="x", rotation=30)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
