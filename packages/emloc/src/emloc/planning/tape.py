"""A training step in sizes alone: what is alive after each operation, by arithmetic.

A model's forward is written down once more with `Sized` in place of tensors. A `Sized` has a number of
elements and the bytes of one; its storage counts as alive for as long as Python or the tape holds it,
exactly as a tensor's does, so a closed form reads like the model's own code. Each operation says what it
makes and what autograd keeps of it. `Tape.backward` goes through them in reverse, as autograd's engine
does: gradients come into being, are added up, and what was kept is let go. No tensor is ever made: a step
of a model of 70 billion parameters takes milliseconds.

Gradients of parameters are counted elsewhere, all of them: with gradient accumulation they are there from
the first micro-batch on, and what a micro-batch adds to them is let go at once.

A stack of n equal blocks need not be run n times. Forward, each block keeps the same number of bytes S;
backward, each lets S go. What is alive at the same point of block i is thus linear in i, and largest in the
last block: `repeat` runs the first two and the last, and counts those between as one operation that keeps S
for each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


class Storage:
    """Bytes that are alive until nobody holds this object."""

    __slots__ = ("_tape", "nbytes")

    def __init__(self, tape: "Tape", nbytes: int) -> None:
        self._tape, self.nbytes = tape, nbytes
        tape.now += nbytes
        tape.peak = max(tape.peak, tape.now)

    def __del__(self) -> None:
        self._tape.now -= self.nbytes


class Sized:
    """The known facts of a tensor.

    Attributes:
        storage: shared by views.
        numel: elements.
        itemsize: bytes of one.
        key: identifies the variable to the tape, views included; None where no gradient flows back to it.
    """

    __slots__ = ("itemsize", "key", "numel", "storage")

    def __init__(self, storage: Storage, numel: int, itemsize: int, key: int | None = None) -> None:
        self.storage, self.numel, self.itemsize, self.key = storage, numel, itemsize, key

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.itemsize


Backward = Callable[[list[Storage]], list[Storage]]
"""Makes the gradients of an operation's inputs of those of its outputs."""


Block = Callable[..., list[Sized]]
"""A part of a model that reads and makes the same number of tensors, of the same sizes."""

Gradients = dict[int, Storage]
"""Pending gradients, by variable: those that operations yet to be gone back through wait for."""


class _Node(NamedTuple):
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    saved: list[Any]
    backward: Backward


