"""Read a checkpoint of one layout under the names and shapes of another, while it streams.

A tensor of the new layout is made of one stored tensor: the same under another name, a slice of its
rows, or rows put together anew. Opening looks at names and shapes alone, and reading touches those
pages of the file that the new tensor comes from.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.tensor_info import TensorInfo
from emloc.errors import CheckpointError

Take = Callable[[Tensor], Tensor]
"""Makes a new tensor of a stored one by slicing, reshaping and permuting; must work on meta tensors."""

Rule = Callable[[str, TensorInfo], Mapping[str, Take]]
"""The tensors that a stored one becomes, by their new names; nothing if the layout has no such tensor."""


def whole(tensor: Tensor) -> Tensor:
    """The stored tensor as it is: a mere change of name."""
    return tensor


class TranslatedCheckpoint(Checkpoint):
    """A checkpoint seen in another layout.

    `config` and `tensors` are the new layout's; a tensor's `file` is that of the stored one, so that a
    merge writes as many shards, of the same names, as it read. Companions and both digests are those of
    what lies on disk: they do not depend on how it is looked at.

    Attributes:
        stored: the checkpoint as it lies on disk.
    """

    translated = True

    def __init__(self, stored: Checkpoint, config: dict[str, Any], rule: Rule) -> None:
        """Translate every tensor's name and shape.

        Raises:
            CheckpointError: a tensor that the rule does not know, that does not fit it, or that becomes
                what another one became.
        """
        self.stored = stored
        self._sources: dict[str, tuple[str, Take]] = {}
        tensors: dict[str, TensorInfo] = {}
        for source, info in stored.tensors.items():
            made = rule(source, info)
            if not made:
                raise CheckpointError(
                    f"Tensor {source} of {stored.name} does not belong to the layout that its config.json "
                    f"names; config and shards do not belong together."
                )
            for name, take in made.items():
                if name in tensors:
                    raise CheckpointError(
                        f"Tensors {self._sources[name][0]} and {source} of {stored.name} are both {name}; "
                        f"the checkpoint mixes two layouts."
                    )
                self._sources[name] = (source, take)
                tensors[name] = _described(stored, source, take)
        super().__init__(stored.name, stored.path, config, dict(sorted(tensors.items())))

    def read(self, name: str) -> Tensor:
        """A tensor in the new layout; a view into the file where `Take` gives one.

        Raises:
            CheckpointError: no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"Checkpoint {self.name} holds no tensor {name}.")
        source, take = self._sources[name]
        return take(self.stored.read(source))

    def headers(self, file: str) -> Iterator[tuple[str, TensorInfo]]:
        """Names, dtypes and shapes of what one shard becomes."""
        return ((name, info) for name, info in self.tensors.items() if info.file == file)

    def prefetch(self, names: Iterable[str]) -> None:
        """See `Checkpoint`; the stored tensors are read ahead as a whole."""
        self.stored.prefetch(dict.fromkeys(self._sources[name][0] for name in names))

    def digest(self) -> str:
        """Identity of the weights on disk: that of the checkpoint opened without translation."""
        return self.stored.digest()


def _described(stored: Checkpoint, source: str, take: Take) -> TensorInfo:
    """The dtype and shape that `take` makes of a stored tensor, found out without reading it."""
    info = stored.tensors[source]
    try:
        made = take(torch.empty(info.shape, dtype=info.dtype, device="meta"))
    except (RuntimeError, IndexError) as problem:
        raise CheckpointError(
            f"Tensor {source} of {stored.name} is {info.shape}, which does not fit its config.json; "
            f"config and shards do not belong together."
        ) from problem
    return TensorInfo(info.file, info.dtype, tuple(made.shape))
