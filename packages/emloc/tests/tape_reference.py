"""Bytes of a function of tensors, counted in torch and by the tape's arithmetic."""

import torch
from torch import nn

from emloc.planning.live import LiveBytes
from emloc.planning.operations import Forward
from emloc.planning.step import Precision, StepTape

ROWS, WIDTH = 30, 24


def counted(run, *sizes, dtype=torch.float32):
    """Bytes alive after `run` and its peak, then the peak of going back; torch and real tensors."""
    given = [torch.zeros(size, dtype=dtype, requires_grad=True) for size in sizes]
    weights = run.parameters() if isinstance(run, nn.Module) else []
    with LiveBytes() as live:
        live.mark([*given, *weights], "given")
        before = live.now
        with live.phase("forward"):
            out = run(*given)
        after = live.now
        with live.phase("backward"):
            out.backward(torch.zeros_like(out))
    return [n - before for n in (after, *(peak.total for peak in live.phases.values()))]


def sized(run, *sizes, itemsize=4):
    """The same by arithmetic."""
    forward = Forward(StepTape(), Precision(itemsize))
    tape = forward.tape
    made = [tape.wanting_gradient(tape.new(torch.Size(size).numel(), itemsize)) for size in sizes]
    before, tape.peak = tape.now, 0
    out = run(forward, *made)
    after, peak = tape.now - before, tape.peak - before
    tape.peak = tape.now
    gradients = tape.begin_backward(out)
    held = [*gradients.values()]  # as torch does where it is given from outside
    tape.go_back(gradients, 0)
    del held
    return [after, peak, tape.peak - before]
