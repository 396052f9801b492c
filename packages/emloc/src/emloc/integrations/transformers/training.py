"""Callbacks on transformers' Trainer: progress, a log, a plot, and safe resuming."""

import json
import math
import time
from pathlib import Path
from typing import Any

import matplotlib
from transformers import TrainerCallback

from emloc.artefacts.json_files import read_json
from emloc.errors import CheckpointError, NumericalError
from emloc.machine.progress import ProgressBar

LOG_NAME = "trainer_log.jsonl"
PLOT_NAME = "training_loss.png"

LOSSES = {"loss": "training", "train_loss": "training", "eval_loss": "evaluation"}
"""Losses by their names in the Trainer's log."""

_CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
_WEIGHTS_FILES = (("adapter_model.safetensors", "adapter_config.json"), ("model.safetensors",))
"""Weights files of one model with a LoRA, or of several trained together."""


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-N` that holds everything an exact resume needs.

    The Trainer writes `trainer_state.json` last, so a folder without it (or with half of it) was
    being written when the run was killed.
    """
    complete: list[tuple[int, Path]] = []
    for entry in folder.glob("checkpoint-*"):
        step = entry.name.removeprefix("checkpoint-")
        held = {path.name for path in entry.iterdir() if path.is_file()}
        weights = any(held.issuperset(names) for names in _WEIGHTS_FILES)
        if step.isdigit() and weights and held.issuperset(_CHECKPOINT_FILES):
            try:
                read_json(entry / "trainer_state.json")
            except CheckpointError:
                continue
            complete.append((int(step), entry))
    return str(max(complete)[1]) if complete else None


class Progression(TrainerCallback):
    """A progress bar, `trainer_log.jsonl`, and seconds per step (the first, a warm-up, left out).

    The log is rewritten from the Trainer's own history, so a resumed run's log is the same as an
    uninterrupted one's.
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
        lines = [json.dumps(entry) for entry in state.log_history]
        (self.folder / LOG_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
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


def plot_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Training and evaluation loss over steps, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points), marker="o", markersize=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
