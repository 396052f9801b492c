"""The one module that a plugin imports: all that a family, a method or an option of one's own is made of.

    from emloc.plugin import FamilyEntry, TransformersFamily, hookimpl

What is listed in `__all__` keeps its name, its parameters and its meaning through all patches of a minor
version of emloc: a patch may add names, parameters with defaults and capabilities, and takes none away.
Before 1.0 a minor version may change them, and the changelog then says how; from 1.0 on only a major
version may. So a plugin that imports nothing else of emloc, and `emloc.testing` in its tests, requires
`emloc>=0.1,<0.2` and works with all of these. Everything else under `emloc` may move at any time.

Importing the module takes neither transformers nor any other library of models; names that need one are
imported when they are first asked for. `docs/plugins.md` tells how the parts go together.
"""

import importlib
from typing import TYPE_CHECKING, Any

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.locate import locate
from emloc.config import (
    CalibrationOptions,
    CompressConfig,
    CorrectConfig,
    DataOptions,
    DemoConfig,
    EvaluateConfig,
    LearntDataOptions,
    LoraOptions,
    MemoryOptions,
    MergeConfig,
    ModelOptions,
    PlanConfig,
    PolishConfig,
    StageConfig,
    TrainConfig,
    TrainingOptions,
    VerifyConfig,
)
from emloc.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DependencyError,
    EmlocError,
    Interrupted,
    MemoryLimitError,
    MismatchError,
    NumericalError,
    OutputError,
    PluginError,
)
from emloc.extend.capabilities import (
    IN_FEW_BITS,
    PEFT_FORMAT,
    TRANSFORMER_BLOCKS,
    TRANSFORMERS_MODEL,
    ContinuesAdapters,
    Evaluates,
    ExportsAdapters,
    HasDemo,
    HasOtherLayouts,
    HasVocabulary,
    KeepsLayersDense,
    KnowsOlderNames,
    LoadsInFewBits,
    MasksPadding,
    StreamsTraining,
    UntiesWeights,
    WritesExample,
)
from emloc.extend.data_capabilities import CountsTokens, NamesDataFiles, ReadsWhole
from emloc.extend.emulated_layers import quantization_config, refuse_missing, replace_layers
from emloc.extend.family import Batch, EmulatorLayers, FamilyEntry, ModelFamily, StoredParameter
from emloc.extend.hookspecs import hookimpl
from emloc.extend.losses import LossSum, ScoresBatches, loss_sum, summed
from emloc.extend.methods import Method, MethodEntry, NoOptions, Task
from emloc.extend.single_file import SingleFileReader
from emloc.extend.stages import StageEntry
from emloc.formats.layer_format import DenseLayer, FormatEntry
from emloc.machine.memory import PeakMemory
from emloc.options.marks import (
    InsteadOf,
    LossAlone,
    NamesData,
    NamesFiles,
    OfNewLora,
    SampleSize,
    SplitOf,
    WithoutEffect,
)

if TYPE_CHECKING:
    from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
    from emloc.integrations.transformers.data.texts import answer_of, text_of
    from emloc.integrations.transformers.family import TransformersFamily
    from emloc.integrations.transformers.lively_model import lively_model
    from emloc.integrations.transformers.loading import load_tokenizer
    from emloc.integrations.transformers.sampling import TrainingData
    from emloc.integrations.transformers.tables import dataset_names, load_table
    from emloc.integrations.transformers.text_options import (
        TEXT_OPTIONS,
        AnswerOptions,
        EvaluationDataOptions,
        LabelOptions,
        LengthOptions,
        MixingOptions,
        PackingOptions,
        RowOptions,
        SplitOptions,
        TaskOptions,
        TokenCountOptions,
    )

_TEXT = "text_options"
_LATER = {
    "TransformersFamily": "family",
    "TrainingData": "sampling",
    "answer_of": "data.texts",
    "byte_tokenizer": "byte_tokenizer",
    "dataset_names": "tables",
    "lively_model": "lively_model",
    "load_table": "tables",
    "load_tokenizer": "loading",
    "text_of": "data.texts",
    "TEXT_OPTIONS": _TEXT,
    "AnswerOptions": _TEXT,
    "EvaluationDataOptions": _TEXT,
    "LabelOptions": _TEXT,
    "LengthOptions": _TEXT,
    "MixingOptions": _TEXT,
    "PackingOptions": _TEXT,
    "RowOptions": _TEXT,
    "SplitOptions": _TEXT,
    "TaskOptions": _TEXT,
    "TokenCountOptions": _TEXT,
}
"""Modules of `emloc.integrations.transformers` by the names that are imported from them on first use."""

__all__ = [
    "IN_FEW_BITS",
    "PEFT_FORMAT",
    "TEXT_OPTIONS",
    "TRANSFORMERS_MODEL",
    "TRANSFORMER_BLOCKS",
    "Adapter",
    "AnswerOptions",
    "Batch",
    "CalibrationOptions",
    "Checkpoint",
    "CheckpointError",
    "CompressConfig",
    "ConfigError",
    "ContinuesAdapters",
    "CorrectConfig",
    "CountsTokens",
    "DataError",
    "DataOptions",
    "DemoConfig",
    "DenseLayer",
    "DependencyError",
    "EmlocError",
    "EmulatorLayers",
    "EvaluateConfig",
    "Evaluates",
    "EvaluationDataOptions",
    "ExportsAdapters",
    "FamilyEntry",
    "FormatEntry",
    "HasDemo",
    "HasOtherLayouts",
    "HasVocabulary",
    "InsteadOf",
    "Interrupted",
    "KeepsLayersDense",
    "KnowsOlderNames",
    "LabelOptions",
    "LearntDataOptions",
    "LengthOptions",
    "LoadsInFewBits",
    "LoraOptions",
    "LossAlone",
    "LossSum",
    "MasksPadding",
    "MemoryLimitError",
    "MemoryOptions",
    "MergeConfig",
    "Method",
    "MethodEntry",
    "MismatchError",
    "MixingOptions",
    "ModelFamily",
    "ModelOptions",
    "NamesData",
    "NamesDataFiles",
    "NamesFiles",
    "NoOptions",
    "NumericalError",
    "OfNewLora",
    "OutputError",
    "PackingOptions",
    "PeakMemory",
    "PlanConfig",
    "PluginError",
    "PolishConfig",
    "ReadsWhole",
    "RowOptions",
    "SampleSize",
    "ScoresBatches",
    "SingleFileReader",
    "SplitOf",
    "SplitOptions",
    "StageConfig",
    "StageEntry",
    "StoredParameter",
    "StreamsTraining",
    "Task",
    "TaskOptions",
    "TokenCountOptions",
    "TrainConfig",
    "TrainingData",
    "TrainingOptions",
    "TransformersFamily",
    "UntiesWeights",
    "VerifyConfig",
    "WithoutEffect",
    "WritesExample",
    "answer_of",
    "byte_tokenizer",
    "dataset_names",
    "hookimpl",
    "lively_model",
    "load_table",
    "load_tokenizer",
    "locate",
    "loss_sum",
    "quantization_config",
    "refuse_missing",
    "replace_layers",
    "summed",
    "text_of",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'emloc.plugin' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"emloc.integrations.transformers.{_LATER[name]}")
    except ModuleNotFoundError as problem:
        raise DependencyError(
            f"emloc.plugin.{name} needs {problem.name}, which is not installed; pip install "
            f"'emloc[transformers]'."
        ) from problem
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return [*globals(), *_LATER]
