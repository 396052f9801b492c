"""The loss over a head's own logits, in sizes (`emloc.planning`)."""

from emloc.planning.operations import Forward
from emloc.planning.step import FLOAT32
from emloc.planning.tape import Sized, Storage


def logits_loss(forward: Forward, x: Sized, width: int, vocabulary: int, work: int = 0) -> Sized:
    """Logits of all tokens, and their cross-entropy in float32.

    Args:
        work: bytes of the head's rows that are made when they are multiplied.
    """
    tape, rows = forward.tape, x.numel // width
    logits = forward.dense(forward.product_input(x), width, vocabulary, work)
    wide = forward.cast(logits, FLOAT32)
    log_probs = tape.operation([wide], made := tape.new(rows * vocabulary, FLOAT32), [made])
    del wide, made
    targets = tape.new(2 * rows, 8)

    def back(_: list[Storage]) -> list[Storage]:
        return [Storage(tape, log_bytes)]

    log_bytes = log_probs.nbytes
    [loss] = tape.custom([log_probs], [tape.new(1, FLOAT32)], [log_probs, targets], back)
    return loss
