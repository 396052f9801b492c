"""Laws of blocks: all of them, in the order of the forward, and gone once a forward is through them."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from emloc.extend.losses import loss_sum
from emloc.streaming.call import Call
from emloc.streaming.lockstep import lockstep
from emloc.streaming.stream import UnitStream
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject


class BlockLaws(SubjectFixture):
    """Promises of `blocks`, on which it depends that memory does not grow with the depth."""

    def test_blocks_are_in_the_order_of_the_forward(self, subject: Subject) -> None:
        """Of those that the example's samples pass."""
        stream = UnitStream(subject.family, subject.checkpoint)
        passed: list[str] = []

        @contextmanager
        def visit(unit: str) -> Iterator[None]:
            passed.append(unit)
            with stream.filled(unit):
                yield

        batch = subject.batches[0]
        lockstep(
            stream.model,
            stream.units,
            [Call(lambda: loss_sum(subject.family, stream.model, batch))],
            visit,
        )
        entered = list(dict.fromkeys(unit for unit in passed if unit in stream.blocks))
        assert entered == [block for block in stream.blocks if block in entered]
        assert entered

    def test_modules_like_a_block_beside_it_are_blocks(self, subject: Subject) -> None:
        """Left out of a list, they would be loaded beside the blocks, and nothing of them compressed."""
        model = subject.skeleton
        blocks = set(subject.family.blocks(model))
        for name, parent in model.named_modules():
            if not isinstance(parent, nn.ModuleList):
                continue
            kinds = {f"{name}.{child}": _kind(part) for child, part in parent.named_children()}
            inside = blocks & kinds.keys()
            alike = {kinds[block] for block in inside}
            left = [child for child, kind in kinds.items() if kind in alike and child not in inside]
            assert not left, f"{', '.join(left)}: like {min(inside)}, and no blocks"

    def test_a_block_is_let_go_when_the_forward_is_through_it(self, subject: Subject) -> None:
        """Tensors that are alive before each block grow by less than half a block's weights."""
        stream = UnitStream(subject.family, subject.checkpoint)
        if len(stream.blocks) < 3:
            return
        alive: list[int] = []
        weights: list[int] = []

        @contextmanager
        def visit(unit: str) -> Iterator[None]:
            if unit in stream.blocks:
                gc.collect()
                alive.append(_living_bytes())
                parameters = stream.model.get_submodule(unit).parameters()
                weights.append(sum(p.numel() * stream.dtype.itemsize for p in parameters))
            with stream.filled(unit):
                yield

        # One sample, whose states are small beside a block.
        [batch, *_] = subject.calibration(num_calibration_samples=1, calibration_batch_size=1)
        loss = Call(lambda: loss_sum(subject.family, stream.model, batch))
        lockstep(stream.model, stream.units, [loss], visit)
        growth = (alive[-1] - alive[1]) / max(1, len(alive) - 2)
        assert growth < min(weights) / 2, f"each block leaves {growth:.0f} bytes behind"


def _kind(module: nn.Module) -> tuple[type, tuple[tuple[str, torch.Size], ...]]:
    return type(module), tuple((name, p.shape) for name, p in module.named_parameters())


def _living_bytes() -> int:
    """Bytes of all tensors on the CPU that Python knows, what several share counted once."""
    storages: dict[int, int] = {}
    for held in gc.get_objects():
        # Not `isinstance`, which lazy objects of libraries answer by importing something.
        if issubclass(type(held), Tensor) and held.device.type == "cpu":
            storage = held.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
