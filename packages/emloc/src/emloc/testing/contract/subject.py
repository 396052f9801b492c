"""A family with an example of its kind, and the artefacts of all stages, made when first asked for."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import CompressConfig, EvaluateConfig, build
from emloc.extend.capabilities import native_of
from emloc.extend.family import Batch, ModelFamily
from emloc.extend.plugin_options import of_family, with_family_options, with_plugin_options
from emloc.extend.plugins import family_named
from emloc.options.compress import AUTO, SIZING, default_size
from emloc.options.marks import loss_alone

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

    @cached_property
    def stages(self) -> Mapping[str, Path]:
        """The folders of all stages, run through the public functions and held to a GiB.

        Their names: `emulator`, `adapter`, `corrected`, `merged`.
        """
        memory, root = {"memory": "1GiB"}, self.folder
        emulator = emloc.compress(
            **{"output_dir": root / "emulator", **self.example, **memory}, **self.compressed_to
        )
        train = {
            "max_steps": 2, "logging_steps": 1, "save_steps": 1, "learning_rate": 1e-2, "lora_r": 3,
        }  # fmt: skip
        adapter = emloc.train(
            **{"emulator": str(emulator), "output_dir": root / "adapter", **self.data, **memory},
            **{**train, **self.options("train")},
        )
        corrected = emloc.correct(
            **{"adapter": str(adapter), "emulator": str(emulator), "limit": "none"},
            **{"output_dir": root / "corrected", **self.data, **memory},
            **self.options("correct"),
        )
        merged = emloc.merge(adapter=str(corrected), output_dir=root / "merged", **memory)
        return {"emulator": emulator, "adapter": adapter, "corrected": corrected, "merged": merged}
