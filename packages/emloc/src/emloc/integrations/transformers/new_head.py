"""A checkpoint whose model has another head than the one that is to be trained, such as a masked language
model that becomes a classifier.

It is read in the layout of the class that is to be trained: what both have under the names of that class,
the head from numbers that transformers would draw for it, by a seed, and none of the other head. So every
stage has the same head, and what is written from it is a whole model of the class.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.described import Described
from emloc.artefacts.tensor_info import TensorInfo
from emloc.artefacts.whole_weights import require_whole
from emloc.extend.family import StoredParameter
from emloc.integrations.transformers.conversion import stored_parameter
from emloc.integrations.transformers.skeleton import empty_model

SEED = 0


class WithNewHead(Checkpoint):
    """A checkpoint seen as one of another class, with a head of its own.

    Companions and both digests are those of what lies on disk.

    Attributes:
        stored: the checkpoint as it lies on disk.
    """

    translated = True

    def __init__(
        self,
        stored: Checkpoint,
        config: dict[str, Any],
        model: Any,
        places: Mapping[str, StoredParameter],
        head: Mapping[str, Tensor],
        drawn: Sequence[str],
    ) -> None:
        """Take the names and shapes of the class.

        Args:
            config: of the class.
            model: its skeleton.
            places: where parameters lie that are stored.
            head: those that are not.
            drawn: modules that these belong to.
        """
        self.stored, self._places, self._head = stored, places, head
        state: dict[str, Tensor] = model.state_dict()
        dtype, last = stored.main_dtype, max(info.file for info in stored.tensors.values())
        tensors: dict[str, TensorInfo] = {}
        for name, place in places.items():
            info = stored.tensors[place.names[0]]
            shape = tuple(state[name].shape)
            tensors[name] = TensorInfo(info.file, info.dtype, shape)
        for name, value in head.items():
            tensors[name] = TensorInfo(last, dtype, tuple(value.shape))
        super().__init__(
            stored.name, stored.path, config, dict(sorted(tensors.items())), drawn=tuple(drawn)
        )

    def read(self, name: str) -> Tensor:
        """A parameter by its name in the class.

        Raises:
            CheckpointError: no such tensor.
        """
        if name in self._head:
            return self._head[name].to(self.tensors[name].dtype)
        place = self._places.get(name)
        return self.stored.read(name) if place is None else place.read(self.stored.read)

    def headers(self, file: str) -> Iterator[tuple[str, TensorInfo]]:
        """Names, dtypes and shapes of what one shard becomes."""
        return ((name, info) for name, info in self.tensors.items() if info.file == file)

    def prefetch(self, names: Iterable[str]) -> None:
        """See `Checkpoint`."""
        places = [self._places[name] for name in names if name in self._places]
        self.stored.prefetch(dict.fromkeys(name for place in places for name in place.names))

    def digest(self) -> str:
        """Identity of the weights on disk: that of the checkpoint opened as it is."""
        return self.stored.digest()


def with_new_head(checkpoint: Checkpoint, auto_class: Any, may_lack: tuple[str, ...]) -> Checkpoint:
    """The checkpoint, or where its model is of another class than `auto_class` makes, a view as of that one.

    Args:
        may_lack: ends of the names of modules that such a checkpoint need not hold.

    Raises:
        CheckpointError: it lacks anything else.
    """
    written = checkpoint.config.get("architectures")
    if (checkpoint.translated and not isinstance(checkpoint, Described)) or not written:
        return checkpoint
    config = {key: v for key, v in checkpoint.config.items() if key != "quantization_config"}
    described = Described(checkpoint.name, checkpoint.path, config, {})
    model: Any = empty_model(described, auto_class, torch.float32)
    made = type(model).__name__
    if made in written:
        return checkpoint
    config = {**checkpoint.config, "architectures": [made]}
    if isinstance(checkpoint, Described):
        return checkpoint.having(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [name for name, _ in model.named_parameters()]
    names += [name for name in model.state_dict() if name not in parameters]  # buffers
    places = {name: stored_parameter(model, name, checkpoint) for name in names}
    missing = [name for name, place in places.items() if place is None and name in parameters]
    modules = {name: _head_of(name, may_lack) for name in missing}
    require_whole(checkpoint.path, [name for name, module in modules.items() if module is None])
    drawn = sorted({module for module in modules.values() if module is not None})
    head = dict(_drawn(model, drawn, missing))
    known = {name: place for name, place in places.items() if place is not None}
    return WithNewHead(checkpoint, config, model, known, head, drawn)


def _head_of(parameter: str, may_lack: tuple[str, ...]) -> str | None:
    """The outermost module of a parameter that may be missing; None if none may."""
    parts = parameter.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return next((name for name in above if f".{name}".endswith(_dotted(may_lack))), None)


def _dotted(ends: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{end}" for end in ends)


def _drawn(
    model: Any, modules: Sequence[str], wanted: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """The numbers that the model's class draws for some of its modules, by a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for name in modules:
            module: nn.Module = model.get_submodule(name).to_empty(device="cpu")
            for each in module.modules():
                model._init_weights(each)
            for path, parameter in module.named_parameters():
                if f"{name}.{path}" in wanted:
                    yield f"{name}.{path}", parameter.detach()
