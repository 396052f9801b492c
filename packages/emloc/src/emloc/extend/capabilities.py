"""Capabilities that a family may have beside what `ModelFamily` requires of every one.

Each capability is a small protocol, recognised by its methods, and an accessor with what is done for a
family that lacks it. Callers use the accessors. Counting a step for plans is one more, in
`emloc.planning.family`; what a family knows of its data is in `emloc.extend.data_capabilities`.

What a method needs of the models themselves is a word that `FamilyEntry.offers` and `MethodEntry.needs` have
in common, so that both are known before either is imported.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import DemoConfig, EvaluateConfig
from emloc.errors import PluginError
from emloc.extend.family import Batch, ModelFamily
from emloc.machine.targets import imported

TRANSFORMERS_MODEL = "a model of transformers"
"""Offered by a family whose folders load with transformers' `from_pretrained`, quantised ones too."""

TRANSFORMER_BLOCKS = "a stack of blocks of attention and MLP"
"""Offered by a family whose models, decoders of text or encoders, have one under `get_decoder()`."""

IN_FEW_BITS = "a model that loads in few bits"
"""Offered by a family whose library loads its models through bitsandbytes (`LoadsInFewBits`)."""

PEFT_FORMAT = "peft"

BY_DEFAULT = "emloc.integrations.peft.evaluated_loss:evaluate_drawn"
"""The scoring of a family without one of its own; of an adapter, it needs PEFT."""


