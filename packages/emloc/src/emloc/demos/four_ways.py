"""Base, LoRA on the base, EMLoC without correction, EMLoC: the same data and options for all four.

Every stage that makes something runs in a process of its own, through the command line that a user
would type: so peak memory is the stage's alone, and the folder shows what the commands write.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.demos.report import Row
from emloc.errors import EmlocError
from emloc.machine.progress import headline

Options = Mapping[str, Any]


@dataclass(frozen=True)
class FourWays:
    """One comparison; stages that are complete in `out` are not run again.

    Attributes:
        base: the model's folder or hub id.
        out: where everything goes.
        train_data, test_data: what is trained on, what is scored.
        data: options of every stage that reads data.
        compress, train, correct, evaluate: options of each stage.
    """

    base: str
    out: Path
    train_data: str
    test_data: str
    data: Options = field(default_factory=dict[str, Any])
    compress: Options = field(default_factory=dict[str, Any])
    train: Options = field(default_factory=dict[str, Any])
    correct: Options = field(default_factory=dict[str, Any])
    evaluate: Options = field(default_factory=dict[str, Any])

    @property
    def adapters(self) -> Mapping[str, Path | None]:
        """The adapter of each row, by the row's name."""
        return {
            "base": None,
            "lora": self.out / "lora_on_base",
            "uncorrected": self.out / "adapter",
            "emloc": self.out / "corrected",
        }

    def make(self) -> None:
        """Emulator, adapter, corrected adapter, and the LoRA on the base."""
        data = {**self.data, "dataset": self.train_data}
        emulator, adapter = self.out / "emulator", self.out / "adapter"
        run_stage("compress", emulator, model_name_or_path=self.base, **data, **self.compress)
        run_stage("train", adapter, emulator=emulator, **data, **self.train)
        run_stage("correct", self.out / "corrected", adapter=adapter, emulator=emulator, **data,
                  **self.correct)  # fmt: skip
        run_stage("train", self.out / "lora_on_base", model_name_or_path=self.base, **data,
                  **self.train)  # fmt: skip

    def score(self) -> dict[str, dict[str, Any]]:
        """The result of `evaluate`, by the row's name."""
        scores: dict[str, dict[str, Any]] = {}
        known = {name: value for name, value in self.data.items() if name != "seed"}
        for name, adapter in self.adapters.items():
            headline("evaluate", name)
            scores[name] = emloc.evaluate(
                model_name_or_path=self.base,
                adapter=None if adapter is None else str(adapter),
                dataset=self.test_data,
                output_dir=self.out / "evaluation" / name,
                **known,
                **self.evaluate,
            )
        return scores

    def rows(
        self, scores: Mapping[str, Mapping[str, Any]], measure: str = "exact_match"
    ) -> list[Row]:
        """The table's rows; `measure` is the score's key in `scores`."""
        measured = {
            name: Manifest.read(folder)
            for name, folder in {**self.adapters, "emulator": self.out / "emulator"}.items()
            if folder is not None
        }
        peak = {name: manifest.measured["peak_bytes"] for name, manifest in measured.items()}
        peaks = {
            "base": scores["base"]["peak_bytes"],
            "lora": peak["lora"],
            "uncorrected": max(peak["emulator"], peak["uncorrected"]),
            "emloc": max(peak["emulator"], peak["uncorrected"], peak["emloc"]),
        }
        trained = {"lora": "lora", "uncorrected": "uncorrected", "emloc": "uncorrected"}
        rows: list[Row] = []
        for name in self.adapters:
            manifest = measured[trained[name]] if name in trained else None
            rows.append(
                Row(
                    name=name,
                    score=scores[name][measure],
                    measure=measure,
                    loss=scores[name]["loss"],
                    train_weight_bytes=manifest.summary["train_weight_bytes"] if manifest else 0,
                    peak_bytes=peaks[name],
                    seconds_per_step=manifest.measured["seconds_per_step"] if manifest else None,
                )
            )
        return rows

    def correction(self) -> dict[str, Any]:
        """The limit that was chosen, and the losses it was chosen by."""
        return Manifest.read(self.out / "corrected").summary


def run_stage(name: str, output_dir: Path, **options: Any) -> None:
    """Run one command; its progress is shown, its refusal is ours.

    Raises:
        EmlocError: the command failed, with its exit code.
    """
    command = [sys.executable, "-m", "emloc", name, "--output_dir", str(output_dir)]
    for key, value in options.items():
        if isinstance(value, bool):  # a flag of the command line
            command.append(f"--{key}" if value else f"--no_{key}")
        else:
            command += [f"--{key}", str(value)]
    headline(name, f"→ {output_dir.name}")
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        failure = EmlocError(f"It stopped in emloc {name}; the reason stands above.")
        failure.exit_code = code
        raise failure
