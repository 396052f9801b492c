"""A stage's memory as it was planned before it began, and kept to while it ran.

Made from the opened model and the stage's own options. A stage that cannot fit is refused before any work;
one that goes beyond its memory is stopped (`PeakMemory`), and the plan's lines say what was expected.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage
from typing import Any

import psutil
import torch

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.compression.groups import CompressionPlan, Group, dense_shapes, written_groups
from emloc.config import CompressConfig, CorrectConfig, PlanConfig, StageConfig, build
from emloc.correction.ways import candidates
from emloc.errors import MemoryLimitError
from emloc.extend.family import ModelFamily
from emloc.extend.plugin_options import of_family, with_plugin_options
from emloc.formats.vocabulary import VocabularyTable, tables_of
from emloc.linalg.convolution import matrix_shape
from emloc.machine.memory import format_bytes
from emloc.machine.memory_limit import can_limit
from emloc.machine.progress import console
from emloc.options.compress import SIZING
from emloc.planning.choices import choose
from emloc.planning.fitting import changed_for
from emloc.planning.ledger import Lines, StageMemory, total
from emloc.planning.memory_plan import MemoryPlan
from emloc.planning.report import ordered, verdict
from emloc.planning.setting import Planned, Setting, Stages
from emloc.planning.subject import Subject


@dataclass(frozen=True)
class Contract:
    """The memory that a stage was planned to take, and what it may.

    Attributes:
        stage: how it is called in messages.
        lines: that describe it.
        memory: bytes of the device that it may take.
    """

    stage: str
    lines: Planned
    setting: Setting
    memory: int

    @property
    def planned(self) -> StageMemory:
        """Line by line."""
        return self.setting.stage(self.lines)

    def require_room(self, folder: Path) -> None:
        """Refuse what cannot fit: in the memory allowed, in the machine's, or on the disk of `folder`.

        Raises:
            MemoryLimitError: with what would fit, where something would.
        """
        device, host, disk = (total(self.planned.lines(p)) for p in ("device", "host", "disk"))
        if device > self.memory:
            raise MemoryLimitError(
                f"{self.stage} needs {format_bytes(device)}, more than memory={self._allowed}; "
                f"{self._way_out()}\n{self._table()}"
            )
        on_gpu = self.setting.on_gpu
        if on_gpu:
            left = torch.cuda.mem_get_info(self.setting.options.device)[0]
            self._require(device, left, "of the card", "stop other programs on it")
        ram = host if on_gpu else device + host
        available = psutil.virtual_memory().available
        self._require(ram, available, "of the machine's memory", "close other programs")
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        place = f"of the disk of {existing}"
        self._require(disk, disk_usage(existing).free, place, "choose another output_dir")

    def _require(self, needed: int, left: int, of: str, what_to_do: str) -> None:
        if needed > left:
            raise MemoryLimitError(
                f"{self.stage} needs {format_bytes(needed)} {of}, of which {format_bytes(left)} are "
                f"free; {what_to_do}, or ask for less."
            )

    @contextmanager
    def kept(self) -> Generator[None]:
        """Add the plan to what is said when the stage goes beyond its memory."""
        if not can_limit(self.setting.options.device):
            console.print(
                f"{self.stage}: this system cannot limit a process's memory; it is only measured"
            )
        try:
            yield
        except MemoryLimitError as problem:
            planned = format_bytes(total(self.planned.device))
            raise MemoryLimitError(
                f"{self.stage} was stopped. {problem} The plan was {planned}. Pass more memory or a smaller "
                f"batch; finished work is kept.\n{self._table()}"
            ) from problem

    def report(self, measured: dict[str, Any]) -> None:
        """Say what was planned and what was measured, and add the former to the latter."""
        planned = total(self.planned.device)
        measured["planned_bytes"] = planned
        console.print(
            f"{self.stage}: planned {format_bytes(planned)}, measured "
            f"{format_bytes(measured['peak_bytes'])}, allowed {self._allowed}"
        )

    @property
    def _allowed(self) -> str:
        return format_bytes(self.memory)

    def _way_out(self) -> str:
        fitted = choose(self.setting, self.memory, {self.stage: self.lines}, asked=())
        if fitted.fits:
            options = changed_for(self.setting, fitted.setting)
            said = ", ".join(f"{name}={value}" for name, value in options.items())
            return f"it would fit with {said}."
        assert fitted.smallest is not None
        return f"with the smallest settings it needs {format_bytes(fitted.smallest)}."

    def _table(self) -> str:
        lines: Lines = self.planned.device
        rows = [f"  {name:<24}{format_bytes(lines[name]):>12}" for name in ordered(lines)]
        return "\n".join([*rows, f"  {'planned':<24}{format_bytes(total(lines)):>12}"])


def keeping(contract: Contract | None) -> AbstractContextManager[None]:
    """`Contract.kept`, where there is one."""
    return nullcontext() if contract is None else contract.kept()


def compress_contract(
    config: CompressConfig, base: Checkpoint, family: ModelFamily, stages: Stages
) -> tuple[CompressConfig, Contract]:
    """The options, with what the plan chose where nothing was asked for, and the contract.

    Args:
        stages: that will follow and have to fit, and compress itself.
    """
    assert config.memory is not None
    setting = Setting(
        Subject.opened(base, family), plan_options(config.device, base, family, config)
    )
    if config.model_fields_set.isdisjoint(SIZING):
        fitted = choose(setting, config.memory, stages)
        require_fit(fitted)
        console.print(f"compress: {' '.join(verdict(fitted.as_json()))}")
        options = fitted.setting.options
        chosen = changed_for(setting, fitted.setting)
        own = {name: value for name, value in chosen.items() if name in CompressConfig.model_fields}
        training = {name: value for name, value in chosen.items() if name not in own}
        if training:
            said = ", ".join(f"{name}={value}" for name, value in training.items())
            console.print(f"compress: the plan is for training with {said}")
        config = config.model_copy(update={**own, "keep_ratio": options.keep_ratio})
        setting = fitted.setting
    return config, _agreed("compress", Setting.compress, setting, config)


def contract_for(
    stage: str,
    lines: Planned,
    config: Any,
    model: Checkpoint,
    family: ModelFamily,
    adapter: Adapter | None = None,
) -> Contract:
    """The contract of a stage that works with a model as it is.

    Args:
        lines: that describe the stage.
        config: the stage's options, with `memory` and `output_dir`; without `device` it works on the CPU.
        model: a base, an emulator, another method's light model.
        adapter: that is there already.
    """
    subject, given = Subject.opened(model, family), dict[str, Any]()
    more = {} if adapter is None else _existing(adapter)
    if isinstance(config, CorrectConfig):
        more["candidates"] = _runs(config)
        more["in_few_bits"] = config.emulator is None
        more["correction_samples"] = config.num_calibration_samples
        given["num_calibration_samples"] = config.num_calibration_samples
    tables = _tables(model)
    given["embedding_bits"] = tables[0].bits if tables else None
    device: str = getattr(config, "device", "cpu")
    options = plan_options(device, model, family, config, **given)
    given_plan = CompressionPlan(_held(subject, model), {}, tables)
    setting = Setting(subject, options, given=given_plan, **more)
    if isinstance(config, CorrectConfig):
        setting = _in_groups(setting, lines, config.memory)
    return _agreed(stage, lines, setting, config)


def _runs(config: CorrectConfig) -> int:
    """The ways that correct runs on data at once: all, unless memory is short; 0: none is."""
    if config.strength is not None:
        return 1
    return len(candidates(config)) if config.limit == "auto" else 0


def _in_groups(setting: Setting, lines: Planned, memory: int | None) -> Setting:
    """The setting with as many ways at once as fit; the others go through later."""
    while (
        memory is not None
        and setting.candidates > 1
        and total(setting.stage(lines).device) > memory
    ):
        setting = replace(setting, candidates=setting.candidates - 1)
    return setting


def _held(subject: Subject, model: Checkpoint) -> tuple[Group, ...]:
    """The layers that an emulator has compressed; nothing of any other model."""
    manifest = Manifest.find(model.path)
    ours = manifest is not None and manifest.kind == "emulator" and manifest.method is None
    entries = manifest.layers if manifest is not None and ours else {}
    return tuple(written_groups(entries, dense_shapes(entries, subject.model)))


def _tables(model: Checkpoint) -> tuple[VocabularyTable, ...]:
    """Embeddings and heads that an emulator has in few bits."""
    manifest = Manifest.find(model.path)
    return tuple(tables_of(manifest.tables if manifest is not None else None))


def plan_options(
    device: str, model: Checkpoint, family: ModelFamily, *configs: StageConfig, **given: Any
) -> PlanConfig:
    """The options of a plan that stages were asked for; of two that name an option the later one wins."""
    kind: type[PlanConfig] = with_plugin_options(PlanConfig)
    asked = {
        name: getattr(config, name)
        for config in configs
        for name in sorted(config.model_fields_set)
        if name in kind.model_fields and name not in ("output_dir", "memory")
    }
    named = {"model_name_or_path": str(model.path), "device": device}
    return of_family(build(kind, {**asked, **given, **named}, "plan"), family)


def require_fit(fitted: MemoryPlan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        MemoryLimitError: with the least that would.
    """
    if not fitted.fits:
        assert fitted.dominating is not None
        lines = fitted.setting.stage(fitted.stages[fitted.dominating[0]]).device
        table = "\n".join(f"  {name:<24}{format_bytes(lines[name]):>12}" for name in ordered(lines))
        raise MemoryLimitError(f"{' '.join(verdict(fitted.as_json()))}\n{table}")


def _agreed(stage: str, lines: Planned, setting: Setting, config: Any) -> Contract:
    contract = Contract(stage, lines, setting, config.memory)
    contract.require_room(config.output_dir)
    return contract


def _existing(adapter: Adapter) -> dict[str, Any]:
    """The facts that a setting needs of an adapter that is there."""
    infos = adapter.tensors.tensors
    shapes = {key: matrix_shape(info.shape) for key, info in infos.items() if len(info.shape) > 1}
    return {
        "adapter": {
            layer.name: (layer.rank, shapes[layer.up_key][0], shapes[layer.down_key][1])
            for layer in adapter.layers
        },
        "adapter_bytes": sum(info.nbytes for info in infos.values()),
        "adapter_whole": {name: infos[key].shape for name, key in adapter.saved.items()},
    }
