"""Base, LoRA on the base, QLoRA, EMLoC without correction, EMLoC: the same data and options for all.

Every stage that makes something runs in a process of its own, through the command line that a user
would type: so peak memory is the stage's alone, and the folder shows what the commands write.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.config import DemoConfig
from emloc.demos.qlora import LIGHT, TRAINED, left_out_because, make_qlora
from emloc.demos.report import Row
from emloc.errors import EmlocError
from emloc.extend.methods import Task
from emloc.machine.progress import console, headline

Options = Mapping[str, Any]

FOLDERS = {
    "base": (),
    "lora": ("lora_on_base",),
    "qlora": (LIGHT, TRAINED),
    "uncorrected": ("emulator", "adapter"),
    "emloc": ("emulator", "adapter", "corrected"),
}
"""The artefacts whose making a row's memory and time are of."""


@dataclass(frozen=True)
class Comparison:
    """One of them; stages that are complete in `out` are not run again.

    Attributes:
        base: the model's folder or hub id.
        out: where everything goes.
        train_data, test_data: what is trained on, what is scored.
        data: options of every stage that reads data.
        compress, train, correct, evaluate: options of each stage; a `dataset` of correct is its own.
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

    @cached_property
    def without_qlora(self) -> str:
        """The reason for which there is no row of QLoRA; empty where there is one."""
        return left_out_because(self.base)

    @property
    def adapters(self) -> Mapping[str, Path | None]:
        """The adapter of each row, by the row's name."""
        qlora = {} if self.without_qlora else {"qlora": self.out / "qlora"}
        return {
            "base": None,
            "lora": self.out / "lora_on_base",
            **qlora,
            "uncorrected": self.out / "adapter",
            "emloc": self.out / "corrected",
        }

    def make(self) -> None:
        """Emulator, adapter, corrected adapter, the LoRA on the base, and that of QLoRA."""
        data = {**self.data, "dataset": self.train_data}
        emulator, adapter = self.out / "emulator", self.out / "adapter"
        run_stage("compress", emulator, model_name_or_path=self.base, **data, **self.compress)
        run_stage("train", adapter, emulator=emulator, **data, **self.train)
        run_stage("correct", self.out / "corrected", adapter=adapter, emulator=emulator,
                  **{**data, **self.correct})  # fmt: skip
        run_stage("train", self.out / "lora_on_base", model_name_or_path=self.base, **data,
                  **self.train)  # fmt: skip
        if self.without_qlora:
            console.print(f"QLoRA is left out of the table: {self.without_qlora}.")
            return

        def train(light: Path, adapter: Path) -> None:
            run_stage("train", adapter, emulator=light, **data, **self.train)

        seed, calibrated = int(data.get("seed", 0)), {k: v for k, v in data.items() if k != "seed"}
        task = Task(self.base, 1.0, seed, compress=calibrated, train=self.train, correct={})
        make_qlora(task, self.out, train)

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
                allow_mismatch=name == "uncorrected",
                output_dir=self.out / "evaluation" / name,
                **known,
                **self.evaluate,
            )
        return scores

    def rows(
        self, scores: Mapping[str, Mapping[str, Any]], measure: str = "exact_match"
    ) -> list[Row]:
        """The table's rows; `measure` is the score's key in `scores`."""
        rows: list[Row] = []
        for name in self.adapters:
            made = [Manifest.read(self.out / folder) for folder in FOLDERS[name]]
            manifest = next((m for m in made if "train_weight_bytes" in m.summary), None)
            peaks = [one.measured["peak_bytes"] for one in made]
            rows.append(
                Row(
                    name=name,
                    score=scores[name][measure],
                    measure=measure,
                    loss=scores[name]["loss"],
                    train_weight_bytes=manifest.summary["train_weight_bytes"] if manifest else 0,
                    peak_bytes=max(peaks) if peaks else scores[name]["peak_bytes"],
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
        failure = EmlocError(f"It stopped in emloc {name}; the reason is shown above.")
        failure.exit_code = code
        raise failure


def size_of(config: DemoConfig) -> dict[str, Any]:
    """The emulator's size as options of compress; none: its own default."""
    asked = {name: getattr(config, name) for name in ("keep_ratio", "bits_per_weight")}
    return {name: value for name, value in asked.items() if value is not None}
