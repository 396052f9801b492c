"""The options of each stage: Python keywords, YAML keys and `--long_options` are these fields.

One model per stage, unknown keys refused with the nearest known name. This is the public place of what the
modules of `emloc.options` define.
"""

from emloc.options.base import MemoryOptions, ModelOptions, StageConfig
from emloc.options.build import build, nearest
from emloc.options.compress import CompressConfig
from emloc.options.correct import CorrectConfig
from emloc.options.data import CalibrationOptions, DataOptions, LearntDataOptions
from emloc.options.demo import DemoConfig
from emloc.options.evaluate import EvaluateConfig
from emloc.options.lora import LoraOptions
from emloc.options.merge import MergeConfig
from emloc.options.plan import PlanConfig
from emloc.options.polish import PolishConfig
from emloc.options.train import TrainConfig, TrainingOptions
from emloc.options.verify import VerifyConfig

__all__ = [
    "CalibrationOptions",
    "CompressConfig",
    "CorrectConfig",
    "DataOptions",
    "DemoConfig",
    "EvaluateConfig",
    "LearntDataOptions",
    "LoraOptions",
    "MemoryOptions",
    "MergeConfig",
    "ModelOptions",
    "PlanConfig",
    "PolishConfig",
    "StageConfig",
    "TrainConfig",
    "TrainingOptions",
    "VerifyConfig",
    "build",
    "nearest",
]
