"""Laws of blocks: all of them, in the order of the forward, and gone once a forward is through them."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from emloc.extend.capabilities import kept_dense_of
from emloc.extend.losses import loss_sum
from emloc.streaming.call import Call
from emloc.streaming.lockstep import lockstep
from emloc.streaming.stream import UnitStream
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class BlockLaws(SubjectFixture):
    """Promises of `blocks`, on which it depends that memory does not grow with the depth."""

    def test_blocks_are_in_the_order_of_the_forward(self, subject: Subject) -> None:
        """Blocks that the example's samples pass come as the family lists them."""
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
            if not isinstance(parent, LISTS):
                continue
            kinds = {f"{name}.{child}": _kind(part) for child, part in parent.named_children()}
            inside = blocks & kinds.keys()
            alike = {kinds[block] for block in inside}
            left = [child for child, kind in kinds.items() if kind in alike and child not in blocks]
            assert not left, f"{', '.join(left)}: like {min(inside)}, and no blocks"

    def test_linear_layers_of_blocks_are_compressed_or_known(self, subject: Subject) -> None:
        """Warns of those in no group and not in `kept_dense`: what is left out is dense in every emulator."""
        model, family = subject.skeleton, subject.family
        known = {name for group in family.layer_groups(model) for name in group}
        known |= kept_dense_of(family, model).keys()
        inside = tuple(f"{block}." for block in family.blocks(model))
        left = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(inside) and name not in known
        ]
        if left:
            warnings.warn(f"These layers lie in blocks and are in no group: {left}", stacklevel=2)

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
    """Bytes of all tensors on the CPU that Python knows; one that two objects show is counted once."""
    sizes: dict[tuple[int, int], int] = {}
    for held in gc.get_objects():
        # Not `isinstance`, which lazy objects of libraries answer by importing something.
        if issubclass(type(held), Tensor) and held.device.type == "cpu":
            sizes[held.data_ptr(), held.nbytes] = held.nbytes
    return sum(sizes.values())
