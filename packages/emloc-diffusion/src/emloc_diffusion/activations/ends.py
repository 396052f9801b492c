"""The parts that denoisers share: a micro-batch in sizes, and the squared error at the end."""

from emloc.extend.family import Batch
from emloc.planning.operations import Forward
from emloc.planning.step import FLOAT32, StepSizes
from emloc.planning.tape import Sized


def batch_sizes(forward: Forward, batch: Batch) -> list[Sized]:
    """The tensors of a micro-batch, in the weights' dtype, as the trainer hands them over."""
    return [
        forward.tape.new(tensor.numel(), forward.precision.weights) for tensor in batch.values()
    ]


def squared_error(forward: Forward, predicted: Sized) -> StepSizes:
    """The mean squared error in float32, and the way back from it."""
    tape = forward.tape
    predicted = forward.cast(predicted, FLOAT32)
    error = forward.new(predicted)
    del predicted
    squares = forward.new(error, error)
    del error
    loss = tape.operation([squares], tape.new(1, FLOAT32))
    del squares
    return tape.finish(loss)
