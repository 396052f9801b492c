"""Options of polish."""

from pydantic import Field

from emloc.errors import ConfigError
from emloc.options.train import TrainingOptions
from emloc.options.types import Located, OutputDir


class PolishConfig(TrainingOptions):
    """Train a LoRA from an emulator for a few more steps, on the original itself."""

    adapter: Located = Field(description="PEFT adapter, corrected or not")
    model_name_or_path: Located | None = Field(
        None, description="the original model; by default the one that the adapter was made for"
    )
    output_dir: OutputDir = Field(description="where the polished adapter goes; must not exist")
    max_steps: int = Field(8, ge=1, description="steps; each reads the model twice")
    samples_per_step: int = Field(16, ge=1, description="samples per step")
    per_device_train_batch_size: int = Field(
        4,
        ge=1,
        description="samples that go through a block at once; samples_per_step is a multiple of it",
    )
    stream: bool = Field(
        True, description="hold one block at a time; false: the whole model, if it fits"
    )
    num_held_back_samples: int = Field(
        32, ge=0, description="samples to judge the result by, at most a fifth; 0: it is not judged"
    )
    learning_rate: float = Field(1e-3, gt=0)
    warmup_ratio: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of steps spent warming up; the first of them changes nothing",
    )


def micro_batches(config: PolishConfig) -> tuple[int, int]:
    """Samples of a micro-batch, and micro-batches of a step.

    Raises:
        ConfigError: a step is no whole number of micro-batches.
    """
    batch = min(config.per_device_train_batch_size, config.samples_per_step)
    if config.samples_per_step % batch:
        raise ConfigError(
            f"polish: samples_per_step={config.samples_per_step} is not a multiple of "
            f"per_device_train_batch_size={batch}; pass {config.samples_per_step // batch * batch} or "
            f"another batch size."
        )
    return batch, config.samples_per_step // batch
