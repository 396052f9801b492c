"""A bench's pictures: score, loss and gain recovered over the budget, a row of panels per data set."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from emloc_baselines.bench.tables import budgets, gains_recovered, labels, matching

Record = Mapping[str, Any]


def plot_bench(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write `score.png` (where there are scores), `loss.png` and `gain.png` (where there is a LoRA)."""
    wanted: tuple[tuple[str, Sequence[Record], str, Callable[[Record], float]], ...] = (
        ("score", [r for r in records if r["score"] is not None], "score", lambda r: r["score"]),
        ("loss", records, "loss", lambda r: r["loss"]),
        ("gain", gains_recovered(records), "gain recovered", lambda r: r["gain"]),
    )
    return [
        _plot(chosen, folder / f"{name}.png", title, value)
        for name, chosen, title, value in wanted
        if chosen
    ]


def _plot(
    records: Sequence[Record], path: Path, title: str, value: Callable[[Record], float]
) -> Path:
    """Lines with the seeds' spread behind; what has no budget is a horizontal line."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    datasets = list(dict.fromkeys(record["dataset"] for record in records))
    ratios = [ratio for ratio in budgets(records) if ratio is not None]
    figure, panels = plt.subplots(
        1, len(datasets), figsize=(5.5 * len(datasets), 4.2), squeeze=False
    )
    colors = plt.get_cmap("tab10")
    for axes, dataset in zip(panels[0], datasets):
        for index, label in enumerate(labels(records)):
            own = matching(records, dataset=dataset, label=label)
            if not own:
                continue
            color = colors(index % 10)
            if own[0]["keep_ratio"] is None:
                mean = sum(map(value, own)) / len(own)
                axes.axhline(mean, color=color, linestyle="--", linewidth=1, label=label)
                continue
            groups = [[value(r) for r in own if r["keep_ratio"] == ratio] for ratio in ratios]
            points = [(x, values) for x, values in zip(ratios, groups) if values]
            xs = [x for x, _ in points]
            means = [sum(values) / len(values) for _, values in points]
            axes.plot(xs, means, color=color, marker="o", markersize=4, label=label)
            low, high = [min(v) for _, v in points], [max(v) for _, v in points]
            axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_title(dataset)
        axes.set_xlabel("budget (keep_ratio of EMLoC)")
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][-1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
