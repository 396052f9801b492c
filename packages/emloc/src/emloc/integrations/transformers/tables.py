"""Data sets through the datasets library: local files, folders and hub ids, one or several."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from emloc.config import DataOptions
from emloc.errors import ConfigError, DataError

SampleT = TypeVar("SampleT")
_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_table(name: str, split: str, streaming: bool) -> Any:
    """A `datasets.Dataset`, or an `IterableDataset` if streamed.

    Raises:
        DataError: there is none, it is empty, or it cannot be parsed.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = Path(name)
    try:
        if path.is_file():
            if split not in ("train", ""):
                raise DataError(
                    f"{name} is one file and has no split {split!r}; pass the file that holds it."
                )
            if path.suffix not in _LOADERS:
                raise DataError(f"{name}: expected a file ending in {', '.join(_LOADERS)}.")
            if path.stat().st_size == 0:
                raise DataError(f"Data set {name} is empty.")
            return load_dataset(
                _LOADERS[path.suffix], data_files=name, split="train", streaming=streaming
            )
        looks_local = name.startswith((".", "/", "~")) or path.suffix in _LOADERS
        if path.exists() or not looks_local:
            return load_dataset(name, split=split, streaming=streaming)
    except DatasetGenerationError as problem:
        cause = str(problem.__cause__ or problem).splitlines()[0]
        raise DataError(f"Data set {name} cannot be parsed: {cause}") from problem
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as problem:
        if isinstance(problem, DataError):
            raise
        first = str(problem).strip().splitlines()[0]
        raise DataError(f"Data set {name} cannot be loaded: {first}") from problem
    raise DataError(f"No data set {name}: there is no such file or folder.")


def dataset_names(options: DataOptions) -> list[str]:
    """The data sets that `dataset` names."""
    return [name for name in (options.dataset or "").split(",") if name]


def shares(options: DataOptions, sizes: Sequence[int]) -> list[float]:
    """What part of the samples comes from each data set; by their sizes, if no weights are given.

    Raises:
        ConfigError: there are more or fewer weights than data sets.
    """
    weights: Sequence[float] = options.dataset_weights or sizes
    if len(weights) != len(sizes):
        raise ConfigError(
            f"dataset_weights has {len(weights)} weights for {len(sizes)} data sets; give one for each."
        )
    return [weight / sum(weights) for weight in weights]


def mix(parts: Sequence[list[SampleT]], wanted: Sequence[float], seed: int) -> list[SampleT]:
    """Samples of several data sets by their shares, shuffled; small sets are repeated as needed.

    Every sample is used at least once: the set that is largest for its share sets the total.
    """
    total = max(len(part) / share for part, share in zip(parts, wanted) if share > 0)
    draw = random.Random(seed)
    mixed: list[SampleT] = []
    for part, share in zip(parts, wanted):
        count = round(total * share)
        mixed += part * (count // len(part)) + draw.sample(part, count % len(part))
    draw.shuffle(mixed)
    return mixed
