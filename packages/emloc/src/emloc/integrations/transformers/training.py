"""Callbacks on transformers' Trainer: progress, a log and a plot."""

import json
import math
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import TrainerCallback

from emloc.artefacts.write_errors import writing
from emloc.errors import NumericalError
from emloc.machine.progress import ProgressBar

LOG_NAME = "trainer_log.jsonl"
PLOT_NAME = "training_loss.png"

LOSSES = {"loss": "training", "train_loss": "training", "eval_loss": "evaluation"}
"""Losses by their names in the Trainer's log."""

CLOCKED = ("_runtime", "_per_second")
"""Ends of the names of figures that no two runs share; they are in the manifest, and on the screen."""


class Progression(TrainerCallback):
    """A progress bar, `trainer_log.jsonl`, and seconds per step (the first, a warm-up, left out).

    The log is rewritten from the Trainer's own history, without what a clock says, so a resumed run's log is
    the same as an uninterrupted one's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.progress: ProgressBar | None = None
        self.step_seconds: list[float] = []
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.progress = ProgressBar("train", state.max_steps, state.global_step)
        self.progress.__enter__()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar, now that the step before has been logged; start the clock."""
        if self.progress:
            self.progress.move_to(state.global_step)
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.step_seconds.append(time.perf_counter() - self._started)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the log; stop at a loss that is not a number."""
        lines = [json.dumps(_unclocked(entry), sort_keys=True) for entry in state.log_history]
        unfinished = self.folder / f"{LOG_NAME}.tmp"
        with writing(unfinished):
            unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
            unfinished.replace(self.folder / LOG_NAME)
        for name, meaning in LOSSES.items():
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise NumericalError(
                    f"The {meaning} loss is {value} at step {state.global_step}; use a lower "
                    f"learning_rate or max_grad_norm."
                )
        loss = (logs or {}).get("loss")
        if self.progress and loss is not None:
            self.progress.note = f"loss {loss:.4f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.progress:
            self.progress.move_to(state.global_step)
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.progress:
            self.progress.__exit__(None)
            self.progress = None

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over this process's steps without the first."""
        steps = self.step_seconds[1:] or self.step_seconds
        return round(sum(steps) / len(steps), 4) if steps else None


def _unclocked(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not name.endswith(CLOCKED)}


def plot_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Training and evaluation loss over steps, as a PNG."""
    figure = Figure(figsize=(6, 4))
    axes = figure.add_axes(
        (0.14, 0.13, 0.83, 0.83)
    )  # an automatic layout would draw everything twice
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points), marker="o", markersize=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