@runtime_checkable
class HasOtherLayouts(Protocol):
    """A family whose checkpoints may lie in other layouts than that of its model class."""

    def native(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint in the layout of the family's model class: itself, or a view on it."""
        ...


def native_of(family: ModelFamily, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in the layout of the family's model class; itself by default."""
    return family.native(checkpoint) if isinstance(family, HasOtherLayouts) else checkpoint


@runtime_checkable
class KeepsLayersDense(Protocol):
    """A family that knows layers which could be compressed, and are not by default."""

    def kept_dense(self, model: nn.Module) -> Mapping[str, str]:
        """Other layers, which stay dense unless `include` names them, each with the reason."""
        ...


def kept_dense_of(family: ModelFamily, model: nn.Module) -> Mapping[str, str]:
    """Layers that stay dense unless `include` names them, with reasons; none by default."""
    return family.kept_dense(model) if isinstance(family, KeepsLayersDense) else {}


@runtime_checkable
class HasVocabulary(Protocol):
    """A family whose models look tokens up in a table, and loads emulators that have it in few bits."""

    def vocabulary(self, model: nn.Module) -> Sequence[Sequence[str]]:
        """The input embeddings and the output head; tied, they are one entry, the embeddings first."""
        ...


def vocabulary_of(family: ModelFamily, model: nn.Module) -> Sequence[Sequence[str]]:
    """The input embeddings and the output head by what they share; none by default."""
    return family.vocabulary(model) if isinstance(family, HasVocabulary) else ()


@runtime_checkable
class MasksPadding(Protocol):
    """A family whose micro-batches hold padding."""

    def token_mask(self, batch: Batch, layer: str | None = None) -> Tensor | None:
        """Tell real tokens (True) from padding; None where all are real.

        Args:
            layer: of what this layer reads, or what this block writes: in the shape that its tokens have
                there, or one that flattens to the same order (`emloc.streaming.real_rows`). Without a
                layer: of the micro-batch's own tokens, for counting them.
        """
        ...


def token_mask_of(family: ModelFamily, batch: Batch, layer: str | None = None) -> Tensor | None:
    """The mask of real tokens; None, as by default, where all are."""
    return family.token_mask(batch, layer) if isinstance(family, MasksPadding) else None


def token_count(family: ModelFamily, batch: Batch) -> int:
    """Real tokens of a micro-batch; without a mask, the elements of its first tensor."""
    mask = token_mask_of(family, batch)
    return next(iter(batch.values())).numel() if mask is None else int(mask.sum())


@runtime_checkable
class StreamsTraining(Protocol):
    """A family that trains on a skeleton which is filled block by block, where `stream` asks for it."""

    streams_training: bool


@runtime_checkable
class ContinuesAdapters(Protocol):
    """A family whose training goes on from an `adapter`, and takes the loss of samples held back."""

    continues_adapters: bool


@runtime_checkable
class ExportsAdapters(Protocol):
    """A family whose adapters are also read in other formats than PEFT's."""

    adapter_formats: tuple[str, ...]

    def export_adapter(self, checkpoint: Checkpoint, folder: Path) -> Sequence[str]:
        """Write the PEFT adapter in `folder` in the family's other formats beside it.

        Args:
            checkpoint: the model that the adapter runs on.

        Returns:
            The files' names.
        """
        ...


def adapter_formats_of(family: ModelFamily) -> tuple[str, ...]:
    """Formats that an adapter is written in; by default PEFT's alone."""
    return family.adapter_formats if isinstance(family, ExportsAdapters) else (PEFT_FORMAT,)


def exported(family: ModelFamily, checkpoint: Checkpoint, folder: Path) -> Sequence[str]:
    """Write an adapter's other formats beside it; the files' names, by default none."""
    if isinstance(family, ExportsAdapters):
        return family.export_adapter(checkpoint, folder)
    return ()


@runtime_checkable
class Evaluates(Protocol):
    """A family that scores models in a way of its own."""

    def evaluate(self, config: EvaluateConfig) -> dict[str, Any]:
        """Scores of a model, with or without an adapter; keys at least `loss` and `peak_bytes`."""
        ...


def evaluated(family: ModelFamily, config: EvaluateConfig) -> dict[str, Any]:
    """Scores of a model; by default the mean loss over samples drawn by seed."""
    if isinstance(family, Evaluates):
        return family.evaluate(config)
    return imported(BY_DEFAULT)(config, family)


@runtime_checkable
class HasDemo(Protocol):
    """A family with a demonstration."""

    def demo(self, config: DemoConfig) -> Path:
        """The whole method on a small real model; returns the folder of its output."""
        ...


def run_demo(family: ModelFamily, config: DemoConfig) -> Path:
    """Run the family's demonstration.

    Raises:
        PluginError: it has none.
    """
    if not isinstance(family, HasDemo):
        raise PluginError(f"The family {family.name} has no demo; pass another family.")
    return family.demo(config)


@runtime_checkable
class WritesExample(Protocol):
    """A family that can make a tiny model and data of its kind."""

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """Save a tiny random model and data set; returns options that every stage accepts."""
        ...


def example_of(family: ModelFamily, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Save a tiny model and data of the family's kind; returns options that every stage accepts.

    Raises:
        PluginError: it has no example.
    """
    if not isinstance(family, WritesExample):
        raise PluginError(
            f"The family {family.name} writes no example; use a model and data of your own."
        )
    return dict(family.write_example(folder, seed))


@runtime_checkable
class KnowsOlderNames(Protocol):
    """A family whose models' modules were called otherwise in earlier versions of its library."""

    def module_name(self, model: nn.Module, name: str) -> str:
        """The present name of an adapter's module; `name` itself where that is not known."""
        ...


def module_name_of(family: ModelFamily, model: nn.Module, name: str) -> str:
    """The present name of an adapter's module; by default `name`."""
    return family.module_name(model, name) if isinstance(family, KnowsOlderNames) else name


@runtime_checkable
class UntiesWeights(Protocol):
    """A family whose models may store a tensor of its own for each of several tied parameters."""

    def untied_config(self, checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any] | None:
        """The config under which the model ties none of its parameters, and else computes the same.

        Args:
            model: the skeleton.

        Returns:
            None where there is no such config.
        """
        ...


def untied_config_of(
    family: ModelFamily, checkpoint: Checkpoint, model: nn.Module
) -> dict[str, Any] | None:
    """The config under which the model ties nothing; None, as by default, where there is none."""
    return family.untied_config(checkpoint, model) if isinstance(family, UntiesWeights) else None


@runtime_checkable
class LoadsInFewBits(Protocol):
    """A family whose library can load its models through bitsandbytes."""

    def layers_in_few_bits(self, model: nn.Module, skip: Sequence[str] | None) -> Sequence[str]:
        """The layers whose weights bitsandbytes quantises.

        Args:
            model: the skeleton.
            skip: `llm_int8_skip_modules`; None: those that the library leaves by itself.
        """
        ...


def layers_in_few_bits(
    family: ModelFamily, model: nn.Module, skip: Sequence[str] | None
) -> Sequence[str]:
    """The layers whose weights bitsandbytes quantises, by the rules of the library; none by default."""
    return family.layers_in_few_bits(model, skip) if isinstance(family, LoadsInFewBits) else ()
