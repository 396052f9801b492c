"""What a training step holds besides weights, LoRA, gradients and optimiser, and when it holds most.

A step passes through phases, each with a largest moment of its own: the forward through the blocks, the
loss, and the backward. Whichever is largest counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
        """Of what a matrix product writes."""
        return 2 if self.autocast else self.weights

    @property
    def fuses(self) -> bool:
        """Whether a LoRA on a low-rank layer runs without passes in between (`low_rank_lora`)."""
        return self.autocast or self.lora == self.weights


@dataclass(frozen=True)
class Moment:
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
        """Their sum."""
        return self.kept + self.loss + self.working


@dataclass(frozen=True)
class StepSizes:
    """The largest moment of each phase of a step.

    Attributes:
        phases: by name.
        between: the most that is alive between two blocks of a forward.
        rows: the most tokens, patches or pixels that a block reads.
    """

    phases: Mapping[str, Moment] = field(default_factory=dict[str, Moment])
    between: int = 0
    rows: int = 0

    @property
    def largest(self) -> Moment:
        """The largest of all."""
        return max(self.phases.values(), key=lambda moment: moment.total, default=Moment())


@dataclass(frozen=True)
class StepOptions:
    """How a step is run.

    Attributes:
        precision: of weights, LoRA and products.
        checkpointing: whether blocks run twice instead of keeping their activations.
        on_gpu: whether the GPU's fused kernels are there.
    """

    precision: Precision
    checkpointing: bool = False
    on_gpu: bool = False


class StepTape(Tape):
    """A tape that remembers the phases.

    Call `reach_block` before each block, `reach_loss` when they are done, then `finish` with the loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self._phases: dict[str, Moment] = {}
        self._kept = 0
        self._before_loss = 0
        self._between = self._rows = 0

    def reach_block(self, rows: int) -> None:
        """What is alive now is what a forward keeps that is suspended here."""
        self._between, self._rows = max(self._between, self.now), max(self._rows, rows)

    def reach_loss(self) -> None:
        """The blocks are done: what is alive now is kept for the backward."""
        self._kept, self._before_loss = self.now, self.recorded
        self._close("forward")

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
        return StepSizes(dict(self._phases), self._between, self._rows)

    def _close(self, phase: str, as_loss: bool = False) -> None:
        kept = min(self._kept, self.peak)
        rest = self.peak - kept
        self._phases[phase] = Moment(kept, rest if as_loss else 0, 0 if as_loss else rest)
        self.peak = self.now
