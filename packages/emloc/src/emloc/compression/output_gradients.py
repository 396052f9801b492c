"""The second moments of the loss's gradients at layers' outputs, in one pass forward and back over the base.

A block's outputs get their gradients while it is in memory (`emloc.streaming.block_gradients`); one block's
moments are held, and written before the next block's turn; what enters blocks is kept on disk. A layer of
many outputs has the diagonal alone (`emloc.linalg.row_weights`); of layers that share an input each has its
own, and nothing across them. A run that was killed begins the pass again, unless it had ended.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.small_files import write_json
from emloc.compression.groups import CompressionPlan, Group
from emloc.extend.family import Batch
from emloc.linalg.row_weights import FULL_BELOW, RowWeights
from emloc.streaming.block_gradients import backward_by_block
from emloc.streaming.kept_inputs import OnDisk
from emloc.streaming.stream import UnitStream

WHOLE = "gradients.json"
"""Name of the file that is written when all sums are: of a model that goes through its blocks again, every
block may have a file long before."""


class OutputGradients:
    """The moments of a plan's layers, in a folder; made by `gather`.

    Attributes:
        paths: files by block.
    """

    def __init__(self, paths: dict[str, Path], block_of: dict[str, str]) -> None:
        self.paths, self._block_of = paths, block_of

    @classmethod
    def gather(
        cls, stream: UnitStream, plan: CompressionPlan, batches: Sequence[Batch], work: Path
    ) -> "OutputGradients":
        """Run the pass, unless one has ended in this folder.

        Raises:
            DataError: no token has a label.
            NumericalError: the loss or a gradient is NaN or infinite; names the block.
        """
        paths = {
            b: work / f"gradients-{n + 1:05d}.safetensors" for n, b in enumerate(stream.blocks)
        }
        block_of = {
            layer: block
            for block in stream.blocks
            for group in plan.within(block)
            for layer in group.layers
        }
        made = cls(paths, block_of)
        whole = work / WHOLE
        if not whole.is_file():
            for path in paths.values():
                path.unlink(missing_ok=True)
            visit = partial(_visit, stream, plan, paths)
            backward_by_block(stream, batches, visit, OnDisk(stream.device, work), in_parts=True)
            write_json(whole, {"blocks": len(paths)})
        return made

    def of(self, group: Group) -> RowWeights | None:
        """The weights of a group's outputs; None where no gradient reached them."""
        path = self.paths[self._block_of[group.owner]]
        with safe_open(path, framework="pt") as stored:
            known = set(stored.keys())
            if not known.issuperset(group.layers):
                return None
            return RowWeights.of([stored.get_tensor(layer) for layer in group.layers])


@contextmanager
def _visit(
    stream: UnitStream, plan: CompressionPlan, paths: dict[str, Path], block: str, _: nn.Module
) -> Iterator[None]:
    # A block that was visited before, in a model that goes through its blocks again, has sums already.
    sums = load_file(paths[block], str(stream.device)) if paths[block].is_file() else {}
    # Nothing in the first block has a graph unless something there wants a gradient.
    anchor = torch.zeros((), device=stream.device, requires_grad=True)
    handles: list[Any] = [
        stream.model.get_submodule(layer).register_forward_hook(
            _watching(sums, layer, bool(group.shape.kernel), anchor)
        )
        for group in plan.within(block)
        for layer in group.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    declared = {name: (moments.dtype, tuple(moments.shape)) for name, moments in sums.items()}
    with ShardWriter(paths[block], declared, block) as shard:
        for name, moments in sums.items():
            shard.write(name, moments.cpu())


def _watching(
    sums: dict[str, Tensor], layer: str, convolution: bool, anchor: Tensor
) -> Callable[..., Tensor]:
    def add(gradient: Tensor) -> None:
        rows = (gradient.movedim(-3, -1) if convolution else gradient).detach().float()
        rows = rows.reshape(-1, rows.shape[-1])
        made = rows.T @ rows if rows.shape[1] < FULL_BELOW else rows.square().sum(0)
        sums[layer] = sums[layer] + made if layer in sums else made

    def watch(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        watched = output + anchor.to(output.dtype)
        watched.register_hook(add)
        return watched

    return watch


def gradients_in(work: Path) -> list[str]:
    """Names of the files of moments in a folder, which only a continuation needs."""
    return [
        path.name for pattern in (WHOLE, "gradients-*.safetensors") for path in work.glob(pattern)
    ]
