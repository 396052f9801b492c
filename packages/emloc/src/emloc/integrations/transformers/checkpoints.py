"""Checkpoints of a training: whole ones are told from others, and carry on what the Trainer forgets.

The Trainer writes a checkpoint file by file and syncs none. When it is done with one, `KeepsCheckpoints`
syncs its files and their names, and writes their digests beside them, last: a checkpoint without digests was
being written when the run ended, and one whose files are others was damaged since. Only then are older ones
removed.

What training has added up since it last logged is in no checkpoint of the Trainer's, so that the log of a run
that was interrupted would differ from that of one that was not; it is kept here.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from emloc.artefacts.durable import sync_folder, sync_tree
from emloc.artefacts.file_digest import file_sha256
from emloc.artefacts.json_files import read_json
from emloc.artefacts.small_files import copy_file, write_json
from emloc.artefacts.stage_folder import SETTINGS_NAME
from emloc.artefacts.write_errors import writing
from emloc.errors import CheckpointError
from emloc.machine.progress import warn

DIGESTS_NAME = "digests.json"
SUMS_NAME = "sums.json"
"""Names of the two files that are added to a checkpoint."""

NUMBERS = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")
"""Attributes of the Trainer, or of TRL's, that count since the training began."""


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest `checkpoint-N` of a folder that is as it was written; what others lack is said."""
    for checkpoint in sorted(_checkpoints(folder), key=_step, reverse=True):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        warn(f"train: {checkpoint.name} is skipped: {problem}")
    return None


def damage(checkpoint: Path) -> str | None:
    """The first thing that is wrong with a checkpoint; None where it is as it was written."""
    if not (checkpoint / DIGESTS_NAME).is_file():
        return "it was being written when the run ended"
    try:
        digests = read_json(checkpoint / DIGESTS_NAME)
    except CheckpointError as problem:
        return str(problem)
    held = {
        str(path.relative_to(checkpoint)): path
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != DIGESTS_NAME
    }
    for name in held.keys() - digests.keys():
        return f"{name} is not among its digests"
    for name, digest in digests.items():
        path = held.get(name)
        if path is None:
            return f"{name} is missing"
        if file_sha256(path) != digest:
            return f"{name} is not what was written (SHA-256 differs)"
    return None


class KeepsCheckpoints(TrainerCallback):
    """Completes checkpoints as they are saved, and puts back what is kept in the one to go on from.

    Attributes:
        trainer: whose checkpoints they are; given once there is one.

    Args:
        folder: where they are.
        limit: how many stay.
        resumed: the one that training goes on from, if any.
    """

    trainer: Any

    def __init__(self, folder: Path, limit: int, resumed: Path | None) -> None:
        self._folder, self._limit, self._resumed = folder, limit, resumed

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the newest checkpoint, and remove the oldest."""
        checkpoint = self._folder / f"checkpoint-{state.global_step}"
        with writing(checkpoint):
            (checkpoint / DIGESTS_NAME).unlink(missing_ok=True)
            write_json(checkpoint / SUMS_NAME, self._sums())
            if (
                self._folder / SETTINGS_NAME
            ).is_file():  # another run may be told to resume from it
                copy_file(self._folder / SETTINGS_NAME, checkpoint / SETTINGS_NAME)
            sync_tree(checkpoint)
            files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
            digests = {str(path.relative_to(checkpoint)): file_sha256(path) for path in files}
            write_json(checkpoint / DIGESTS_NAME, digests)
            sync_folder(checkpoint)
            sync_folder(self._folder)
            older = (each for each in _checkpoints(self._folder) if _step(each) < state.global_step)
            for old in sorted(older, key=_step)[: -self._limit + 1 or None]:
                shutil.rmtree(old)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put back what was added up; take no step more where all were taken before the run ended.

        Later checkpoints that were being written, or are damaged, are removed: what is left in their folders
        would be among the files of those that are to be written there.
        """
        for checkpoint in _checkpoints(self._folder):
            if _step(checkpoint) > state.global_step and damage(checkpoint) is not None:
                shutil.rmtree(checkpoint)
        if state.global_step >= state.max_steps:  # the Trainer asks that after a step alone
            self.trainer._run_epoch = _no_epoch
            control.should_training_stop = True
        if self._resumed is None or not (self._resumed / SUMS_NAME).is_file():
            return
        sums, trainer = read_json(self._resumed / SUMS_NAME), self.trainer
        trainer._tr_loss += sums["loss"]
        trainer._initial_global_step = 0  # the mean loss is of all steps
        for name in NUMBERS:
            if name in sums and hasattr(trainer, name):
                setattr(trainer, name, sums[name])
        for name, values in sums["metrics"].items():
            trainer._metrics["train"][name] = values

    def _sums(self) -> dict[str, Any]:
        trainer, own = self.trainer, getattr(self.trainer, "_metrics", {})
        return {
            "loss": float(trainer._tr_loss),
            **{name: getattr(trainer, name) for name in NUMBERS if hasattr(trainer, name)},
            "metrics": dict(own.get("train", {})),
        }


def _no_epoch(**_: Any) -> None:
    """Stand in for an epoch of the Trainer's."""


def _checkpoints(folder: Path) -> list[Path]:
    return [each for each in folder.glob("checkpoint-*") if re.fullmatch(r"\w+-\d+", each.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