class Tape:
    """Records operations on sizes.

    Attributes:
        now: bytes alive.
        peak: the most that were.
    """

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._peak_when_kept = 0
        self._recording = True
        self._nodes: list[_Node] = []
        self._parameters: set[int] = set()
        self._leaves: list[Storage] = []
        self._keys = 0

    def new(self, numel: int, itemsize: int) -> Sized:
        """A tensor that no gradient flows to."""
        return Sized(Storage(self, numel * itemsize), numel, itemsize)

    def parameter(self, numel: int, itemsize: int) -> Sized:
        """A trainable parameter, whose own bytes do not count as alive."""
        made = self.wanting_gradient(Sized(Storage(self, 0), numel, itemsize))
        assert made.key is not None
        self._parameters.add(made.key)
        return made

    def wanting_gradient(self, x: Sized) -> Sized:
        """The same tensor, as a variable of its own that a gradient is wanted of."""
        self._keys += 1
        return Sized(x.storage, x.numel, x.itemsize, self._keys)

    def leaf(self, x: Sized) -> Sized:
        """The same tensor as one that a gradient is asked of by itself: the graph holds it to its end."""
        self._leaves.append(x.storage)
        return self.wanting_gradient(x)

    def work(self, *nbytes: int) -> None:
        """Bytes that are taken and given back."""
        held = [Storage(self, part) for part in nbytes]
        del held

    def operation(
        self,
        inputs: Sequence[Sized],
        out: Sized,
        saves: Sequence[Sized] = (),
        backward_work: int = 0,
        passes: bool = False,
        weight: bool = False,
    ) -> Sized:
        """`out` was made of `inputs`.

        Args:
            saves: what autograd keeps; if `out` is among them, its storage.
            backward_work: bytes that its backward takes besides the gradients that it makes.
            passes: the inputs' gradient is the result's own, and no new one is made.
            weight: autograd keeps a frozen weight as well, which takes no memory of its own.

        Returns:
            `out`, as a variable if a gradient flows back to an input.
        """
        sizes = [x.nbytes for x in inputs if x.key is not None]

        def backward(gradients: list[Storage]) -> list[Storage]:
            if passes:
                return [gradients[0] for _ in sizes]
            made = [Storage(self, nbytes) for nbytes in sizes]
            self.work(backward_work)
            return made

        return self.custom(inputs, [out], [*saves, *([None] if weight else [])], backward)[0]

    def custom(
        self,
        inputs: Sequence[Sized],
        outputs: Sequence[Sized],
        saves: Sequence[Any],
        back: Backward,
        learns: bool = False,
    ) -> list[Sized]:
        """An operation with a backward of its own.

        Args:
            back: is given the gradients of the outputs that have one, and returns those of the inputs
                that want one.
            learns: it has parameters inside, so a gradient must reach it whatever its inputs want.
        """
        wanted = tuple(x.key for x in inputs if x.key is not None)
        if not (wanted or learns) or not self._recording:
            return list(outputs)
        made = [self.wanting_gradient(x) for x in outputs]
        kept = [x.storage if isinstance(x, Sized) else x for x in saves]
        keys = tuple(x.key for x in made if x.key is not None)
        self._nodes.append(_Node(keys, wanted, kept, back))
        if kept:
            self._peak_when_kept = self.peak
        return made

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Operations inside are not recorded."""
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    def checkpoint(self, block: Block, *given: Sized) -> list[Sized]:
        """A block of which only the inputs are kept; its backward runs it again."""

        def again(gradients: list[Storage]) -> list[Storage]:
            start, peak = len(self._nodes), self.peak
            self.peak = self._peak_when_kept = self.now
            inside = [x if x.key is None else self.wanting_gradient(x) for x in given]
            outs = block(*inside)
            self.peak = max(peak, self._peak_when_kept)  # it stops when all is there that is needed
            keys = [out.key for out in outs if out.key is not None]
            del outs
            pending = dict(zip(keys, gradients))
            gradients.clear()
            self.go_back(pending, start)
            return [pending.pop(x.key) for x in inside if x.key is not None]

        parameters = len(self._parameters)
        with self.no_grad():
            outs = block(*given)
        learns = len(self._parameters) > parameters
        return self.custom(given, outs, given, again, learns)

    def repeat(self, block: Block, count: int, state: list[Sized]) -> list[Sized]:
        """`block` so many times, one after another; what it makes must have the size of what it reads.

        Args:
            state: what the first reads; emptied, so that it is alive for no longer than it is read.
        """
        if count <= 3:
            for _ in range(count):
                state = _given_up(state, block)
            return state
        state = _given_up(state, block)
        alive = self.now
        state = _given_up(state, block)
        between = count - 3
        final = self.now + (self.now - alive) * between
        held: list[Storage] = []
        sizes = [x.nbytes for x in state]

        def back(_: list[Storage]) -> list[Storage]:
            held.clear()
            return [Storage(self, nbytes) for nbytes in sizes]

        state = self.custom(state, [self.new(x.numel, x.itemsize) for x in state], [held], back)
        held.append(Storage(self, max(0, final - self.now)))
        return _given_up(state, block)

    @property
    def recorded(self) -> int:
        """The number of operations to go back through."""
        return len(self._nodes)

    def backward(self, out: Sized) -> None:
        """Run what was recorded in reverse, from a gradient of `out` that is made here."""
        self.go_back(self.begin_backward(out), 0)

    def begin_backward(self, out: Sized) -> Gradients:
        """The gradient of `out`."""
        assert out.key is not None
        return {out.key: Storage(self, out.nbytes)}

    def go_back(self, pending: Gradients, down_to: int) -> None:
        """Go back until so many operations are left; `pending` gradients are used and made."""
        while len(self._nodes) > down_to:
            outputs, inputs, saved, back = self._nodes.pop()
            arrived = [pending.pop(key) for key in outputs if key in pending]
            made = back(arrived)[::-1] if arrived else []
            del arrived, saved, back
            for key in inputs if made else ():
                self._arrive(pending, key, made.pop())

    def _arrive(self, pending: Gradients, key: int, gradient: Storage) -> None:
        if key in self._parameters:
            return
        known = pending.get(key)
        if known is None:
            pending[key] = gradient
        elif sum(other is known for other in pending.values()) > 1:  # shared, so not added in place
            pending[key] = Storage(self, known.nbytes)


def _given_up(state: list[Sized], block: Block) -> list[Sized]:
    given = tuple(state)
    state.clear()
    return block(*given)
