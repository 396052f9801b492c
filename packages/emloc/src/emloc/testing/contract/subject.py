"""A family with an example of its kind, and the artefacts of all stages, made when first asked for."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import CompressConfig, EvaluateConfig, build
from emloc.extend.capabilities import native_of
from emloc.extend.family import Batch, ModelFamily
from emloc.extend.plugin_options import of_family, with_family_options, with_plugin_options
from emloc.extend.plugins import family_named
from emloc.options.compress import AUTO, SIZING, default_size
from emloc.options.marks import loss_alone

HELD = {"memory": "1GiB"}
ON_CPU = {"device": "cpu"}

StageOptions = Mapping[str, Mapping[str, Any]]
"""Further options by the name of a stage."""


class Subject:
    """A family under test.

    Args:
        family: its name.
        folder: where artefacts go.
        example: options that name a model and data, which every stage accepts.
        stage_options: further ones by the name of a stage.
    """

    def __init__(
        self,
        family: str,
        folder: Path,
        example: Mapping[str, Any],
        stage_options: StageOptions | None = None,
    ) -> None:
        self.family: ModelFamily = family_named(family)
        self.folder, self.example, self._stage_options = folder, dict(example), stage_options or {}

    @property
    def data(self) -> dict[str, Any]:
        """The example without its model."""
        return {key: value for key, value in self.example.items() if key != "model_name_or_path"}

    def options(self, stage: str) -> dict[str, Any]:
        """Further options of a stage; an evaluation is of the loss alone."""
        short = loss_alone(with_family_options(EvaluateConfig, self.family))
        return {**(short if stage == "evaluate" else {}), **self._stage_options.get(stage, {})}

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The example's model, in the family's layout."""
        return native_of(self.family, Checkpoint.open(self.example["model_name_or_path"]))

    @property
    def skeleton(self) -> nn.Module:
        """The example's model without its weights."""
        return self.family.skeleton(self.checkpoint, torch.float32)

    def calibration(self, **options: Any) -> Sequence[Batch]:
        """Micro-batches of the example's data."""
        kind: type[CompressConfig] = with_plugin_options(CompressConfig)
        config = build(kind, {"output_dir": "unused", **self.example, **options}, "compress")
        return self.family.calibration_batches(self.checkpoint, of_family(config, self.family))

    @cached_property
    def batches(self) -> Sequence[Batch]:
        """Micro-batches of the example's data, as compress draws them by default."""
        return self.calibration()

    @property
    def compressed_to(self) -> dict[str, Any]:
        """Options of compress, the default budget unless the further ones have another.

        It is said, since a plan for a memory would choose it otherwise.
        """
        given = self.options("compress")
        sized = not given.keys().isdisjoint(SIZING)
        return given if sized else {**default_size(given.get("format", AUTO)), **given}

    def compress(self, output_dir: Path, **options: Any) -> Path:
        """An emulator of the example's model, made on the CPU within a GiB."""
        return emloc.compress(
            output_dir=output_dir, **{**self.example, **HELD, **ON_CPU, **options}
        )

    def train(self, output_dir: Path, **options: Any) -> Path:
        """An adapter that was trained for two steps, on the emulator unless `options` say otherwise."""
        steps = {
            "max_steps": 2, "logging_steps": 1, "save_steps": 1, "learning_rate": 1e-2, "lora_r": 3,
        }  # fmt: skip
        light = {} if "model_name_or_path" in options else {"emulator": str(self.emulator)}
        given = {**self.data, **HELD, **ON_CPU, **light, **steps, **self.options("train")}
        return emloc.train(output_dir=output_dir, **{**given, **options})

    def correct(self, output_dir: Path, **options: Any) -> Path:
        """The stages' adapter, corrected without a limit unless `options` say otherwise."""
        given = {"adapter": str(self.adapter), "emulator": str(self.emulator), "limit": "none"}
        given |= {**self.data, **HELD, **ON_CPU, **self.options("correct")}
        return emloc.correct(output_dir=output_dir, **{**given, **options})

    def evaluate(self, **options: Any) -> dict[str, Any]:
        """Scores on the example's data, of its model unless `options` name another one."""
        model = {"model_name_or_path": self.example["model_name_or_path"]}
        return emloc.evaluate(
            **{**model, **self.data, **ON_CPU, **self.options("evaluate"), **options}
        )

    @cached_property
    def emulator(self) -> Path:
        """The folder of the emulator."""
        return self.compress(self.folder / "emulator", **self.compressed_to)

    @cached_property
    def adapter(self) -> Path:
        """The folder of the adapter that was trained on it."""
        return self.train(self.folder / "adapter")

    @cached_property
    def corrected(self) -> Path:
        """The folder of the corrected adapter."""
        return self.correct(self.folder / "corrected")

    @cached_property
    def merged(self) -> Path:
        """The folder of the merged model."""
        adapter = str(self.corrected)
        return emloc.merge(adapter=adapter, output_dir=self.folder / "merged", **HELD)

    @property
    def stages(self) -> Mapping[str, Path]:
        """The folders of all stages, run through the public functions and held to a GiB.

        Their names: `emulator`, `adapter`, `corrected`, `merged`.
        """
        return {
            name: getattr(self, name) for name in ("emulator", "adapter", "corrected", "merged")
        }
