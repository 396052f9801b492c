"""The plan of one setting: every stage's memory, line by line.

A stage says which lines describe it (`Planned`): the methods here are those of compress, train, correct and
merge, which stages of plugins may take as well, or bring their own. Beside them: inference of the base with
the corrected LoRA, LoRA on the base, QLoRA on the base, and inference of the base.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from emloc.compression.groups import CompressionPlan
from emloc.config import CalibrationOptions, PlanConfig, PolishConfig
from emloc.extend.plugin_options import with_plugin_options
from emloc.formats.coded_matrix import CodedMatrix
from emloc.linalg.convolution import matrix_shape
from emloc.linalg.row_weights import FULL_BELOW, row_weights_bytes
from emloc.planning.calls import (
    Calls,
    Matrices,
    adding_elements,
    calibration_calls,
    folding_elements,
)
from emloc.planning.family import OtherModel
from emloc.planning.inference import inference_lines
from emloc.planning.ledger import Lines, StageMemory, largest, lines_of
from emloc.planning.operations import Layer
from emloc.planning.propagation import kept_inputs, propagating_lines
from emloc.planning.qlora import quantised_model
from emloc.planning.slack import slack
from emloc.planning.step import Instant, StepSizes
from emloc.planning.streaming import compress_lines, correct_lines, merge_lines
from emloc.planning.subject import Subject
from emloc.planning.training import (
    Trained,
    lora_itemsize,
    lora_shapes,
    planned_step,
    training_lines,
)
from emloc.planning.whole import Shapes, untied_parameters
from emloc.streaming.coded_blocks import GROUP_SIZE

RESIDENT = ("weights", "LoRA", "modules to save", "block in float32", "head in float32")
"""Lines of what stays as it is; the others come and go, and an allocator has slack for them."""

TRAINING = "a training step"
"""The largest moment of training."""

CANDIDATES, CORRECTION_SAMPLES = 9, 32
"""Ways that `correct` tries by default, and samples that it tries them on."""

POLISH_SAMPLES: int = PolishConfig.model_fields["samples_per_step"].default
"""Samples of a step of `polish` by default."""


@dataclass
class Setting:
    """One setting of the options for a model.

    Attributes:
        options: of all stages.
        given: what an emulator that exists has compressed; by default what compress would.
        adapter: rank, d_out and d_in of the layers of a LoRA that exists; by default what train would adapt.
        adapter_bytes: of its file.
        adapter_whole: the parameters that it has whole.
        candidates: ways that correct runs on data at once; 0: none is.
        correction_samples: on which it does.
        in_few_bits: whether the LoRA was trained on the base in few bits, which correct makes anew.
    """

    subject: Subject
    options: PlanConfig
    given: CompressionPlan | None = None
    adapter: Matrices | None = None
    adapter_bytes: int = 0
    adapter_whole: Shapes = field(default_factory=dict[str, tuple[int, ...]])
    candidates: int = CANDIDATES
    correction_samples: int = CORRECTION_SAMPLES
    in_few_bits: bool = False
    _made: "dict[Planned, StageMemory]" = field(
        default_factory=dict["Planned", StageMemory], init=False
    )
    _known: dict[Any, Calls | None] = field(default_factory=dict[Any, "Calls | None"])

    @cached_property
    def emulator(self) -> CompressionPlan:
        """The layers that are emulated."""
        return self.compressed.guessed

    @property
    def bits_per_weight(self) -> float:
        """Bits that stand for a weight of the layers that compress looks at."""
        return self.subject.bits_per_weight(self.compressed, self.options.dtype)

    @cached_property
    def compressed(self) -> CompressionPlan:
        """The layers that compress looks at."""
        if self.given is not None:
            return self.given
        return self.subject.emulator(self.options)

    @cached_property
    def _step(self) -> tuple[StepSizes | None, Mapping[str, Layer], str]:
        return planned_step(self.subject, self.emulator.groups, self.options, self.emulator.tables)

    @cached_property
    def _base_step(self) -> tuple[StepSizes | None, Mapping[str, Layer], str]:
        return planned_step(self.subject, (), self.options)

    @property
    def counted_by(self) -> str:
        """The way by which activations were counted."""
        return self._step[2]

    @property
    def on_gpu(self) -> bool:
        """Return whether a GPU computes."""
        return self.options.device.startswith("cuda")

    @cached_property
    def learnt(self) -> int:
        """Bytes of the adapter as it is saved."""
        return self._trained_of(self._step[1]).bytes if self.adapter is None else self.adapter_bytes

    def _trained_of(self, layers: Mapping[str, Layer]) -> Trained:
        """The tensors that training changes, given the layers with their LoRA."""
        itemsize = self.subject.itemsize(self.options.dtype)
        whole = [matrix_shape(shape or (1,)) for shape in self._whole.values()]
        return Trained(lora_shapes(layers, self.options), lora_itemsize(itemsize), whole, itemsize)

    @cached_property
    def _whole(self) -> Shapes:
        return self.subject.whole(self.options) if self.adapter is None else self.adapter_whole

    def stage(self, planned: "Planned") -> StageMemory:
        """The memory of a stage, worked out once."""
        if planned not in self._made:
            self._made[planned] = planned(self)
        return self._made[planned]

    @cached_property
    def beside(self) -> Mapping[str, StageMemory]:
        """The memory that other ways take."""
        return {
            "LoRA on the base": self._trained(self._base_weights, *self._base_step[:2], 0),
            "streamed LoRA on the base": with_options(self, stream=True).train(),
            "QLoRA on the base": self.qlora(),
            "polish": self.polish(),
            "inference of the base": self._running({}),
        }

    def inference(self) -> StageMemory:
        """The base with the corrected LoRA."""
        return self._running({"LoRA": self.learnt})

    def _running(self, lora: Lines) -> StageMemory:
        return self._place({**self._inference, **lora}, {}, {}, "")

    @cached_property
    def _inference(self) -> Lines:
        return inference_lines(self.subject, self.options)

    def compress(self) -> StageMemory:
        """Stream the base once."""
        options = self.options
        calls = self._calls(options)
        propagated = options.propagate_errors
        written = self.subject.itemsize(options.dtype)
        # Where sizes are allocated after the pass, it writes the largest that they may become.
        wide = self.compressed.with_forms({g.owner: g.fitted for g in self.compressed.groups})
        lines_of_pass = propagating_lines if propagated else compress_lines
        lines, moment = lines_of_pass(self.subject, wide, calls, written, options.device)
        if options.weigh_errors == "gradients":
            roots = (row_weights_bytes(group.shape.d_out) for group in self.compressed.groups)
            lines = {**lines, "weights_of_rows": max(roots, default=0)}
            weighing = self._weighing(calls)
            if sum(weighing.values()) > sum(lines.values()):
                lines, moment = weighing, "gradients of a block"
        given = calls.count * calls.batch if calls and self.on_gpu else 0  # else the calls' own
        emulator = self.subject.emulator_bytes(self.emulator, options.dtype)
        disk = lines_of(
            emulator=emulator,
            until_layers_are_cut=self.subject.emulator_bytes(wide.guessed, options.dtype)
            - emulator,
            other_models=self._companions,
        )
        host = lines_of(
            calibration_batches=given,
            suspended_calls=calls.waiting if calls else 0,
            inputs_of_layers=kept_inputs(self.subject, wide, calls) * (propagated and self.on_gpu),
        )
        return self._after_encoding(lines, host, disk, moment)

    def _weighing(self, calls: Calls | None) -> Lines:
        """The pass back over a block: its activations, gradients of what it gave, and their moments."""
        options = self.options.model_copy(
            update={
                "gradient_checkpointing": True,
                "per_device_train_batch_size": self.options.calibration_batch_size,
            }
        )
        step, _, _ = planned_step(self.subject, (), options)
        instant = step.largest if step else Instant()
        sizes = {
            block: sum(
                shape.rows**2 if shape.rows < FULL_BELOW else shape.rows
                for group in self.compressed.within(block)
                for shape in group.shape.singles()
            )
            for block in self.subject.kinds
        }
        suspended = max(
            (calls.behind(tuple(calls.at(*block))) for block in self.subject.kinds.items())
            if calls
            else (),
            default=0,
        )
        return lines_of(
            weights=2 * self.subject.largest_unit * 4,
            suspended_calls=2 * suspended,
            moments=4 * max(sizes.values(), default=0),
            activations=instant.kept,
            logits_and_loss=instant.loss,
            working_tensors=instant.working,
        )

    def train(self) -> StageMemory:
        """A LoRA on the emulator; with `stream`, on the base block by block."""
        if self.options.stream:
            return self._streamed()
        weights = self.subject.emulator_bytes(self.emulator, self.options.dtype)
        return self._trained(weights, *self._step[:2], 0)

    def polish(self) -> StageMemory:
        """A step of polishing: `POLISH_SAMPLES` go through the base, block by block."""
        batch = min(self.options.per_device_train_batch_size, POLISH_SAMPLES)
        steps = -(-POLISH_SAMPLES // batch)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        return with_options(self, stream=True, **options).train()

    def _streamed(self) -> StageMemory:
        """One unit computes while another one is read; what enters blocks is kept for all micro-batches."""
        options = self.options.model_copy(update={"gradient_checkpointing": True})
        step, layers, _ = planned_step(self.subject, (), options)
        itemsize = self.subject.itemsize(self.options.dtype)
        memory = self._trained(2 * self.subject.largest_unit * itemsize, step, layers, 0)
        # Of one micro-batch they are among what autograd keeps.
        inputs = (self.options.gradient_accumulation_steps - 1) * (step.largest.kept if step else 0)
        from_ram, on_disk = self.options.stream_from == "ram", self.options.stream_inputs == "disk"
        beside = lines_of(
            blocks_in_ram=self._waiting * from_ram,
            inputs_of_blocks=inputs * (not on_disk),
        )
        disk = {**memory.disk, **lines_of(inputs_of_blocks=inputs * on_disk)}
        if self.on_gpu:
            return replace(memory, host={**memory.host, **beside}, disk=disk)
        return replace(memory, device={**memory.device, **beside}, disk=disk)

    @property
    def _waiting(self) -> int:
        """Bytes of the base's weights that wait in memory, those of blocks' layers in few bits if asked."""
        subject, bits = self.subject, self.options.stream_bits
        stored = sum(subject.unit_sizes) * subject.stored.itemsize
        if bits is None:
            return stored
        layers = [subject.shapes[name] for name in subject.inside if name in subject.shapes]
        dense = sum(rows * columns for rows, columns in layers) * subject.stored.itemsize
        matrices = [CodedMatrix(rows, columns, bits, GROUP_SIZE) for rows, columns in layers]
        tensors = [kind for matrix in matrices for _, kind in matrix.stored()]
        coded = sum(
            torch.Size(shape).numel() * (dtype or torch.uint8).itemsize for shape, dtype in tensors
        )
        return stored - dense + coded

    @property
    def _base_weights(self) -> int:
        """Bytes of the base's weights as training holds them."""
        return self.subject.weight_bytes(self.options.dtype)

    def _trained(
        self, weights: int, step: StepSizes | None, layers: Mapping[str, Layer], work: int
    ) -> StageMemory:
        options = self.options
        trained = self._trained_of(layers)
        lines = dict(training_lines(weights, trained, step, options))
        if work:
            lines["dequantised layer"] = work
        resumable = trained.bytes + lines.get("optimiser", 0)
        disk = lines_of(adapter=trained.bytes, checkpoints=options.save_total_limit * resumable)
        return self._after_encoding(lines, {}, disk, TRAINING)

    def qlora(self) -> StageMemory:
        """LoRA on the base in NF4."""
        step, layers, _ = self._base_step
        linears = [name for name in layers if name in self.subject.inside]
        held, work = quantised_model(self.subject, linears)
        return self._trained(held, step, layers, work)

    def correct(self) -> StageMemory:
        """Choose a limit on calibration samples, then fit one layer after another."""
        samples = min(self.correction_samples, self.options.num_calibration_samples)
        options = self.options.model_copy(update={"num_calibration_samples": samples})
        count = self.candidates
        calls = self._calls(options, count) if count else None
        lines, moment = correct_lines(
            self.subject, calls, self._lora, count, self._head, options.device, self.in_few_bits
        )
        given = calls.count // count * calls.batch if calls and self.on_gpu else 0
        disk = lines_of(adapter=self.learnt)
        host = lines_of(calibration_batches=given, suspended_calls=calls.waiting if calls else 0)
        return self._after_encoding(lines, host, disk, moment)

    def _calls(self, options: PlanConfig, candidates: int | None = None) -> Calls | None:
        """The suspended calls of correct's candidates, or of compress, which folds moments.

        They depend on the options of data and of calibration alone, and on what a format folds.
        """
        names = {
            *with_plugin_options(CalibrationOptions).model_fields,
            "format",
            "propagate_errors",
        }
        key = candidates, options.model_dump_json(include=names)
        if key not in self._known:
            if candidates is None:
                watched = folding_elements(self.subject.model, self.compressed)
            else:
                watched = adding_elements(self._lora)
            count = candidates or (2 if options.propagate_errors else 1)  # base and emulator
            self._known[key] = calibration_calls(self.subject, options, watched, count)
        return self._known[key]

    def merge(self) -> StageMemory:
        """Tensor by tensor, on the CPU whatever the device."""
        lines = merge_lines(self.subject, self._lora, self._whole)
        host = {**lines, **slack("cpu", sum(lines.values()))}
        changed = [*(f"{name}.weight" for name in self._lora), *self._whole]
        apart = untied_parameters(self.subject.model, changed).values()
        added = sum(torch.Size(shape).numel() for shape in apart) * self.subject.stored.itemsize
        disk = lines_of(merged_model=self.subject.bytes + added, other_models=self._companions)
        return StageMemory({}, host, disk) if self.on_gpu else StageMemory(host, {}, disk)

    @cached_property
    def _lora(self) -> Matrices:
        if self.adapter is not None:
            return self.adapter
        return {
            name: (layer.lora_rank, layer.d_out, layer.d_in)
            for name, layer in self._step[1].items()
            if layer.lora_rank
        }

    @cached_property
    def _head(self) -> tuple[int, int] | None:
        """The layer outside of blocks with most outputs: where there is one, logits come of it."""
        outside = [
            shape for name, shape in self.subject.shapes.items() if name not in self.subject.inside
        ]
        return max(outside, default=None)

    @cached_property
    def _others(self) -> Mapping[str, OtherModel]:
        family = self.subject.planned
        return family.other_models(self.subject.checkpoint, self.options) if family else {}

    @property
    def _companions(self) -> int:
        """Bytes of the files of other models, which are copied along."""
        parameters = sum(model.parameters for model in self._others.values())
        return parameters * self.subject.stored.itemsize

    def _after_encoding(self, lines: Lines, host: Lines, disk: Lines, moment: str) -> StageMemory:
        """A stage that other models encode the data for, one after another, before it begins."""
        encoding = largest([lines_of(**{name: m.running}) for name, m in self._others.items()])
        if sum(encoding.values()) > sum(lines.values()):
            return self._place(encoding, host, disk, "encoding the data")
        return self._place(lines, host, disk, moment)

    def _place(self, lines: Lines, host: Lines, disk: Lines, moment: str) -> StageMemory:
        """Add slack; where the CPU computes, the machine's memory is the device's."""
        moving = sum(count for name, count in lines.items() if name not in RESIDENT)
        device = {**lines, **slack(self.options.device, moving, moment == TRAINING)}
        if not self.on_gpu:
            device, host = {**device, **host}, {}
        return StageMemory(device, host, disk, moment)


Planned = Callable[[Setting], StageMemory]
"""The memory of a stage, given a setting; the planner's own are methods, such as `Setting.train`."""

Stages = Mapping[str, Planned]
"""Stages by name, in order."""


def with_options(setting: Setting, **changed: Any) -> Setting:
    """The same model with other options."""
    return replace(setting, options=setting.options.model_copy(update=changed))
