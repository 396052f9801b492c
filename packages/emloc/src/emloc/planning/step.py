"""The memory that a training step holds besides weights, LoRA, gradients and optimiser, and its largest
instant.

A step passes through phases, each with a largest instant of its own: the forward through the blocks, the
loss, and the backward. Whichever is largest counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from emloc.planning.tape import Sized, Tape

FLOAT32 = 4


@dataclass(frozen=True)
class Precision:
    """Bytes per element.

    Attributes:
        weights: of the frozen weights, and of activations without autocast.
        lora: of the LoRA; PEFT keeps those of half-precision models in float32.
        autocast: whether matrix products run in bfloat16, whatever they are given.
    """

    weights: int
    lora: int = FLOAT32
    autocast: bool = False

    @property
    def product(self) -> int:
        """The bytes of an element that a matrix product writes."""
        return 2 if self.autocast else self.weights

    @property
    def fuses(self) -> bool:
        """Return whether a LoRA on a low-rank layer runs without passes in between (`fused_lora`)."""
        return self.autocast or self.lora == self.weights


@dataclass(frozen=True)
class Instant:
    """Bytes alive at one time.

    Attributes:
        kept: what autograd keeps for the backward.
        loss: logits, and what the loss makes of them.
        working: what the operations of that time hold.
    """

    kept: int = 0
    loss: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.kept + self.loss + self.working


BlockKind = Any
"""The common features of equal blocks; None stands for any block."""


class Passing(NamedTuple):
    """One call of a forward at a block.

    Attributes:
        before, after: bytes alive when it is about to enter, and when it stands before what comes next.
        peak: the most in between.
    """

    before: int
    peak: int
    after: int


@dataclass(frozen=True)
class StepSizes:
    """The largest instant of each phase of a step, and what a forward without gradients holds at blocks.

    Attributes:
        phases: by name.
        blocks: passages through blocks, by their kind.
        at_head: bytes alive when the blocks are left and the head is yet to come; None without a head.
    """

    phases: Mapping[str, Instant] = field(default_factory=dict[str, Instant])
    blocks: Mapping[BlockKind, Sequence[Passing]] = field(
        default_factory=dict[BlockKind, "Sequence[Passing]"]
    )
    at_head: int | None = None

    @property
    def largest(self) -> Instant:
        """The largest of all."""
        return max(self.phases.values(), key=lambda instant: instant.total, default=Instant())


@dataclass(frozen=True)
class StepOptions:
    """Options of a training step.

    Attributes:
        precision: of weights, LoRA and products.
        checkpointing: whether blocks run twice instead of keeping their activations.
        on_gpu: whether the GPU's fused kernels are there.
        streamed: whether weights are there while their module is called, and no longer.
    """

    precision: Precision
    checkpointing: bool = False
    on_gpu: bool = False
    streamed: bool = False


class StepTape(Tape):
    """A tape that remembers the phases.

    Call `reach_block` before each block, `reach_loss` when they are done, `reach_head` when what only the
    blocks need is let go, then `finish` with the loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self._phases: dict[str, Instant] = {}
        self._kept = 0
        self._before_loss = 0
        self._blocks: dict[BlockKind, list[Passing]] = {}
        self._at: tuple[BlockKind, int] | None = None
        self._passed = 0
        self._at_head: int | None = None

    def reach_block(self, kind: BlockKind) -> None:
        """A forward that is not recorded may be suspended here."""
        if self.recorded or self._phases:
            return
        self._leave_block()
        self._at = (kind, self.now)

    def _leave_block(self) -> None:
        """Each passage has a peak of its own."""
        if self._at is not None:
            kind, before = self._at
            self._blocks.setdefault(kind, []).append(Passing(before, self.peak, self.now))
        self._at = None
        self._passed, self.peak = max(self._passed, self.peak), self.now

    def reach_loss(self) -> None:
        """The blocks are done: what is alive now is kept for the backward."""
        self._kept, self._before_loss = self.now, self.recorded
        if not self.recorded:
            self._leave_block()
        self._close("forward")

    def reach_head(self) -> None:
        """Note that the head is reached, and what candidates share."""
        self._at_head = self.now

    def finish(self, loss: Sized) -> StepSizes:
        """Go back from the loss; without a gradient, there is nothing to go back to."""
        if loss.key is not None:
            gradients = self.begin_backward(loss)
            self.go_back(gradients, self._before_loss)
            self._close("loss", as_loss=True)
            self.go_back(gradients, 0)
            self._close("backward")
        else:
            self._close("loss", as_loss=True)
        return StepSizes(dict(self._phases), dict(self._blocks), self._at_head)

    def _close(self, phase: str, as_loss: bool = False) -> None:
        peak = max(self.peak, self._passed)
        kept = min(self._kept, peak)
        rest = peak - kept
        self._phases[phase] = Instant(kept, rest if as_loss else 0, 0 if as_loss else rest)
        self.peak, self._passed = self.now, 0
