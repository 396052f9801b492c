"""The protocol of a modality plugin: one object that knows its models, its data and its training.

Core streams, compresses, corrects and merges by tensor name; everything that depends on what a model
reads (text, images, latents) is behind `ModelFamily`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import CalibrationOptions, TrainConfig
from emloc.errors import PluginError
from emloc.linalg.convolution import as_matrix
from emloc.machine.targets import imported

Batch = Mapping[str, Tensor]
"""One micro-batch, as the family's forward takes it."""


@dataclass(frozen=True)
class StoredParameter:
    """The form in which a checkpoint stores one parameter of a model.

    Attributes:
        names: the tensors that it is made of; tied parameters share theirs.
        transposed: a layer's weight that is stored d_in × d_out.
        assemble: makes it of several tensors, or of one in another form, given a function that reads
            a tensor; None if it is stored as it is.
    """

    names: tuple[str, ...]
    transposed: bool = False
    assemble: Callable[[Callable[[str], Tensor]], Tensor] | None = None

    @property
    def plain_name(self) -> str | None:
        """The one tensor that is this parameter, or None."""
        return self.names[0] if self.assemble is None else None

    def read(self, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter, as the model's module holds it."""
        return read(self.names[0]) if self.assemble is None else self.assemble(read)

    def layer_weight(self, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter, a layer's weight, as d_out × d_in (`as_matrix`)."""
        weight = as_matrix(self.read(read))
        return weight.T if self.transposed else weight


class EmulatorLayers(NamedTuple):
    """The layers that an emulator's config must name for them to be rebuilt.

    Attributes:
        groups: `{"layers": [names], …}` with the sizes of their form, as a loader reads it (`Form`).
        dtype: what all weights were converted to, for example `bfloat16`; None: kept.
        tables: embeddings and heads in few bits (`VocabularyTable`), of families that have a vocabulary.
    """

    groups: Sequence[Mapping[str, Any]]
    dtype: str | None
    tables: Sequence[Mapping[str, Any]] = ()


@runtime_checkable
class ModelFamily(Protocol):
    """One modality. Layer, block and unit names are module names of the skeleton.

    All else that a family may be able to do is in `emloc.extend.capabilities`.
    """

    name: str

    def skeleton(self, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
        """The model with every parameter on the meta device and real buffers, in eval mode.

        Args:
            dtype: of all parameters and stored buffers, but for what the library keeps in a wider one.
        """
        ...

    def stored(
        self, model: nn.Module, parameter: str, checkpoint: Checkpoint
    ) -> StoredParameter | None:
        """Find how the checkpoint stores a parameter or a buffer; None if it does not."""
        ...

    def blocks(self, model: nn.Module) -> Sequence[str]:
        """The repeated units, in the order of the forward."""
        ...

    def layer_groups(self, model: nn.Module) -> Sequence[Sequence[str]]:
        """Compressible layers; those that always read the same input form a group."""
        ...

    def calibration_batches(
        self, checkpoint: Checkpoint, options: CalibrationOptions
    ) -> Sequence[Batch]:
        """Micro-batches drawn from the data by seed, with labels.

        Args:
            options: of compress, or of correct, whose `adapter` may have LoRAs of other models that
                make part of what the model reads.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The library's own forward on one micro-batch, and its training loss.

        Args:
            batch: on the model's device.

        Returns:
            The loss summed over what it averages (tokens, pixels), a scalar with its graph, in float32 or
            better; and the number of its terms. `emloc.extend.losses.loss_sum` is the same as numbers.
        """
        ...

    def load(self, checkpoint: Checkpoint, dtype: str, device: str) -> nn.Module:
        """A whole model, of the base or of an emulator, in eval mode.

        Args:
            checkpoint: in the family's layout.
            dtype: of the weights, as torch calls it; `auto`: as stored.

        Raises:
            CheckpointError: the library cannot load it.
        """
        ...

    def emulator_config(self, checkpoint: Checkpoint, layers: EmulatorLayers) -> dict[str, Any]:
        """The emulator's `config.json`: the base's, with what its loader needs."""
        ...

    def train(self, config: TrainConfig, work: Path) -> dict[str, Any]:
        """Train a LoRA into `work` as a PEFT adapter; returns what was measured.

        Keys at least `peak_bytes`, `seconds_per_step`, and `summary` with `train_weight_bytes`.
        """
        ...


REQUIRED = frozenset(
    name for name in (*vars(ModelFamily), *ModelFamily.__annotations__) if not name.startswith("_")
)
"""Names of all that a family must have."""


@dataclass(frozen=True)
class FamilyEntry:
    """A family as a plugin registers it, without importing it.

    Attributes:
        name: for example `llm`; a `--family` of the command line.
        summary: one line for `emloc families`.
        target: `module:attribute` of the `ModelFamily` object or class.
        recognises: decides from a parsed `config.json` alone.
        options: fields that stages take for this family: those of the values, for every stage whose
            options derive from the key, for example `{DataOptions: (ImageOptions,)}`; one may stand alone.
        single_file: `module:attribute` of the `emloc.extend.single_file.SingleFileReader` object or
            class, if the family reads models that are one file.
        recognises_file: decides from the names of such a file's tensors.
        offers: what methods may need of its models (`emloc.extend.capabilities`).
        plugin: filled in by core.
    """

    name: str
    summary: str
    target: str
    recognises: Callable[[Mapping[str, Any]], bool]
    options: Mapping[type[BaseModel], "type[BaseModel] | Sequence[type[BaseModel]]"] = field(
        default_factory=dict[type[BaseModel], Sequence[type[BaseModel]]]
    )
    single_file: str = ""
    recognises_file: Callable[[Collection[str]], bool] = lambda names: False
    offers: tuple[str, ...] = ()
    plugin: str = ""

    def options_for(
        self, stage: type[BaseModel]
    ) -> Iterator[tuple[type[BaseModel], type[BaseModel]]]:
        """Options that the family adds to those of a stage: the key of `options` with each of its values."""
        for base, parts in self.options.items():
            if issubclass(stage, base):
                for part in [parts] if isinstance(parts, type) else parts:
                    yield base, part

    def load(self) -> ModelFamily:
        """Import the family.

        Raises:
            PluginError: it is none, or was written for another version.
        """
        family = imported(self.target)
        lost = sorted(name for name in REQUIRED if not hasattr(family, name))
        if lost:
            raise PluginError(
                f"The family {self.name} of plugin {self.plugin} lacks {', '.join(lost)}: it was written for "
                f"another version of emloc. Install a version of the plugin for this one."
            )
        return cast(ModelFamily, family)

    def load_single_file(self) -> Any:
        """Import its `SingleFileReader`."""
        return imported(self.single_file)

    def owned_by(self, plugin: str) -> "FamilyEntry":
        """The same entry with its plugin's name."""
        return replace(self, plugin=plugin)
